"""`rank_pattern` and `alpha_pattern`: layers with a rank and alpha of their own."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.described import describe
from axolotl_qtha.tuner.layer import adapted_sizes
from axolotl_qtha.tuner.share import LayerSize
from axolotl_qtha.tuner.sizes import count_lora_parameters, count_parameters, resolve

from ..models import VARIANTS, adapted, adapters, config, llama, logits, train, trainable

PATTERNS = {"rank_pattern": {"k_proj": 1, r"layers\.1\..*": 12, "up_proj": 6}, "alpha_pattern": {"up_proj": 5.0, "o_proj": 32}}


def test_layers_have_the_ranks_and_alphas_that_lora_gives_them():
    ours = adapted(llama(), **PATTERNS)
    lora = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **PATTERNS))
    for name, adapter in adapters(ours).items():
        layer = lora.get_submodule(f"base_model.model.{name}")
        assert adapter.shape.rank == layer.r["default"]
        assert adapter.config.scaling == layer.scaling["default"]
        assert adapter.fold_a().shape == layer.lora_A["default"].weight.shape
        assert adapter.config.circuit_qubits == {1: 1, 4: 4, 6: 6, 12: 4}[adapter.shape.rank]
    assert len({id(adapter.config) for adapter in adapters(ours).values()}) == 7  # the diagnostics take such layers together


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_counted_is_what_is_made_and_trains_and_loads(variant, tmp_path):
    model = adapted(llama(), **PATTERNS, **variant)
    made = trainable(model)
    settings, sizes = model.peft_config["default"], adapted_sizes(model)
    assert count_parameters(settings, sizes) == sum(tensor.numel() for tensor in made.values())
    before = {name: tensor.detach().clone() for name, tensor in made.items()}
    train(model)
    assert not any(torch.equal(before[name], tensor) for name, tensor in made.items())
    model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == PATTERNS["rank_pattern"]
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_shared_tensors_are_those_of_layers_of_one_rank():
    model = train(adapted(llama(4), share={"layers": 2, "inputs": True}, rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 2}))
    found = adapters(model)
    q, k, v = (found[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    assert v.cores_a is q.cores_a
    assert k.cores_a is not q.cores_a
    assert count_parameters(model.peft_config["default"], adapted_sizes(model)) == sum(
        t.numel() for t in trainable(model).values()
    )
    with pytest.raises(ValueError, match=r"share.*layers.0.*layers.1.*rank_pattern gives different ranks.*no `layers:`"):
        adapted(llama(4), share={"layers": 2}, rank_pattern={r"layers\.1\..*q_proj": 2})


@pytest.mark.parametrize("budget", [0.24, 0.5])
def test_a_budget_counts_each_layer_s_rank(budget):
    sizes = [LayerSize(3584, 3584), LayerSize(3584, 512, rank=2), LayerSize(3584, 18944, rank=32)]
    settled = resolve(QTHAConfig(rank=8, mpo="tt", param_budget=budget, rank_pattern={"k_proj": 2, "up_proj": 32}), sizes)
    lora = 8 * 2 * 3584 + 2 * (3584 + 512) + 32 * (3584 + 18944)
    assert count_lora_parameters(8, sizes) == lora
    assert budget * lora * 0.9 < count_parameters(settled, sizes) <= budget * lora
    assert "rank 2 on 1 layer, rank 8 on 1 layer, rank 32 on 1 layer" in " ".join(describe(settled, sizes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q_porj": 2}}, "qtha.rank_pattern: {'q_porj': 2} matches no adapted layer.*What works: `q_proj`"),
        (
            {"alpha_pattern": {"k_proj": 2.0, "model.*k_proj": 3}},
            "qtha.alpha_pattern: {'model.*k_proj': 3} matches no adapted layer",
        ),
        (
            {"rank_pattern": {"q_proj": 0}},
            "qtha.rank_pattern: {'q_proj': 0} is no positive whole number.*`rank_pattern: {down_proj",
        ),
        ({"rank_pattern": {"q_proj": True}}, "qtha.rank_pattern: .* is no positive whole number"),
        ({"rank_pattern": {"q_proj(": 2}}, "qtha.rank_pattern: 'q_proj.' is neither .*regular expression"),
        ({"rank_pattern": ["q_proj"]}, "qtha.rank_pattern: .* is no dictionary"),
        (
            {"rank_pattern": {"q_proj": 6}, "qubits": 4},
            "qtha.rank_pattern: {'q_proj': 6} .*qtha.qubits: 4 does not divide rank 6",
        ),
        ({"rank_pattern": {"q_proj": 13}}, "qtha.rank_pattern: {'q_proj': 13} .*qtha.rank: 13 is neither"),
        (
            {"rank_pattern": {"q_proj": 2}, "quantum_backend": "ibm", "ibm": {"backend": "fake:manila"}},
            "qtha.rank_pattern: .*several sizes.*`quantum_backend: torch`",
        ),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "qtha.alpha_pattern: .* is no positive number"),
    ],
)
def test_bad_patterns_are_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}").replace("'(", r"'\(")):
        adapted(llama(), **settings)


def test_without_a_match_a_layer_has_the_configuration_itself():
    given = config(**PATTERNS)
    assert given.of_layer("model.layers.0.self_attn.q_proj") is given
    own = given.of_layer("model.layers.1.mlp.down_proj")
    assert (own.rank, own.alpha, own.mid_dim, own.rank_pattern) == (12, 16.0, 12, None)
    assert dataclasses.replace(given) == given
