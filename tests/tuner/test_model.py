"""The PEFT tuner on tiny transformers: no-op start, saving and loading, switching, merging, and what it refuses."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.layer import QTHALinear

from ..models import (
    BASES,
    FILE,
    QUANTUM,
    VARIANTS,
    adapted,
    adapters,
    config,
    gpt2,
    gradients,
    llama,
    logits,
    tokens,
    train,
    trainable,
)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_starts_bitwise_as_the_base_and_returns_to_it(base, variant):
    model = BASES[base]()
    expected = logits(model)
    model = adapted(model, **variant)
    assert torch.equal(logits(model), expected)
    train(model)
    assert (logits(model) - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize(("base", "per_layer"), [("llama", 7), ("qwen2", 7), ("gpt2", 4)])
def test_all_linear_leaves_out_the_output_head(base, per_layer):
    model = adapted(BASES[base]())
    assert len(adapters(model)) == 2 * per_layer
    assert not any("lm_head" in name or "embed" in name for name in adapters(model))
    assert all("qtha_adapter" in name for name in trainable(model))


def test_all_linear_leaves_out_what_is_trained_in_full():
    model = adapted(llama(), modules_to_save=["down_proj"])
    assert {name.rsplit(".", 1)[1] for name in adapters(model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
    }


# ---- training ----


@pytest.mark.parametrize("variant", [*VARIANTS, {"angle_scale": "learned"}], ids=str)
def test_no_parameter_is_dead(variant):
    model = adapted(llama(), **variant)
    largest = dict.fromkeys(trainable(model), 0.0)
    for _ in range(3):
        for name, gradient in gradients(model).items():
            largest[name] = max(largest[name], gradient.abs().max().item())
        train(model, steps=1)
    assert not [name for name, size in largest.items() if size == 0]


@pytest.mark.parametrize("gate_order", ["2025-05", "2025-06"])
def test_no_angle_is_dead_but_the_last_ring_of_2025_05(gate_order):
    model = train(adapted(llama(), gate_order=gate_order))
    angles = [gradient for name, gradient in gradients(model).items() if "angles" in name]
    assert len(angles) == 14
    for gradient in angles:
        gradient = gradient.view(-1, 4)
        assert gradient[:-1].ne(0).all()
        assert gradient[-1].ne(0).all() if gate_order == "2025-06" else gradient[-1].eq(0).all()


def test_frozen_angles_stay_and_are_saved(tmp_path):
    model = adapted(llama(), quantum="frozen")
    before = {name: adapter.angles.clone() for name, adapter in adapters(model).items()}
    train(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / FILE)
    for name, angles in before.items():
        assert torch.equal(adapters(model)[name].angles, angles)
        assert torch.equal(saved[f"base_model.model.{name}.qtha_adapter.angles"], angles)
    assert not any("angles" in name for name in trainable(model))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = train(adapted(llama())).train()
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()  # reentrant kind: needs backward()
    parameters = trainable(model)
    for name, gradient in expected.items():
        # the same operations on the same numbers, summed in the same order
        assert torch.equal(parameters[name].grad, gradient), name


@pytest.mark.slow
def test_compiled_transformer_matches():
    model = train(adapted(llama(layers=1)))
    expected, expected_gradients = logits(model), gradients(model)
    # traced forward and backward as for the default backend, whose C++ takes a minute to build for a whole transformer
    model.compile(backend="aot_eager")
    assert (logits(model) - expected).abs().max() <= 1e-5  # float32 rounding
    for name, gradient in gradients(model).items():
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-5, name


@pytest.mark.slow
def test_compiled_layer_matches():
    model = get_peft_model(Mixed(), QTHAConfig(rank=2, bond_dim=2, mid_dim=4, target_modules=["linear"]))
    parameters, x = list(trainable(model).values()), torch.randn(5, 6)
    torch.nn.init.normal_(adapters(model)["linear"].stored("mpo_b_1"), std=0.3)  # the core that starts at zero
    expected = model(x)
    compiled = torch.compile(model)(x)
    assert (compiled - expected).abs().max() <= 1e-5  # float32, fused and so rounded differently
    pairs = [torch.autograd.grad(result.square().sum(), parameters) for result in (compiled, expected)]
    assert all((found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max()) for found, wanted in zip(*pairs, strict=True))


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("quantum", QUANTUM)
def test_casting_the_whole_model(quantum, dtype):
    model = train(adapted(llama(), quantum=quantum))
    expected = logits(model)
    model.to(dtype)
    result = logits(model)
    assert result.dtype == dtype
    # bfloat16 keeps 8 bits, through two layers of some ten roundings each; float64 shows the rounding of float32
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_a_bfloat16_base_gets_float32_adapters():
    base = llama().bfloat16()
    expected = logits(base)
    model = adapted(base)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert torch.equal(logits(model), expected)
    assert logits(train(model)).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


def test_a_training_step_under_autocast():
    model = train(adapted(llama()))
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model)
    for name, gradient in mixed.items():
        assert gradient.dtype == torch.float32
        # 8 bits in every matrix product of the model
        assert (gradient - expected[name]).norm() <= 0.2 * expected[name].norm() + 1e-3, name


# ---- initial values ----


def test_the_seed_decides_and_layers_differ():
    first, second, other = (adapters(adapted(llama(), seed=seed)) for seed in (5, 5, 6))
    cores = [adapter.cores[:16] for adapter in first.values()]
    assert len(cores) > 5
    assert not any(torch.equal(a, b) for k, a in enumerate(cores) for b in cores[:k])
    for name, adapter in first.items():
        for key, value in adapter.state_dict().items():
            assert torch.equal(value, second[name].state_dict()[key])
            assert not torch.equal(value, other[name].state_dict()[key])


def test_tt_svd_sees_the_weight_of_each_layer():
    for base in (llama, gpt2):  # Conv1D keeps its weight transposed
        model = adapted(base(), init="tt_svd", bond_dim=10**6)
        for adapter, layer in [
            (layer.qtha_adapter["default"], layer) for layer in model.modules() if isinstance(layer, QTHALinear)
        ]:
            weight = layer.base_layer.weight.detach()
            weight = weight.T if base is gpt2 else weight
            # the leading of a flat spectrum are found only roughly: some directions mix, but none is far from the top
            gain = (weight @ adapter.fold_a().detach().T).norm(dim=0)
            values = torch.linalg.svdvals(weight)
            assert gain.min() > 0.8 * values[3]


# ---- quantum: none is linear ----


@pytest.mark.parametrize("mpo", ["tt", "none"])
@pytest.mark.parametrize("base", BASES)
def test_quantum_none_equals_lora(base, mpo):
    model = train(adapted(BASES[base](), quantum="none", mpo=mpo, alpha=6.0))
    targets = sorted(adapters(model))
    lora = get_peft_model(BASES[base](), LoraConfig(r=4, lora_alpha=6, target_modules=targets)).eval()
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            layer = lora.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.copy_(adapter.fold_a())
            layer.lora_B["default"].weight.copy_(adapter.fold_b() @ adapter.effective("w_c") / adapter.config.scaling)
    # the same products up to float32 rounding
    assert (logits(model) - logits(lora)).abs().max() <= 1e-5


@pytest.mark.parametrize("base", BASES)
def test_merging_quantum_none(base):
    model = train(adapted(BASES[base](), quantum="none"))
    expected, plain = logits(model), logits(BASES[base]())
    assert (expected - plain).abs().max() > 1e-3
    model.merge_adapter()
    assert (logits(model) - expected).abs().max() <= 1e-5  # float32 rounding
    model.unmerge_adapter()
    assert (logits(model) - expected).abs().max() <= 1e-5
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(BASES[base]())
    assert not any("qtha" in name for name, _ in merged.named_modules())
    assert (logits(merged) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("quantum", [quantum for quantum in QUANTUM if quantum != "none"])
def test_merging_a_nonlinear_adapter_is_refused(quantum):
    model = train(adapted(llama(), quantum=quantum))
    expected, weights = logits(model), deepcopy(model.state_dict())
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=rf"`quantum: {quantum}`, which is not linear.*`?quantum: none"):
            merge()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("names", [None, ["default", "second"]])
@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_a_refused_merge_of_several_adapters_merges_none(how, names):
    model = train(adapted(llama(), quantum="none", target_modules=["q_proj"]))  # could be merged, and comes first
    model.add_adapter("second", config(quantum="silu", target_modules=["up_proj"]))
    if names is None:
        model.base_model.set_adapter(["default", "second"])
    weights = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not linear"):
        getattr(model, how)(adapter_names=names)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_unload_gives_the_base_back():
    base = llama()
    expected = logits(base)
    plain = train(adapted(base)).unload()
    assert torch.equal(logits(plain), expected)
    assert not any("qtha" in name for name, _ in plain.named_modules())


# ---- where adapters may go ----


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.image = nn.Conv2d(3, 6, 3)
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("out_proj", "attention.out_proj.*NonDynamicallyQuantizableLinear"),
        ("embedding", "embedding.*Embedding"),
        ("image", "image.*Conv2d"),
        ("attention", "attention.*MultiheadAttention"),
    ],
)
def test_modules_that_cannot_carry_an_adapter_are_named(target, named):
    model = Mixed()
    with pytest.raises(ValueError, match=rf"qtha.target_modules: '{named}, which cannot carry an adapter"):
        get_peft_model(model, QTHAConfig(rank=2, bond_dim=2, mid_dim=4, target_modules=["linear", target]))
    assert type(model.linear) is nn.Linear  # nothing was replaced


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["q_porj"], r"qtha.target_modules: 'q_porj' matches no module.*What works: `q_proj`"),
        (["q_proj", "v_prj"], r"qtha.target_modules: 'v_prj' matches no module.*What works:.*`v_proj`"),
        (["query_key_value"], r"'query_key_value' matches no module.*What works:.*`[a-z]+_proj`"),
        (r".*\.q_porj", r"matches no module.*What works:.*`q_proj`"),
        (["layers.7.self_attn.q_proj"], r"'layers.7.self_attn.q_proj' matches no module.*`q_proj`"),
        ([], r"qtha.target_modules.*names no module.*What works: `target_modules: all-linear`"),
    ],
)
def test_targets_that_match_nothing_are_refused(target_modules, message):
    base = llama()
    with pytest.raises(ValueError, match=message):
        adapted(base, target_modules=target_modules)
    assert not any(isinstance(module, QTHALinear) for module in base.modules())


def test_excluded_modules_are_left_out():
    model = adapted(llama(), exclude_modules=["down_proj", "k_proj"])
    assert {name.rsplit(".", 1)[1] for name in adapters(model)} == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    with pytest.raises(ValueError, match=r"qtha.exclude_modules: 'down_porj' matches no module.*`down_proj`"):
        adapted(llama(), exclude_modules=["down_porj"])
    with pytest.raises(ValueError, match=r"qtha.target_modules: \['q_proj'\] leaves no module"):
        adapted(llama(), target_modules=["q_proj"], exclude_modules=["q_proj"])


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "up_proj"]])
@pytest.mark.parametrize(("layers", "kept"), [([1], {"1"}), (0, {"0"}), ([0, 1], {"0", "1"})])
def test_layers_to_transform_is_honoured(target_modules, layers, kept):
    model = adapted(llama(), target_modules=target_modules, layers_to_transform=layers)
    assert {name.split(".")[2] for name in adapters(model)} == kept
    per_layer = 7 if target_modules == "all-linear" else 2
    assert len(adapters(model)) == per_layer * len(kept)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj"]])
@pytest.mark.parametrize(("layers", "missing"), [([0, 2], r"\[2\]"), ([5], r"\[5\]"), (2, r"\[?2\]?")])
def test_layers_that_do_not_exist_are_refused(target_modules, layers, missing):
    with pytest.raises(ValueError, match=rf"qtha.layers_to_transform: {missing} matches no .*layer.*What works: indices 0 to 1"):
        adapted(llama(), target_modules=target_modules, layers_to_transform=layers)


def test_names_of_targets_are_endings_not_parts():
    assert {name.split(".")[2] for name in adapters(adapted(llama(), target_modules=["0.mlp.up_proj"]))} == {"0"}
    model = adapted(llama(), target_modules=r".*\.1\.self_attn\.[qv]_proj")
    assert sorted(adapters(model)) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
