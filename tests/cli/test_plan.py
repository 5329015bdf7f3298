"""`axolotl qtha-plan` as a person sees it."""

import json

import pytest
from axolotl.cli.main import cli
from click.testing import CliRunner

from ..planner.bases import CONFIGS, write_run


def run(*arguments):
    return CliRunner().invoke(cli, ["qtha-plan", *map(str, arguments)])


@pytest.fixture
def path(tmp_path):
    return write_run(tmp_path, CONFIGS["llama"], load_in_4bit=True, qtha={"rank": 4, "param_budget": 0.5, "mpo": "tt"})


@pytest.mark.slow
def test_the_tables(path, tmp_path):
    assert {file.name for file in (tmp_path / "base").iterdir()} == {"config.json"}, "no weights are there to be loaded"
    done = run(path)
    assert done.exit_code == 0, done.output
    for words in ("3 x q_proj", "192 x 448", "16 x 12", "frozen weights (float32, quantisation: 4 bits, nf4", "total", "24 RY"):
        assert words in done.output
    assert "21 adapted layers" in done.output
    assert {file.name for file in (tmp_path / "base").iterdir()} == {"config.json"}


@pytest.mark.slow
def test_json_holds_what_the_tables_show(path, tmp_path):
    done = run(path, "--json", tmp_path / "plan.json")
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert f"{plan['parameters']:,}" in done.output
    assert f"{plan['memory']['total'] / 2**20:,.2f}" in done.output
    parts = plan["memory"].items()
    assert sum(size for name, size in parts if name != "total" and "checkpointing" not in name) == plan["memory"]["total"]


@pytest.mark.slow
def test_a_gpu_of_a_given_size(path):
    assert "Fits" in run(path, "--gpu-memory", 24).output
    small = run(path, "--gpu-memory", 0.3)
    assert "Does not fit" in small.output
    assert "What would fit:\n  - a larger GPU" in small.output  # CUDA itself takes more


def test_find_budget(path, tmp_path):
    done = run(path, "--find-budget", 0.5, "--json", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["rank"] for row in rows} >= {4}
    for row in rows:
        assert f"{row['parameters']:,}" in done.output


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"base_model": "nobody/nothing"}, [], ["base_model: 'nobody/nothing'", "What works"]),
        ({"adapter": "lora", "qtha": None, "lora_r": 8}, [], ["adapter: 'lora'", "adapter: qtha"]),
        ({"qtha": {"rnak": 4}}, [], ["qtha.rnak: (int, value not shown)", "`rank`"]),
        ({"load_in_4bit": True, "load_in_8bit": True}, [], ["load_in_4bit, load_in_8bit"]),
        ({"qtha": {"param_budget": 0.0001}}, [], ["qtha.param_budget: 0.0001", "`param_budget: "]),
        ({}, ["--find-budget", "7"], ["qtha.param_budget: 7.0", "0.24"]),
        ({}, ["--gpu-memory", "-1"], ["--gpu-memory"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_are_one_line_and_no_traceback(tmp_path, changes, arguments, words):
    done = run(write_run(tmp_path, CONFIGS["llama"], **changes), *arguments)
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit), done.exception
    for word in words:
        assert word in done.output
    assert "Traceback" not in done.output


def test_no_such_file(tmp_path):
    done = run(tmp_path / "nothing.yml")
    assert done.exit_code == 2
    assert "does not exist" in done.output


def test_help_names_every_option():
    done = run("--help")
    for option in ("--json", "--find-budget", "--gpu-memory", "No weights are downloaded or loaded"):
        assert option in " ".join(done.output.split())
