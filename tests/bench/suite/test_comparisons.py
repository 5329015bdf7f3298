"""Tests of paired differences: which are one family, what is said of them, on made-up results."""

import pytest
from scipy import stats

from axolotl_qtha.bench.suite.comparisons import comparisons
from axolotl_qtha.bench.suite.spec import Cell, search
from axolotl_qtha.bench.suite.summary import summary
from axolotl_qtha.bench.suite.table import entries

from .test_table import make, method_of, put

# Validation losses of seeds 3, 5, 8.
LOSSES = {
    "domain": {"lora": (3.0, 3.1, 3.2), "qtha": (3.001, 3.1, 3.201), "product": (3.3, 3.4, 3.51)},
    "arithmetic": {"lora": (1.0, 1.1, 1.2), "qtha": (1.05, 1.18, 1.24), "product": (1.0, 1.3, 1.1)},
}
SUITE = {"tasks": list(LOSSES), "adapters": ["lora", "qtha", "product"], "learning_rates": [0.01]}


@pytest.fixture
def execution(tmp_path):
    made = make(tmp_path, **SUITE, equivalence_margin=0.02)
    for task, losses in LOSSES.items():
        for name, values in losses.items():
            for seed, loss in zip(made.suite.seeds, values, strict=True):
                put(made, Cell(task, method_of(made, name), 0.01, seed), 4.0, loss)
    return made


def differences_of(task, ours, other):
    return [a - b for a, b in zip(LOSSES[task][ours], LOSSES[task][other], strict=True)]


def key_of(made):
    ours, other = made.difference.ours, made.difference.other
    return ours.task, ours.method.adapter, other.method.adapter


def test_all_pairs_of_the_suite_are_one_family(execution):
    made = comparisons(entries(execution), 0.02)
    keys = [key_of(each) for each in made]
    assert keys == [(task, *pair) for task in LOSSES for pair in (("qtha", "lora"), ("qtha", "product"), ("product", "lora"))]
    tests = [stats.ttest_rel(*(LOSSES[task][name] for name in pair)).pvalue for task, *pair in keys]
    assert [each.p for each in made] == pytest.approx(tests, rel=1e-6)
    ordered, corrected = sorted(tests), {}
    for place, value in enumerate(ordered):  # Holm: six tests, over both tasks
        corrected[value] = max([min(1, (6 - place) * value), *corrected.values()])
    assert [each.p_holm for each in made] == pytest.approx([corrected[value] for value in tests], rel=1e-6)
    for each, (task, *pair) in zip(made, keys, strict=True):
        values = differences_of(task, *pair)
        sides = [stats.ttest_1samp(values, limit, alternative=side) for limit, side in ((-0.02, "greater"), (0.02, "less"))]
        assert each.p_equivalent == pytest.approx(max(side.pvalue for side in sides), rel=1e-6)
        assert each.p_equivalent <= each.p_equivalent_holm <= 1


def test_what_is_said_of_them(execution):
    made = {key_of(each): each for each in comparisons(entries(execution), 0.02)}
    close = made["domain", "qtha", "lora"]
    assert (close.verdict, close.equivalent) == ("not told apart (the interval includes zero)", "yes")
    assert (made["domain", "product", "lora"].verdict, made["domain", "product", "lora"].equivalent) == ("higher", "not shown")
    unsure = made["arithmetic", "qtha", "lora"]  # 0.05, 0.08, 0.04: p 0.04 alone
    assert 0.03 < unsure.p < 0.05 < unsure.p_holm
    assert unsure.verdict == "higher, not after Holm's correction"
    text = summary(execution, entries(execution), "axolotl qtha-bench suite.yml")
    row = next(line for line in text.splitlines() if line.startswith("| qtha, r 8, 0.24 - lora, r 8 | +0.001"))
    assert row.endswith("| yes | not told apart (the interval includes zero) |")
    assert "corrected by Holm's method for the 6 paired differences of this suite, over all tasks" in text
    assert "a difference of 0.02 nats a token or more, the suite's `equivalence_margin`" in text
    assert "no difference" not in text.replace("of no difference in validation loss", "")
    sentences = text.split("## What the circuit adds")[1]
    assert "the trained circuit **lowers** it." in sentences
    assert "the two are **not told apart**." in sentences


def test_without_a_margin_nothing_is_called_equivalent(execution):
    for each in comparisons(entries(execution)):
        assert (each.margin, each.p_equivalent, each.p_equivalent_holm, each.equivalent) == (None, None, None, "")


def test_pairs_without_an_interval_are_no_part_of_the_family(execution):
    put(execution, Cell("domain", method_of(execution, "product"), 0.01, 5), 4.0, 9.0, status="diverged")
    made = comparisons(entries(execution), 0.02)
    known = [each for each in made if each.p is not None]
    assert (len(made), len(known)) == (6, 4)
    smallest = min(known, key=lambda each: each.p)
    assert smallest.p_holm == pytest.approx(4 * smallest.p)
    unknown = next(each for each in made if each.p is None)
    assert (unknown.p_holm, unknown.equivalent) == (None, "")
    assert unknown.verdict == "not known: runs are missing or diverged"


def test_a_margin_chosen_later_asks_for_no_new_runs(execution, tmp_path):
    other = make(tmp_path, **SUITE)
    assert other.suite.equivalence_margin is None
    assert other.open(search(other.suite)) == []
