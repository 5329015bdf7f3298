"""qtha-report: what it reads, draws, and refuses."""

import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from axolotl_qtha.cli.report import report
from axolotl_qtha.training.diagnostics_report import NAMES, draw, read_log, series, table

from ..e2e.commands import train_here, write_config

LOG = [
    {"step": 1, "loss": 4.0, "qtha/quantum_share": 0.5, "qtha/quantum_share/layer_0": 0.4, "qtha/grad_norm_angles": 0.0},
    {"step": 1, "eval_loss": 3.9},
    {"step": 2, "loss": 3.0},
    {"step": 3, "loss": 2.0, "qtha/quantum_share": 0.25, "qtha/quantum_share/layer_0": 0.2, "qtha/grad_norm_angles": 0.1},
]


def write(folder, log, name="trainer_state.json"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"log_history": log}))


def test_the_last_checkpoint_is_read(tmp_path):
    for step in (9, 10, "best"):
        write(tmp_path, [{"step": step, "qtha/wrapped": 0.0}], f"checkpoint-{step}/trainer_state.json")
    assert read_log(tmp_path)[0]["step"] == 10
    write(tmp_path, LOG)
    assert read_log(tmp_path) == LOG


def test_series_and_table():
    assert series(LOG, "qtha/quantum_share") == ([1, 3], [0.5, 0.25])
    assert series(LOG, "qtha/wrapped") == ([], [])
    console = Console(record=True, width=120)
    console.print(table(LOG))
    text = console.export_text()
    assert NAMES["qtha/quantum_share"] in text
    assert NAMES["qtha/wrapped"] not in text
    assert [part.strip() for part in next(line for line in text.splitlines() if "training loss" in line).split("│")[2:6]] == [
        "4",
        "1",
        "2",
        "3",
    ]


@pytest.mark.slow
def test_picture(tmp_path):
    for name, log in (("all", LOG), ("little", [{"step": 1, "qtha/effective_rank": 2.0}])):
        draw(log, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (None, "hold no trainer_state.json"),
        ("{", "cannot be read"),
        ([{"step": 1, "loss": 1.0}], "holds no diagnostics. What works: .*`qtha: {diagnostics_steps: 10}`"),
    ],
)
def test_refused(tmp_path, log, words):
    if isinstance(log, str):
        (tmp_path / "trainer_state.json").write_text(log)
    elif log is not None:
        write(tmp_path, log)
    done = CliRunner().invoke(report, [str(tmp_path)])
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    with pytest.raises(ValueError, match=words):
        read_log(tmp_path)


@pytest.mark.e2e
def test_of_a_training(tmp_path):
    config = write_config(tmp_path, max_steps=3, save_steps=3, eval_steps=3, qtha={"diagnostics_steps": 2})
    _, _, trainer = train_here(config)
    measured = [row["step"] for row in trainer.state.log_history if "qtha/quantum_share" in row]
    assert measured == [1, 3]
    done = CliRunner().invoke(report, [str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "effective rank" in done.output
    assert (tmp_path / "out" / "qtha-report.png").is_file()


@pytest.mark.e2e
def test_none_where_none_are_wanted(tmp_path):
    config = write_config(tmp_path, max_steps=1, save_steps=1, eval_steps=1, qtha={"diagnostics_steps": 0})
    _, _, trainer = train_here(config)
    assert not any(key.startswith("qtha/") for row in trainer.state.log_history for key in row)
