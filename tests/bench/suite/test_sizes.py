"""The parameters a suite prints are those that are trained."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_qtha import QTHAConfig
from axolotl_qtha.bench.suite.adapters import ADAPTERS, QTHA, equal_rank, settings
from axolotl_qtha.bench.suite.execution import Execution
from axolotl_qtha.bench.suite.spec import search
from axolotl_qtha.tuner.sizes import count_lora_parameters

from ...e2e.commands import QUICKSTART
from .test_spec import suite

VARIANTS = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "param_budget": 0.5},
    "first": {"layers_to_transform": [0], "alpha": 4},
    "bonds": {"bond_dim": 4, "mid_dim": 8, "quantum": "none"},
    "learned": {"angle_scale": "learned", "circuit_lr": 0.1},
}


@pytest.fixture(scope="module")
def execution(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    return Execution(suite(folder, adapters=list(ADAPTERS), variants=VARIANTS, ranks=[8], budgets=[0.24]))


@pytest.mark.parametrize("adapter", sorted([*ADAPTERS, *VARIANTS]))
def test_counts_are_those_of_the_model(execution, adapter):
    method = next(method for method in execution.sizes if method.adapter == adapter)
    size = execution.sizes[method]
    keys = settings(adapter, size.rank, method.budget, execution.suite.target_modules, VARIANTS.get(adapter))
    if adapter in QTHA or adapter in VARIANTS:
        config = QTHAConfig(task_type="CAUSAL_LM", **{key: value for key, value in keys["qtha"].items() if key != "circuit_lr"})
    else:
        config = LoraConfig(
            r=keys["lora_r"],
            lora_alpha=keys["lora_alpha"],
            target_modules=keys["lora_target_modules"],
            use_dora=keys.get("peft_use_dora", False),
            task_type="CAUSAL_LM",
        )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(QUICKSTART / "base"), config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size.parameters


def test_budgets_are_kept_and_lora_equal_is_not_handicapped(execution):
    counts = {method.adapter: size.parameters for method, size in execution.sizes.items()}
    for adapter in ("qtha", "mpo-only", "silu", "sine", "frozen", "product", "qwthn"):
        assert counts[adapter] <= 0.24 * counts["lora"]
    assert counts["lora-equal"] >= counts["qtha"]


@pytest.mark.parametrize(("rank", "budget"), [(16, 0.24), (8, 0.01)], ids=["more qubits than there are", "too small a budget"])
def test_what_qtha_cannot_have_is_no_matter_of_pefts_adapters(tmp_path, rank, budget):
    execution = Execution(suite(tmp_path, adapters=["lora", "dora"], ranks=[rank], budgets=[budget]))
    assert [size.parameters for size in execution.sizes.values()] == [9344 * rank, 9344 * rank + 4864]


def test_the_authors_sizes_at_each_rank(tmp_path):
    """Keys of all, with the rank of the run: circuits and matrices are counted by hand, for the base's four layers."""
    common = {"bond_dim": 2, "mid_dim": 16, "num_cores": 4, "circuit_layers": "rank", "qubits": "rank", "angle_scale": "raw"}
    adapters = ["lora", "lora-equal", "qtha", "mpo-only", "silu"]
    made = Execution(suite(tmp_path, adapters=adapters, ranks=[4, 6], qtha=common, target_modules=["q_proj"]))
    counts = {(method.adapter, method.rank): size.parameters for method, size in made.sizes.items()}
    for rank in (4, 6):
        circuit = 4 * rank * rank + rank * rank  # angles of as many layers as qubits, and W_Q
        assert counts["qtha", rank] == counts["silu", rank] == counts["mpo-only", rank] + 4 * circuit
        assert counts["lora-equal", rank] >= counts["qtha", rank]
    # W_A and W_B of width 16, and W_C
    assert counts["mpo-only", 6] - counts["mpo-only", 4] == 4 * (2 * 16 * (6 - 4) + 6**2 - 4**2)
    keys = made.keys(search(made.suite)[-1])["qtha"]
    assert (keys["rank"], keys["circuit_layers"], keys["alpha"]) == (6, 6, 12)
    assert "param_budget" not in keys


def test_equal_rank():
    layers = [(10, 20), (30, 40)]
    assert count_lora_parameters(1, layers) == 100
    assert [equal_rank(parameters, layers) for parameters in (1, 100, 101, 250)] == [1, 1, 2, 3]
