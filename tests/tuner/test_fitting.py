"""`mpo: auto` and `share: {layers: auto}`: as few layers share as keep to param_budget."""

import json

import pytest
import torch
from peft import PeftModel

from axolotl_qtha.tuner.config import QTHAConfig
from axolotl_qtha.tuner.fitting import fitted, settle
from axolotl_qtha.tuner.layer import adapted_sizes
from axolotl_qtha.tuner.share import LayerSize, Share, owned
from axolotl_qtha.tuner.sizes import count_lora_parameters, count_parameters, resolve
from axolotl_qtha.tuner.targets import select_targets

from ..models import adapted, llama, logits, train, trainable

# Of one layer of SmolLM2-135M, (in_features, out_features).
SMOLLM2 = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}
SIZES = {f"layers.{k}.{name}": LayerSize(*size) for k in range(30) for name, size in SMOLLM2.items()}


def auto(inputs=True, **settings):
    return QTHAConfig(**{"mpo": "none", "share": {"layers": "auto", "inputs": inputs}, **settings})


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("budget", [None, 0.5, 0.12])
@pytest.mark.parametrize("quantum", ["none", "qtha"])
def test_one_group_more_is_above_the_budget(quantum, budget, inputs):
    settings = auto(inputs, quantum=quantum, param_budget=budget)
    limit = (budget or 0.24) * count_lora_parameters(8, SIZES.values())
    share = fitted(settings, SIZES)
    assert count_parameters(settings, owned(share, SIZES).values()) <= limit
    assert share.inputs is inputs
    more = Share.in_groups(round(30 / share.layers) + 1, 30, inputs)
    assert count_parameters(settings, owned(more, SIZES).values()) > limit


def test_counts_of_smollm2_by_hand():
    """A of q, k, v and of gate, up are one; the 30 layers are in eight groups. W_Q and the angles go with A."""
    share = fitted(auto(quantum="none"), SIZES)
    assert share == Share(layers=30 / 8, inputs=True) == fitted(auto(), SIZES)
    a, b = 8 * (576 + 576 + 576 + 1536), 8 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)
    assert count_parameters(auto(quantum="none"), owned(share, SIZES).values()) == 8 * (a + b) + 210 * 64 == 554_112
    assert count_parameters(auto(), owned(share, SIZES).values()) == 554_112 + 8 * 4 * (64 + 64)


def test_without_one_that_was_asked_for_all_layers_share_where_nothing_is_small_enough():
    narrow = {f"layers.{k}.q_proj": LayerSize(32, 32) for k in range(3)}
    assert fitted(auto(inputs=False, rank=32), narrow).layers == 3
    with pytest.raises(ValueError, match=r"qtha\.param_budget: 0\.1 cannot be met at rank 32 .* What works: a smaller rank"):
        fitted(auto(inputs=False, rank=32, param_budget=0.1), narrow)


def test_a_model_has_and_saves_the_number(tmp_path):
    model = train(adapted(llama(5), **vars_of(param_budget=0.6)))
    layers = model.peft_config["default"].share.layers
    assert layers == 5 / 3
    made = sum(tensor.numel() for tensor in trainable(model).values())
    assert made == count_parameters(model.peft_config["default"], adapted_sizes(model))
    assert made <= 0.6 * count_lora_parameters(4, adapted_sizes(model))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["share"] == {"layers": layers, "inputs": True}
    again = PeftModel.from_pretrained(llama(5), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def settled(sizes=SIZES, **settings):
    """Return what is made of a configuration that leaves the form to the budget."""
    config = QTHAConfig(**settings)
    assert config.mpo == "auto"
    settle(config, sizes)
    return config.mpo, config.share


@pytest.mark.parametrize(
    ("settings", "count"), [({}, 8), ({"quantum": "none"}, 8), ({"param_budget": 0.5}, 17), ({"rank": 32}, 7)]
)
def test_a_form_that_is_left_open_is_full_matrices_that_layers_share(settings, count):
    share = Share.in_groups(count, 30, inputs=True)
    assert settled(**settings) == ("none", share)
    assert fitted(auto(**settings), SIZES) == share  # as where it was asked for


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ({"layers.0.o_proj": LayerSize(576, 576)}, {}),  # nothing to share with
        ({f"layers.{k}.o_proj": LayerSize(576, 576 * (k + 1)) for k in range(4)}, {}),  # other sizes
        ({f"layers.{k}.o_proj": LayerSize(576, 576, rank=8 - k) for k in range(4)}, {}),  # other ranks
        ({f"layers.{k}.o_proj": LayerSize(48, 48) for k in range(2)}, {"quantum": "none"}),  # above the budget
        (SIZES, {"rank": 64, "param_budget": 0.01}),
    ],
)
def test_and_tensor_networks_where_layers_cannot_share_or_not_within_the_budget(sizes, settings):
    assert settled(sizes, **settings) == ("tt", None)


@pytest.mark.parametrize("rank", [8, 37])  # 37 qubits are too many for a circuit
def test_controls_have_the_form_of_the_circuit(rank):
    sizes = {f"layers.{k}.{name}": LayerSize(*size) for k in range(4) for name, size in SMOLLM2.items()}
    controls = ("none", "silu", "sine", "frozen", "product", "qwthn") if rank == 8 else ("none",)
    lora = count_lora_parameters(rank, sizes.values())
    full = count_parameters(
        QTHAConfig(rank=rank, mpo="none", quantum="silu"), owned(Share(layers=4, inputs=True), sizes).values()
    )
    for budget, form in ((1.001 * full / lora, "none"), (0.999 * full / lora, "tt")):
        for quantum in controls:
            assert settled(sizes, rank=rank, quantum=quantum, param_budget=budget)[0] == form, quantum


def test_layers_on_several_devices_share_nothing():
    model = llama(2)
    model.model.layers[1].to("meta")
    config = QTHAConfig(rank=4, param_budget=0.9)
    select_targets(config, model)
    assert (config.mpo, config.share) == ("tt", None)
    select_targets(config := QTHAConfig(rank=4, param_budget=0.9), llama(2))
    assert config.mpo == "none"
    assert config.share


@pytest.mark.parametrize("settings", [{"bond_dim": 4}, {"mid_dim": 8}, {"num_cores": 3}, {"init": "tt_svd"}], ids=str)
def test_keys_of_tensor_networks_ask_for_them(settings):
    assert QTHAConfig(**settings).mpo == "tt"


def test_what_is_shared_says_of_what():
    assert QTHAConfig(share={"layers": "auto"}).mpo == "none"
    assert QTHAConfig(share={"layers": 4}).mpo == QTHAConfig(share={"inputs": True}).mpo == "tt"


def vars_of(**settings):
    """Return settings of `tests.models.adapted` for full matrices that share."""
    return {"mpo": "none", "share": {"layers": "auto", "inputs": True}, "quantum": "none", **settings}


def test_tensor_networks_have_their_bond_from_the_budget():
    with pytest.raises(ValueError, match=r"qtha\.share: .*auto.* is by param_budget, .* What works: `mpo: none`"):
        QTHAConfig(share={"layers": "auto"}, mpo="tt")


@pytest.mark.parametrize("layers", [0, "all", True])
def test_no_number(layers):
    with pytest.raises(ValueError, match=r"qtha\.share\.layers: .* is no number from 1 on, nor `auto`"):
        Share.model_validate({"layers": layers})


def test_full_matrices_keep_to_a_budget_that_is_set():
    settings = QTHAConfig(mpo="none", param_budget=0.24, quantum="none", share={"layers": 4, "inputs": True})
    sizes = list(owned(settings.share, SIZES).values())
    assert resolve(settings, sizes) is settings
    with pytest.raises(ValueError, match=r"qtha\.param_budget: 0\.2 is not kept to with `mpo: none` and `share: .*layers: auto"):
        resolve(settings.changed(param_budget=0.2), sizes)
    with pytest.raises(ValueError, match=r"0\.24 is not kept to with `mpo: none`: "):
        resolve(QTHAConfig(mpo="none", param_budget=0.24), list(SIZES.values()))
