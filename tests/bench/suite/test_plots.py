"""The pictures: a dot for each seed, sizes that can be read, and the same bytes from the same results."""

import pytest

from axolotl_qtha.bench.suite.plots import FORMATS, _curves, _looks, _pareto, _plain_ticks, _save
from axolotl_qtha.bench.suite.table import entries

from .test_table import make, run_all

LOSSES = {"lora": (3.0, 3.1, 3.25), "qtha": (3.01, 3.2, 3.1)}


@pytest.fixture
def execution(tmp_path):
    made = make(tmp_path, adapters=["lora", "qtha"])
    run_all(made, LOSSES)
    return made


def dots(axes):
    """Return the heights of the dots, line by line."""
    return [sorted(map(float, line.get_ydata())) for line in axes.get_lines() if line.get_marker() == "."]


def test_every_seed_is_a_dot(execution):
    found = entries(execution)
    (axes,) = _pareto(found, ["domain"], _looks([])).axes
    assert dots(axes) == [sorted(losses) for losses in LOSSES.values()]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["20,000", "40,000", "60,000", "80,000"]
    _, validation = _curves(found, {}, _looks([])).axes
    every = [[4.0] * 3 + [loss + more for loss in losses for more in (0.1, 0.0)] for losses in LOSSES.values()]
    assert [pytest.approx(sorted(values)) for values in every] == dots(validation)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (14_000, 85_000, ["20,000", "40,000", "60,000", "80,000"]),
        (900, 120_000, ["1,000", "2,000", "5,000", "10,000", "20,000", "50,000", "100,000"]),
        (15_500, 16_700, ["15,600", "15,900", "16,200", "16,500"]),
    ],
)
def test_sizes_are_round_numbers_in_full(low, high, labels):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set(xscale="log", xlim=(low, high))
    _plain_ticks(axes)
    assert [label.get_text() for label in axes.get_xticklabels()] == labels
    assert len(axes.xaxis.get_minor_locator()()) == 0


def test_the_same_results_give_the_same_files(execution, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        _save(_pareto(entries(execution), ["domain"], _looks([])), tmp_path / folder / "pareto")
    for kind in FORMATS:
        first, second = ((tmp_path / folder / f"pareto.{kind}").read_bytes() for folder in ("a", "b"))
        assert first == second
