"""`axolotl qtha-hardware-eval`: what it refuses, before anything is submitted; the whole command is in e2e/test_ibm.py."""

import json

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from axolotl_qtha.cli.ibm import hardware_eval
from axolotl_qtha.hardware_eval.command import STARTED, EvaluationOptions, _check_cost

from ..e2e.commands import write_config
from ..ibm.boundary import points

COUNTS, LAYERS = [20, 10], 2


@pytest.fixture
def check(tmp_path):
    """Return what prints and checks the cost of an evaluation on a runner, and what it printed."""
    config = tmp_path / "config.yml"
    config.write_text("qtha: {}")

    def check(runner, **options):
        out = Console(record=True, width=400)
        used = _check_cost(EvaluationOptions(config, **options), runner, COUNTS, LAYERS, tmp_path / "out", out)
        return used, out.export_text()

    return check


def test_the_cost_is_printed_first(start, check):
    runner = start(max_qpu_seconds=100)
    used, text = check(runner)
    expected = (runner.cost(20) + runner.cost(10)) * LAYERS
    assert used == 0
    assert f"{expected.circuits} circuits in {expected.jobs} jobs" in text
    assert f"{expected.qpu_seconds:,.1f} QPU seconds" in text
    assert "max_qpu_seconds: 100" in text


def test_above_the_cap_nothing_is_submitted(start, check, cloud):
    runner = start(max_qpu_seconds=5)
    needed = ((runner.cost(20) + runner.cost(10)) * LAYERS).qpu_seconds
    with pytest.raises(ValueError, match=rf"max_qpu_seconds: 5.*{needed - 5:,.1f} s too many.*nothing was submitted"):
        check(runner)
    assert not cloud.jobs


def test_an_evaluation_that_was_stopped_does_not_pay_for_itself_twice(start, check, cloud, tmp_path):
    """It needs about 8 s of 13, and 6 of them were used before it was stopped; another one does not fit any more."""
    cloud.seconds = 6.0
    runner = start(max_qpu_seconds=13)
    check(runner)
    runner.expectations(points(runner, 20))
    assert runner.used() == 6
    again = start(max_qpu_seconds=13)
    assert check(again)[0] == 0
    with pytest.raises(ValueError, match="too many"):
        check(again, samples=9)
    (tmp_path / "out" / STARTED).write_text("torn")
    with pytest.raises(ValueError, match="too many"):
        check(again)
    assert json.loads((tmp_path / "out" / STARTED).read_text())["used"] == 6


def refused(tmp_path, *arguments, **changes):
    config = write_config(tmp_path, "ibm.yml", **changes)
    done = CliRunner().invoke(hardware_eval, [str(config), *arguments])
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize("option", ["--samples", "--tokens"])
def test_none_at_all(tmp_path, option):
    assert f"{option}: 0" in refused(tmp_path, option, "0")


def test_without_a_device(tmp_path):
    text = refused(tmp_path, qtha={"quantum_backend": "torch", "ibm": None})
    assert "quantum_backend" in text
    assert "fake:manila" in text


def test_without_a_trained_adapter(tmp_path):
    assert "holds no trained adapter" in refused(tmp_path, "--lora-model-dir", str(tmp_path))


def test_an_earlier_evaluation_is_kept(tmp_path):
    (tmp_path / "hardware_eval.json").write_text("{}")
    text = refused(tmp_path, "--out", str(tmp_path))
    assert "--overwrite" in text
    assert "--out: 'file' is a file" in refused(tmp_path, "--out", _file(tmp_path)).replace(str(tmp_path) + "/", "")


def _file(folder):
    (folder / "file").write_text("")
    return str(folder / "file")


def test_a_token_in_the_yaml_is_refused_unseen(tmp_path):
    ibm = {**yaml.safe_load(write_config(tmp_path, "ibm.yml").read_text())["qtha"]["ibm"], "token": "PlantedToken"}
    text = refused(tmp_path, qtha={"ibm": ibm})
    assert "qtha.ibm.token" in text
    assert "PlantedToken" not in text
