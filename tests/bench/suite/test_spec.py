"""The suite's YAML: what it stands for, and what it refuses."""

import re

import pytest
import yaml

from axolotl_qtha.bench.suite.adapters import ADAPTERS, settings
from axolotl_qtha.bench.suite.execution import Execution, without_paths
from axolotl_qtha.bench.suite.spec import Method, read_suite, repeats, search
from axolotl_qtha.errors import PrivateSettings

from ...e2e.commands import QUICKSTART

SUITE = {
    "output_dir": "out",
    "base_model": str(QUICKSTART / "base"),
    "tasks": ["domain", "arithmetic"],
    "adapters": ["lora", "lora-equal", "qtha", "lora-circuit"],
    "ranks": [4, 8],
    "budgets": [0.24, 0.4],
    "learning_rates": [0.01, 0.02],
    "seeds": [3, 5, 8],
    "max_steps": 10,
}


def suite(folder, **changes):
    path = folder / "suite.yml"
    raw = {key: value for key, value in {**SUITE, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(raw))
    return read_suite(path)


def test_the_runs_of_a_suite(tmp_path):
    found = suite(tmp_path)
    methods = found.methods()
    assert [method.name for method in methods] == [
        "lora--r4",
        "lora--r8",
        "lora-equal--r4-b0.24",
        "lora-equal--r4-b0.4",
        "lora-equal--r8-b0.24",
        "lora-equal--r8-b0.4",
        "qtha--r4-b0.24",
        "qtha--r4-b0.4",
        "qtha--r8-b0.24",
        "qtha--r8-b0.4",
        "lora-circuit--r4",
        "lora-circuit--r8",
    ]
    cells = search(found)
    assert len(cells) == 2 * 12 * 2
    assert {cell.seed for cell in cells} == {3}
    more = repeats(found, {("domain", methods[0]): 0.02, ("arithmetic", methods[6]): 0.01})
    assert [cell.name for cell in more] == [
        "domain--lora--r4--lr0.02--s5",
        "domain--lora--r4--lr0.02--s8",
        "arithmetic--qtha--r4-b0.24--lr0.01--s5",
        "arithmetic--qtha--r4-b0.24--lr0.01--s8",
    ]
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapters": ["lora", "qhta"]}, r"adapters: 'qhta' is no adapter. What works: `qtha`"),
        ({"tasks": ["domian"]}, r"tasks: 'domian' is no task. What works: `domain`"),
        ({"tasks": []}, r"tasks: \[\]: List should have at least 1 item"),
        ({"seeds": [1, 1]}, r"seeds: 1 is named twice"),
        ({"seeds": [-1]}, r"seeds.0: -1: Input should be greater than or equal to 0"),
        ({"learning_rates": [0.0]}, r"learning_rates.0: 0.0: Input should be greater than 0"),
        ({"learning_rates": [float("inf")]}, r"learning_rates.0: inf: Input should be a finite number"),
        ({"budgets": [24]}, r"budgets.0: 24: Input should be less than or equal to 1"),
        ({"ranks": [True]}, r"ranks.0: True: Input should be a valid integer"),
        ({"equivalence_margin": True}, r"equivalence_margin: True is no number of nats.*`equivalence_margin: 0.02`"),
        ({"equivalence_margin": 0}, r"equivalence_margin: 0: Input should be greater than 0"),
        ({"equivalence_margin": -0.02}, r"equivalence_margin: -0.02: Input should be greater than 0"),
        ({"equivalence_margin": 2}, r"equivalence_margin: 2: Input should be less than or equal to 1"),
        ({"equivalence_margin": float("nan")}, r"equivalence_margin: nan: Input should be a finite number"),
        ({"equivalence_margin": "small"}, r"equivalence_margin: 'small': Input should be a valid number"),
        ({"max_steps": None}, r"max_steps: Field required"),
        ({"steps": 3}, r"'steps' is no key of a suite. What works: .*`max_steps`"),
        ({"settings": {"seed": 3}}, r"settings: 'seed' is set by the suite for each run"),
        ({"variants": {"slow": {"circiut_lr": 1e-3}}}, r"variants: slow: .*circiut_lr.*What works: `circuit_lr`"),
        ({"variants": {"slow": {"num_cores": 0}}}, r"variants: slow, at rank 4: .*num_cores: 0"),
        ({"variants": {"slow": {"rank": 2}}}, r"variants: slow: 'rank' is set .*`ranks: \[2\]` of the.*`rank: 2 \* rank`\.$"),
        ({"variants": {"wide": {"rank": "1.1 * rank"}}}, r"variants: .*'1\.1 \* rank' is 4\.4 at rank 4\. What works: "),
        ({"variants": {"wide": {"rank": "rank * 2"}}}, r"variants: wide: 'rank' is set by the .*`rank: 2 \* rank`"),
        ({"variants": {"a": {"quantum_backend": "aer", "noise_model": "fake:manila"}}}, r"variants: a, at rank 8: qtha.noise_"),
        ({"variants": {"a": {"qubits": 8}}}, r"variants: a, at rank 4: qtha.qubits: 8 does not divide rank 4.*`qubits: 4`"),
        ({"variants": {"qtha": {"alpha": 2}}}, r"variants: 'qtha' is an adapter's name"),
        ({"variants": {"a--b": {"alpha": 2}}}, r"variants.*a--b"),
        ({"tasks": [{"name": "mine", "train": {}, "test": {}}]}, r"tasks.0.validation: Field required"),
    ],
)
def test_refused(tmp_path, changes, words):
    with pytest.raises((ValueError, PrivateSettings), match=words):
        suite(tmp_path, **changes)


@pytest.mark.parametrize("text", ["- a\n", "a: [", "just words"])
def test_files_that_are_no_suite(tmp_path, text):
    path = tmp_path / "suite.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"What works: a suite, see example_configs/bench/"):
        read_suite(path)


def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_run(tmp_path):
    with pytest.raises(ValueError, match=r"param_budget: 0.01 cannot be met at rank 8.*What works"):
        Execution(suite(tmp_path, budgets=[0.01], ranks=[8]))


def test_a_rank_that_qtha_cannot_have_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"^qtha, at rank 13: qtha.rank: 13 is neither .*What works: `rank: 12` or") as error:
        Execution(suite(tmp_path, ranks=[13], adapters=["lora", "qtha"]))
    assert "pydantic" not in str(error.value)
    works = Execution(suite(tmp_path, ranks=[13], adapters=["lora", "product"], budgets=[0.4]))
    assert len(works.sizes) == 2, "circuits of one qubit go with any rank"


def test_keys_of_a_run(tmp_path):
    execution = Execution(suite(tmp_path, settings={"micro_batch_size": 3, "warmup_steps": 1}, evaluations=3))
    qtha = next(cell for cell in search(execution.suite) if cell.method.adapter == "qtha")
    keys = execution.keys(qtha)
    assert keys["qtha"] == {
        "rank": 4,
        "alpha": 8,
        "target_modules": execution.suite.target_modules,
        "quantum": "qtha",
        "param_budget": 0.24,
    }
    assert keys["micro_batch_size"] == 3
    assert (keys["seed"], keys["learning_rate"], keys["max_steps"], keys["eval_steps"]) == (3, 0.01, 10, 4)
    equal = next(cell for cell in search(execution.suite) if cell.method == Method("lora-equal", 8, 0.24))
    assert execution.keys(equal)["lora_r"] == 2
    assert settings("dora", 8, None, ["q_proj"])["peft_use_dora"]
    assert "param_budget" not in settings("lora-circuit", 8, None, ["q_proj"])["qtha"]
    assert {settings(name, 4, None, [])["adapter"] for name in ADAPTERS} == {"lora", "qtha"}


def test_variants_are_qtha_with_other_keys(tmp_path):
    variants = {
        "attention": {"target_modules": ["q_proj", "v_proj"], "param_budget": 0.5},
        "bonds": {"bond_dim": 4, "mid_dim": 8, "quantum": "none"},
        "slow": {"circuit_lr": 1e-3, "alpha": 4},
    }
    execution = Execution(suite(tmp_path, adapters=["lora", "qtha"], variants=variants, ranks=[8]))
    assert [method.name for method in execution.sizes if method.adapter in variants] == [
        "attention--r8",
        "bonds--r8",
        "slow--r8-b0.24",
        "slow--r8-b0.4",
    ]
    keys = {cell.method.name: execution.keys(cell) for cell in search(execution.suite)}
    assert keys["slow--r8-b0.4"]["qtha"] | {"quantum": "qtha"} == keys["qtha--r8-b0.4"]["qtha"] | variants["slow"]
    assert keys["attention--r8"]["qtha"] == {"rank": 8, "alpha": 16, **variants["attention"]}
    assert keys["attention--r8"]["adapter"] == "qtha"


def test_a_variant_of_twice_the_rank_has_the_size_of_the_others(tmp_path):
    """The budget of one that has another rank is still a share of LoRA at the rank of the run."""
    variants = {"wide": {"rank": "2 * rank", "mpo": "tt", "quantum": "none"}}
    made = Execution(suite(tmp_path, adapters=["lora"], variants=variants, ranks=[4, 8], budgets=[0.4]))
    for cell in search(made.suite):
        if (method := cell.method).adapter == "wide":
            wanted = {"rank": 2 * method.rank, "alpha": 4 * method.rank, "param_budget": 0.2, "mpo": "tt", "quantum": "none"}
            assert made.keys(cell)["qtha"].items() >= wanted.items()
            assert made.sizes[method].rank == 2 * method.rank
            lora = next(size for other, size in made.sizes.items() if (other.adapter, other.rank) == ("lora", method.rank))
            assert 0.2 * lora.parameters < made.sizes[method].parameters <= 0.4 * lora.parameters
    assert settings("qtha", 29, 0.01, [])["qtha"]["param_budget"] == 0.01  # 0.01 * 29 / 29 is not


def test_a_variant_is_checked_at_the_ranks_of_the_suite(tmp_path):
    """A device of five qubits has room for the circuits of rank 4, not of rank 8, the default of the block."""
    noisy = {"quantum_backend": "aer", "noise_model": "fake:manila", "shots": 256}
    execution = Execution(suite(tmp_path, ranks=[4], variants={"noisy": noisy}))
    cell = next(cell for cell in search(execution.suite) if cell.method.adapter == "noisy")
    assert execution.keys(cell)["qtha"].items() >= {"rank": 4, **noisy}.items()
    with pytest.raises(ValueError, match=r"at rank 8: .*'fake:manila' has 5 qubits, the circuit 8") as error:
        suite(tmp_path, ranks=[4, 8], variants={"noisy": noisy})
    assert ": :" not in str(error.value)


def test_settings_are_recorded_without_local_paths(tmp_path):
    recorded = without_paths({"a": str(tmp_path), "b": [{"path": "/home/me/data/x.jsonl"}], "c": "org/model", "d": 1e-3})
    assert recorded == {"a": "/".join(tmp_path.parts[-2:]), "b": [{"path": "data/x.jsonl"}], "c": "org/model", "d": 1e-3}
    assert not re.search("home", str(recorded))


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"rank": 4}, "qtha: 'rank' is set by the suite. What works: `ranks` of the suite, and no `rank` here."),
        ({"param_budget": 0.2}, "qtha: 'param_budget' is set by the suite. What works: `budgets`"),
        ({"circuit_layers": 0}, "qtha, at rank 4: "),
        ({"bond_dim": "rnak"}, "qtha, at rank 4: "),
    ],
)
def test_keys_of_all_that_cannot_work(tmp_path, block, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        suite(tmp_path, qtha=block)


def test_keys_of_all_are_of_those_that_have_a_use_for_them(tmp_path):
    common = {"circuit_layers": "rank", "bond_dim": 2, "mid_dim": 32}
    found = suite(tmp_path, qtha=common, adapters=["lora", "qtha", "mpo-only", "lora-circuit"], variants={"two": {"bond_dim": 3}})
    assert found.block("lora", 8) is None
    assert found.block("qtha", 8) == {"quantum": "qtha", "circuit_layers": 8, "bond_dim": 2, "mid_dim": 32}
    assert found.block("mpo-only", 8) == {"quantum": "none", "bond_dim": 2, "mid_dim": 32}
    assert found.block("lora-circuit", 4) == {"quantum": "qtha", "mpo": "none", "circuit_layers": 4}
    assert found.block("two", 4) == {"circuit_layers": 4, "bond_dim": 3, "mid_dim": 32}
    assert {method.budget for method in found.methods()} == {None}


def test_a_base_that_was_not_made_names_the_script_that_makes_it(tmp_path):
    (tmp_path / "make_base.py").touch()
    found = suite(tmp_path, base_model=str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"^base_model: .* has not been made\. What works: `python .*make_base\.py`"):
        Execution(found)
