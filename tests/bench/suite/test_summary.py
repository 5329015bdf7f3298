"""The summary says what the results say: made-up ones, whose means and verdicts are known."""

import json

import pytest

from axolotl_qtha.bench.suite import results
from axolotl_qtha.bench.suite.cell import curve, diverged
from axolotl_qtha.bench.suite.execution import Execution
from axolotl_qtha.bench.suite.spec import Cell, search
from axolotl_qtha.bench.suite.summary import summary, write_summary
from axolotl_qtha.bench.suite.table import differences, entries
from axolotl_qtha.settings.args import QTHABlock

from .test_spec import suite

ADAPTERS = ["lora", "lora-equal", "qtha", "mpo-only", "silu", "frozen", "product"]
# Validation loss of each adapter at its best rate, seed 3; the others are 0.01 and 0.02 higher.
LOSSES = {"lora": 3.0, "lora-equal": 3.3, "qtha": 3.1, "mpo-only": 3.1, "silu": 3.0, "frozen": 3.4, "product": 3.1}


def info(loss, status="success", error=""):
    metrics = [{"step": 0, "valid loss": 4.0}, {"step": 1, "train loss": 3.9}, {"step": 10, "valid loss": loss}]
    return {
        "status": status,
        "error_msg": error,
        "metrics": metrics if status != "failed" else [],
        "train_time": 7.0,
        "total_time": 8.0,
        "cpu_memory_max": 2**20,
        "test loss": loss + 0.5,
        "test": {"rouge1": 10.0, "rouge2": 1.0, "rougeL": 9.0, "bleu4": 0.5},
    }


@pytest.fixture
def execution(tmp_path):
    made = Execution(
        suite(tmp_path, output_dir=str(tmp_path / "out"), tasks=["domain"], adapters=ADAPTERS, ranks=[8], budgets=[0.24])
    )
    for cell in search(made.suite):
        # the second rate is the better one
        put(made, cell, LOSSES[cell.method.adapter] + (0.3 if cell.learning_rate == 0.01 else 0.0))
    for method in made.sizes:
        for number, seed in enumerate(made.suite.seeds[1:], 1):
            put(made, Cell("domain", method, 0.02, seed), LOSSES[method.adapter] + 0.01 * number)
    return made


def put(execution, cell, loss, **changes):
    job = execution.job(cell, 1)
    results.write(results.make(job.cell, job.settings, job.config, info(loss, **changes), "now"), execution.result_path(cell))


def text_of(execution):
    return summary(execution, entries(execution), "axolotl qtha-bench suite.yml")


def row(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start}"))


def test_figures_and_verdicts(execution):
    text = text_of(execution)
    # mean of 3.1, 3.11, 3.12; t(2) = 4.303, standard error 0.01 / sqrt(3)
    assert "| 0.02 (edge) | 3.110 ± 0.025 | 3.610 ± 0.025 | 10.00 ± 0.00 |" in row(text, "qtha, r 8, 0.24 |")
    assert "24.0%" in row(text, "qtha, r 8, 0.24 |")
    assert (
        "- domain, qtha, r 8, 0.24: 24.0% of LoRA's parameters; validation loss less LoRA's **not met**: +0.100 ± 0.000" in text
    )
    assert "Lower than LoRA of the same size with an interval that excludes zero: domain." in text
    assert (
        "qtha, r 8, 0.24 (17,920 parameters) against mpo-only (QTHA without a circuit; 17,408 parameters): validation loss "
        "+0.000 ± 0.000 (p 1.000, after Holm's correction 1.000); the two are **not told apart**." in text
    )
    assert "against silu (QTHA with a classical" in text
    assert (
        "validation loss +0.100 ± 0.000 (p < 0.001, after Holm's correction < 0.001); the trained circuit **raises** it." in text
    )
    assert (
        "validation loss -0.300 ± 0.000 (p < 0.001, after Holm's correction < 0.001); the trained circuit **lowers** it." in text
    )
    assert "against product (QTHA with a trained circuit without entangling gates; 17,792 parameters)" in text
    assert row(text, "qtha, r 8, 0.24 - product").endswith("| 1.000 | 1.000 | not told apart (the interval includes zero) |")
    assert "no difference (" not in text
    assert "Of 4 such intervals 0.2 would exclude zero by chance" in text
    assert "rouge1: F1 of words" in text


def test_the_training_loss_is_that_of_the_last_tenth_of_the_steps(execution):
    assert row(text_of(execution), "qtha, r 8, 0.24 |").split(" | ")[-3] == "3.900 ± 0.000"
    assert "The training loss is that of the last tenth of the steps." in text_of(execution)
    losses = [{"step": step, "train loss": float(step)} for step in range(1, 31)]
    made = {"train_info": {"status": "success", "metrics": losses}}
    assert results.final(made, "train loss") == 29.0, "the mean of 28, 29 and 30"
    made["train_info"]["metrics"] = [{"step": 0, "valid loss": 3.0}]
    assert results.final(made, "train loss") is None


def test_the_files_beside_it(execution):
    text = write_summary(execution, "axolotl qtha-bench suite.yml").read_text()
    for picture in ("pareto", "costs", "curves-domain"):
        assert f"]({picture}.png)" in text
        for kind, start in {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}.items():
            assert (execution.folder / f"{picture}.{kind}").read_bytes().startswith(start)
    for file in ("results.csv", "comparisons.csv", "results.json"):
        assert f"`{file}`" in text
        assert (execution.folder / file).stat().st_size > 0


def test_a_diverged_seed_is_told_and_no_mean_is_claimed(execution):
    method = next(method for method in execution.sizes if method.adapter == "qtha")
    put(execution, Cell("domain", method, 0.02, 5), float("nan"), status="diverged", error="NaN")
    text = text_of(execution)
    assert "| 1 of 3 diverged |" in row(text, "qtha, r 8, 0.24 |")
    assert "3.11" not in row(text, "qtha, r 8, 0.24 |")
    assert "**not known**, runs are missing or diverged" in text
    assert "against mpo-only (QTHA without a circuit; 17,408 parameters): not known: runs are missing or diverged." in text
    assert "3.010 ± 0.025" in row(text, "lora, r 8 |"), "the others keep theirs"


def test_failed_and_missing_runs_are_told(execution):
    methods = {method.adapter: method for method in execution.sizes}
    put(execution, Cell("domain", methods["silu"], 0.02, 5), 0, status="failed", error="RuntimeError: no memory")
    execution.result_path(Cell("domain", methods["silu"], 0.02, 8)).unlink()
    assert "| 1 of 3 failed, 1 of 3 not run |" in row(text_of(execution), "silu, r 8, 0.24 |")


def test_a_rate_that_diverged_is_not_chosen_and_one_that_did_not_is(execution):
    method = next(method for method in execution.sizes if method.adapter == "lora")
    put(execution, Cell("domain", method, 0.02, 3), 0.1, status="diverged")
    assert execution.chosen()["domain", method] == 0.01
    put(execution, Cell("domain", method, 0.01, 3), 0.1, status="diverged")
    assert ("domain", method) not in execution.chosen()
    assert "| 1 of 3 diverged, 2 of 3 not run |" in row(text_of(execution), "lora, r 8 |")


def test_test_sets_choose_nothing(execution):
    before = execution.chosen()
    for cell in search(execution.suite):
        path = execution.result_path(cell)
        result = json.loads(path.read_text())
        result["train_info"]["test loss"] = -cell.learning_rate
        path.write_text(json.dumps(result))
    assert execution.chosen() == before


def test_pairs_are_by_task_rank_and_budget(execution):
    pairs = {(d.ours.method.adapter, d.other.method.adapter) for d in differences(entries(execution))}
    assert pairs == {(name, "lora") for name in ADAPTERS if name != "lora"} | {
        ("qtha", name) for name in ("lora-equal", "mpo-only", "silu", "frozen", "product")
    }


def test_without_results(tmp_path):
    empty = Execution(suite(tmp_path, output_dir=str(tmp_path / "out"), tasks=["domain"]))
    with pytest.raises(ValueError, match="holds no results"):
        write_summary(empty, "axolotl qtha-bench suite.yml")


# Results on disk.


def test_a_result_is_the_same_after_reading_and_has_no_nan(tmp_path):
    made = results.make({"adapter": "qtha", "task": "domain", "rank": 8}, "ab", {"a": 1}, info(float("inf")), "now")
    path = tmp_path / "deep" / "result.json"
    results.write(made, path)
    found = results.read(path)
    assert found["train_info"]["metrics"][-1]["valid loss"] is None
    assert results.final(found, "valid loss") == 4.0, "the last finite one"
    assert found["run_info"]["total_time"] == 8.0
    assert {"run_info", "train_info", "meta_info"} <= set(found)
    assert set(tmp_path.iterdir()) == {path.parent}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no result of a suite"),
        ("[]", "is no result of a suite"),
        ('{"schema_version": 1}', "is no result of a suite"),
        ('{"schema_version": 0, "train_info": {"status": "success"}}', r"is of version 0, this is version 1.*--overwrite"),
    ],
)
def test_results_of_others_are_refused(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        results.read(tmp_path / "a.json")


def test_results_of_other_settings_are_refused(execution, tmp_path):
    other = suite(tmp_path, **{**execution.suite.model_dump(), "max_steps": 11})
    with pytest.raises(ValueError, match=r"was run with other settings.*What works: another output_dir, or `--overwrite`"):
        Execution(other).open(search(other))


def test_results_of_other_defaults_are_refused(execution, monkeypatch):
    """A version of this package with another `core_gain` trains another adapter with the same YAML; LoRA does not change."""
    cells = {adapter: [cell for cell in search(execution.suite) if cell.method.adapter == adapter] for adapter in ADAPTERS}
    monkeypatch.setattr(QTHABlock.model_fields["core_gain"], "default", "balanced")
    for adapter in ("qtha", "mpo-only"):
        with pytest.raises(ValueError, match=r"was run with other settings, or other defaults of axolotl-qtha"):
            execution.open(cells[adapter])
    assert execution.open(cells["lora"]) == []


def test_what_is_done_is_not_done_again_but_what_failed_is(execution):
    cells = search(execution.suite)
    assert execution.open(cells) == []
    put(execution, cells[0], 0, status="failed")
    put(execution, cells[1], 9.0, status="diverged")
    assert execution.open(cells) == [cells[0]]


def test_errors_are_kept_without_local_paths():
    text = results.error_text(RuntimeError("cannot open /home/me/data/x.jsonl, see https://example.org/a/b"))
    assert text == "RuntimeError: cannot open PATH, see https://example.org/a/b"


# Losses of a run.


def test_curve_is_the_log_by_step():
    log = [
        {"step": 0, "eval_loss": 4.0},
        {"step": 1, "loss": 3.9, "qtha/wrapped": 0.1, "qtha/quantum_share/layer_0": 1.0},
        {"step": 2, "loss": "3.8", "grad_norm": 1.0},
        {"step": 2, "eval_loss": 3.7},
        {"step": 2, "train_runtime": 1.0},
    ]
    assert curve(log, {1: 0.5, 2: 1.5}) == [
        {"step": 0, "valid loss": 4.0},
        {"step": 1, "train loss": 3.9, "qtha/wrapped": 0.1, "qtha/quantum_share/layer_0": 1.0, "seconds": 0.5},
        {"step": 2, "train loss": 3.8, "valid loss": 3.7, "seconds": 1.5},
    ]


@pytest.mark.parametrize(
    ("first", "last", "loss", "why"),
    [
        (4.0, 3.0, 3.0, ""),
        (4.0, 4.5, 3.0, ""),
        (4.0, 5.5, 3.0, "valid loss of 5.50 at the end, 4.00 at the start"),
        (4.0, 3.0, float("nan"), "train loss of nan at step 1"),
    ],
)
def test_divergence(first, last, loss, why):
    rows = [{"step": 0, "valid loss": first}, {"step": 1, "train loss": loss}, {"step": 2, "valid loss": last}]
    assert diverged(rows) == why
