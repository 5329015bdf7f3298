"""How rates are chosen and methods paired: made-up results of several seeds and budgets."""

import pytest

from axolotl_qtha.bench.suite import results
from axolotl_qtha.bench.suite.execution import Execution, count
from axolotl_qtha.bench.suite.spec import Cell, repeats, search
from axolotl_qtha.bench.suite.summary import summary, write_summary
from axolotl_qtha.bench.suite.table import differences, entries

from .test_spec import suite

METRICS = {"rouge1": 10.0, "rouge2": 1.0, "rougeL": 9.0, "bleu4": 0.5}


def make(folder, **changes):
    settings = {"adapters": ["lora", "lora-equal", "qtha"], "ranks": [8], "budgets": [0.24], "tasks": ["domain"]}
    return Execution(suite(folder, output_dir=str(folder / "out"), **{**settings, **changes}))


def put(execution, cell, *losses, status="success", parameters=None):
    """Write a result whose validation losses are at steps 0, 5, 10."""
    metrics = [{"step": 5 * number, "valid loss": loss} for number, loss in enumerate(losses)]
    info = {"status": status, "metrics": metrics, "error_msg": "", "test loss": losses[-1], "test": METRICS}
    if parameters is not None:
        info["num_trainable_params"] = parameters
    job = execution.job(cell, 1)
    results.write(results.make(job.cell, job.settings, job.config, info, "now"), execution.result_path(cell))


def method_of(execution, adapter):
    return next(method for method in execution.sizes if method.adapter == adapter)


def text_of(execution):
    return summary(execution, entries(execution), "axolotl qtha-bench suite.yml")


def test_all_seeds_choose(tmp_path):
    """A rate that is the best at the first seed alone is not chosen, and one that diverged at a seed is the last."""
    execution = make(tmp_path, select="all_seeds", adapters=["lora", "qtha"], learning_rates=[0.01, 0.02, 0.04])
    assert count(execution.suite) == len(search(execution.suite)) == 2 * 3 * 3
    lora, qtha = method_of(execution, "lora"), method_of(execution, "qtha")
    for rate, losses in {0.01: (3.0, 3.5, 3.5), 0.02: (3.1, 3.1, 3.1), 0.04: (1.0, 1.0, None)}.items():
        for method in (lora, qtha):
            for seed, loss in zip(execution.suite.seeds, losses, strict=True):
                put(execution, Cell("domain", method, rate, seed), 4.0, loss or 9.0, status="success" if loss else "diverged")
    assert execution.chosen() == {("domain", lora): 0.02, ("domain", qtha): 0.02}
    assert repeats(execution.suite, execution.chosen()) == []
    text = text_of(execution)
    assert "the one with the least validation loss over all seeds was run at 3 seeds" in text
    assert "- lora, r 8, learning rate 0.04: 1 of 3 diverged; not chosen." in text
    assert "(edge)" not in text


def test_the_first_seed_chooses(tmp_path):
    execution = make(tmp_path)
    lora = method_of(execution, "lora")
    put(execution, Cell("domain", lora, 0.01, 3), 4.0, 3.0)
    put(execution, Cell("domain", lora, 0.02, 3), 4.0, 9.0, status="diverged")
    assert execution.chosen() == {("domain", lora): 0.01}
    assert count(execution.suite) == 3 * (2 + 2)
    assert "- lora, r 8, learning rate 0.02: 1 of 1 diverged; not chosen." in text_of(execution)


def run_all(execution, losses):
    """Write results of every seed at the second rate, and worse ones of the first."""
    for cell in search(execution.suite):
        put(execution, cell, 4.0, 3.9, 3.8 if cell.learning_rate == 0.01 else losses[cell.method.adapter][0])
    for method in execution.sizes:
        for seed, loss in zip(execution.suite.seeds, losses[method.adapter], strict=True):
            put(execution, Cell("domain", method, 0.02, seed), 4.0, loss + 0.1, loss)


def test_differences_by_step(tmp_path):
    execution = make(tmp_path, adapters=["lora", "qtha"])
    run_all(execution, {"lora": (3.0, 3.1, 3.2), "qtha": (3.0, 3.2, 3.1)})
    (difference,) = differences(entries(execution))
    steps = difference.by_step()
    assert list(steps) == [0, 5, 10]
    assert (steps[0].mean, steps[0].half) == (0, 0)
    # of 0, 0.1, -0.1: t(2) = 4.303, standard error 0.1 / sqrt(3)
    assert (steps[10].mean, steps[10].half) == pytest.approx((0, 0.2484), abs=1e-4)
    text = text_of(execution)
    assert "| validation loss after steps | 0 | 5 | 10 |" in text
    assert "| qtha, r 8, 0.24 - lora, r 8 | +0.000 ± 0.000 | " in text
    assert "± 0.248 (not told apart: the interval includes zero)" in text


def test_one_seed_claims_no_interval(tmp_path):
    execution = make(tmp_path, seeds=[3], adapters=["lora", "qtha", "mpo-only"])
    run_all(execution, {"lora": (3.0,), "qtha": (2.5,), "mpo-only": (2.4,)})
    text = text_of(execution)
    assert "±" not in text.split("##", 1)[1]
    assert "less LoRA's **met**: -0.500\n" in text
    assert "against mpo-only (QTHA without a circuit; 17,408 parameters): one seed: no interval." in text


def test_lora_of_the_size_of_each_budget(tmp_path):
    execution = make(tmp_path, budgets=[0.24, 0.5])
    sizes = {method.label: size.parameters for method, size in execution.sizes.items()}
    for budget in ("0.24", "0.5"):
        assert 0 <= sizes[f"lora-equal, r 8, {budget}"] - sizes[f"qtha, r 8, {budget}"] < sizes["lora, r 8"] / 8
    pairs = {
        (d.ours.method.label, d.other.method.label) for d in differences(entries(execution)) if "equal" in d.other.method.label
    }
    assert pairs == {(f"qtha, r 8, {budget}", f"lora-equal, r 8, {budget}") for budget in ("0.24", "0.5")}


def test_parameters_are_those_of_the_runs(tmp_path):
    execution = make(tmp_path, adapters=["lora", "qtha"])
    lora = method_of(execution, "lora")
    put(execution, Cell("domain", lora, 0.01, 3), 4.0, 3.0, parameters=12345)
    found = {entry.method.adapter: entry.parameters for entry in entries(execution)}
    assert found == {"lora": 12345, "qtha": execution.sizes[method_of(execution, "qtha")].parameters}


def test_variants_are_compared_with_lora_and_with_qtha(tmp_path):
    variants = {"slow": {"circuit_lr": 0.001}, "bonds": {"bond_dim": 4, "mid_dim": 8}}
    execution = make(tmp_path, adapters=["lora", "qtha", "mpo-only"], variants=variants)
    for number, cell in enumerate(search(execution.suite)):
        put(execution, cell, 4.0, 3.5, 3.0 + 0.01 * number)
    for key, rate in execution.chosen().items():
        for seed in execution.suite.seeds[1:]:
            put(execution, Cell(*key, rate, seed), 4.0, 3.5, 3.0)
    pairs = {(d.ours.method.adapter, d.other.method.adapter) for d in differences(entries(execution))}
    to_lora = {(name, "lora") for name in ("qtha", "mpo-only", *variants)}
    assert pairs == to_lora | {("qtha", "mpo-only"), ("slow", "qtha"), ("bonds", "qtha")}
    text = write_summary(execution, "axolotl qtha-bench suite.yml").read_text()
    assert "| slow, r 8, 0.24 - qtha, r 8, 0.24 |" in text
    assert '`bonds` QTHA with {"bond_dim": 4, "mid_dim": 8}' in text
