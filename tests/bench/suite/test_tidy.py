"""results.csv, comparisons.csv and results.json: what is in them is what the results say."""

import csv
import json
import subprocess

import pytest

from axolotl_qtha.bench.suite import results, tidy
from axolotl_qtha.bench.suite.comparisons import comparisons
from axolotl_qtha.bench.suite.spec import Cell, search
from axolotl_qtha.bench.suite.summary import summary
from axolotl_qtha.bench.suite.table import entries

from .test_table import METRICS, make, method_of, put, run_all

LOSSES = {"lora": (3.0, 3.1, 3.25), "qtha": (3.01, 3.2, 3.1)}


@pytest.fixture
def execution(tmp_path):
    made = make(tmp_path, adapters=["lora", "qtha"])
    run_all(made, LOSSES)
    put(made, Cell("domain", method_of(made, "qtha"), 0.02, 8), 4.0, 9.0, status="diverged")
    results.write_lines([{"answer": "größer", "rouge1": float("nan")}], made.predictions_path(first(made)))
    return made


def first(execution):
    return Cell("domain", method_of(execution, "qtha"), 0.02, 3)


@pytest.fixture
def written(execution):
    write(execution)
    return execution.folder


def write(execution):
    tidy.write(execution, comparisons(entries(execution)), "axolotl qtha-bench suite.yml")


def text_of(execution):
    return summary(execution, entries(execution), "axolotl qtha-bench suite.yml")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_run_and_figure(execution, written):
    rows = read(written / tidy.RUNS)
    figures = ["valid loss", "test loss", *METRICS, *tidy.COSTS]
    assert [row["metric"] for row in rows[: len(figures)]] == figures
    assert len(rows) == 2 * (2 + 2) * len(figures)  # two adapters, two rates at the first seed, two more seeds
    found = {(row["adapter"], float(row["learning_rate"]), int(row["seed"]), row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    for adapter, losses in LOSSES.items():
        for seed, loss in zip((3, 5, 8), losses, strict=True):
            row = found[adapter, 0.02, seed, "valid loss"]
            lost = (adapter, seed) == ("qtha", 8)
            assert row["value"] == ("" if lost else repr(loss))  # in full
            assert row["status"] == ("diverged" if lost else "success")
            assert (row["unit"], row["task"], row["rank"], row["chosen"]) == ("nats a token", "domain", "8", "True")
    assert found["lora", 0.01, 3, "valid loss"]["chosen"] == "False"
    assert found["lora", 0.02, 3, "bleu4"]["unit"] == "x 100"
    assert found["lora", 0.02, 3, "train_time"]["unit"] == "seconds"
    assert (found["lora", 0.02, 3, "bleu4"]["value"], found["lora", 0.02, 3, "bleu4"]["budget"]) == ("0.5", "")
    sizes = {row["adapter"]: (int(row["parameters"]), row["budget"]) for row in rows}
    assert sizes == {"lora": (74752, ""), "qtha": (17920, "0.24")}
    kept = {row["predictions"] for row in rows}
    assert kept == {"", f"predictions/{first(execution).name}.jsonl"}
    assert json.loads((written / max(kept)).read_text()) == {"answer": "größer", "rouge1": None}


def test_lora_of_equal_size_has_a_rank_of_its_own(tmp_path):
    made = make(tmp_path)
    equal = Cell("domain", method_of(made, "lora-equal"), 0.01, 3)
    put(made, equal, 4.0, 3.0)
    (ranks,) = {(row.suite_rank, row.rank, row.parameters) for row in tidy.rows(made, tidy.runs_of(made))}
    assert ranks == (8, 2, 18688)


def test_the_json_has_the_same_and_says_where_it_comes_from(execution, written):
    whole = json.loads((written / tidy.ALL).read_text())
    rows, pairs = read(written / tidy.RUNS), read(written / tidy.PAIRS)
    for name, table in (("runs", rows), ("comparisons", pairs)):
        assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in whole[name]] == table
    assert "all paired differences of the validation loss" in whole["family"]
    (made_by,) = whole["made_by"]
    assert made_by["runs"] == 8
    assert {"python", "torch", "transformers", "peft", "axolotl", "qiskit", "qiskit-aer"} <= set(made_by["package_info"])
    assert whole["suite"]["learning_rates"] == [0.01, 0.02]
    assert str(execution.folder) not in (written / tidy.ALL).read_text()


def test_the_pairs(execution):
    put(execution, Cell("domain", method_of(execution, "qtha"), 0.02, 8), 4.0, 3.3)
    write(execution)
    (pair,) = read(execution.folder / tidy.PAIRS)
    assert (pair["adapter"], pair["other"], pair["seeds"], pair["margin"]) == ("qtha", "lora", "3", "")
    assert (int(pair["parameters"]), int(pair["other_parameters"])) == (17920, 74752)
    assert float(pair["difference"]) == pytest.approx((0.01 + 0.1 + 0.05) / 3)
    assert pair["p"] == pair["p_holm"]  # the only one
    assert pair["verdict"] == "not told apart (the interval includes zero)"


def test_results_of_earlier_versions_are_read(execution):
    """They name no commit and no predictions."""
    for path in (execution.folder / "results").iterdir():
        result = json.loads(path.read_text())
        del result["meta_info"]["source_info"]
        path.write_text(json.dumps(result))
    execution.predictions_path(first(execution)).unlink()
    text = text_of(execution)
    write(execution)
    assert "commit" not in text
    assert "predictions/" not in text
    assert {(row["commit"], row["predictions"]) for row in read(execution.folder / tidy.RUNS)} == {("", "")}


def test_runs_of_several_versions_are_told(execution):
    path = execution.result_path(first(execution))
    result = json.loads(path.read_text())
    result["meta_info"]["package_info"]["torch"] = "2.0"
    path.write_text(json.dumps(result))
    text = text_of(execution)
    assert "**The runs were not all made alike**" in text
    assert "- 1 runs: " in text
    assert sorted(each["runs"] for each in tidy.versions(tidy.runs_of(execution))) == [1, 7]


def test_who_pays_is_in_no_file(tmp_path):
    ibm = {"backend": "fake:manila", "instance": "Zq83-planted"}
    variant = {"quantum_backend": "ibm", "ibm": ibm}
    made = make(tmp_path, adapters=["lora"], ranks=[4], variants={"device": variant}, learning_rates=[0.01])
    for cell in search(made.suite):
        put(made, cell, 4.0, 3.0)
        assert made.keys(cell).get("qtha", {}).get("ibm", ibm) == ibm, "the run itself has it"
    write(made)
    (made.folder / "summary.md").write_text(text_of(made))
    files = [path for path in made.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} > {tidy.ALL, tidy.RUNS, tidy.PAIRS, "summary.md"}
    assert not [path.name for path in files if "planted" in path.read_text()]


def git(folder, *line):
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *who, *line], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_clone(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "of another repository"))
    results.source.cache_clear()
    assert results.source(tmp_path) == {}, "no clone"
    monkeypatch.delenv("GIT_DIR")
    git(tmp_path, "init", "-q")
    results.source.cache_clear()
    assert results.source(tmp_path) == {}, "no commit yet"
    (tmp_path / "a.py").write_text("a = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "a")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "of another repository"))
    head = subprocess.run(["git", "--git-dir", str(tmp_path / ".git"), "rev-parse", "HEAD"], capture_output=True, text=True)
    (tmp_path / "results.txt").write_text("not in git")
    results.source.cache_clear()
    assert results.source(tmp_path) == {"commit": head.stdout.strip(), "dirty": False}
    (tmp_path / "a.py").write_text("a = 2\n")
    results.source.cache_clear()
    assert results.source(tmp_path)["dirty"] is True
    run = {"meta_info": {"source_info": results.source(tmp_path)}}
    assert tidy.commit(run) == head.stdout.strip() + "+"
    results.source.cache_clear()
