"""Adapters on quantised bases: no-op start, gradients, saving, what stays frozen, and what is refused."""

import weakref
import zlib

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_qtha.tuner.layer import QTHALinear
from axolotl_qtha.tuner.quantised import keep_trainable

from ..models import FILE, QUANTUM, SIZES, adapted, adapters, gpt2, gradients, llama, logits, tokens, train, trainable
from ..quantised import FOUR_BIT, INPUTS_TOO, KINDS, READABLE, dequantised, frozen, gptq, hqq, quantised, weight_of

# bitsandbytes turns 4-bit weights into another form at the first forward in eval mode, on such CPUs
repacking = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks weights on CPUs with AVX512-BF16 only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


def base_logits(folder, kind, training):
    """Return the logits of the base without adapters, loaded afresh and kept from repacking its weights."""
    base = quantised(folder, kind)
    keep_trainable(base)
    return logits(base.train(training))


# ---- the start ----


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("init", ["kaiming", "tt_svd"])
@pytest.mark.parametrize("quantum", [quantum for quantum in QUANTUM if quantum != "product"])  # which starts as `qtha` does
@pytest.mark.parametrize("kind", KINDS)
def test_starts_bitwise_as_the_quantised_base(folder, kind, quantum, init, training):
    if init == "tt_svd" and kind not in READABLE:
        pytest.skip(f"{kind} cannot be read back, which tt_svd refuses")
    expected = base_logits(folder, kind, training)
    model = adapted(quantised(folder, kind), quantum=quantum, init=init).train(training)
    assert len(adapters(model)) == 14
    assert torch.equal(logits(model), expected)
    train(model, steps=1)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_is_every_layer_but_the_head(folder, kind):
    names = set(adapters(adapted(quantised(folder, kind), target_modules="all-linear")))
    assert names == {
        name for name, module in llama().named_modules() if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


@pytest.mark.parametrize(("kind", "quantise"), [("hqq", hqq), ("gptq", gptq)])
def test_a_quantised_head_is_left_out_too(folder, kind, quantise):
    model = quantised(folder, kind)
    torch.manual_seed(0)
    model.lm_head = head = quantise(nn.Linear(48, 96, bias=False))
    model = adapted(model, target_modules="all-linear")
    assert model.base_model.model.lm_head is head
    assert len(adapters(model)) == 14


def test_transposed_layers_in_four_bits(tmp_path):
    gpt2().save_pretrained(tmp_path)
    expected = base_logits(tmp_path, "nf4", training=False)
    model = adapted(quantised(tmp_path, "nf4"), init="tt_svd")
    assert {type(layer.base_layer) for layer in layers(model).values()} == {bitsandbytes.nn.Linear4bit}
    assert torch.equal(logits(model), expected)
    assert all(gradient.isfinite().all() for gradient in gradients(train(model)).values())


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QTHALinear)}


# ---- training ----


def on_full_precision(folder, kind, model):
    """Return the same adapter on a base of the numbers that the quantised one stands for."""
    reference = adapted(dequantised(quantised(folder, kind)), target_modules=list(adapters(model)))
    for name, parameter in trainable(reference).items():
        parameter.data.copy_(trainable(model)[name].data)
    return reference.train(model.training)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantised_base(folder, kind):
    model = train(adapted(quantised(folder, kind)).train())
    found, expected = gradients(model), gradients(on_full_precision(folder, kind, model))
    assert sum("angles" in name for name in found) == 14
    for name, gradient in found.items():
        assert gradient.isfinite().all()
        assert gradient.any()
        # the same products in float32; 8-bit scales are multiplied in at another place (6e-6 measured)
        assert (gradient - expected[name]).abs().max() <= 5e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_stays_bitwise_through_training_and_evaluation(folder, kind):
    before = frozen(quantised(folder, kind))
    model = adapted(quantised(folder, kind), target_modules=["q_proj", "v_proj", "down_proj"])
    for _ in range(3):
        logits(model.eval())
        train(model.train(), steps=1)
    logits(model.eval())
    assert all(gradient.isfinite().all() for gradient in gradients(model.train()).values())
    after = frozen(model)
    assert after.keys() == before.keys()
    assert len(before) > 30
    for name, stored in before.items():
        assert torch.equal(after[name], stored), name
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "qtha_adapter" not in name)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_gradient_checkpointing_gives_the_same_gradients(folder, kind, use_reentrant):
    model = train(adapted(quantised(folder, kind))).train()
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()  # reentrant kind: needs backward()
    for name, parameter in trainable(model).items():
        # the same operations on the same numbers, summed in the same order
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_a_bfloat16_base_gets_float32_adapters(folder, kind):
    model = adapted(quantised(folder, kind, torch.bfloat16)).train()
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert torch.equal(logits(model), logits(quantised(folder, kind, torch.bfloat16).train()))
    found = gradients(train(model))
    assert logits(model).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "torchao 2"])
def test_compiled_transformer_matches(folder, kind):
    model = train(adapted(quantised(folder, kind), target_modules=["q_proj", "down_proj"]).train())
    expected, expected_gradients = logits(model), gradients(model)
    # traced forward and backward as for the default backend, whose C++ takes a minute to build for a whole transformer
    model.compile(backend="aot_eager")
    assert (logits(model) - expected).abs().max() <= 1e-5  # float32 rounding
    for name, gradient in gradients(model).items():
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("kind", INPUTS_TOO)
def test_training_is_refused_where_the_base_passes_no_gradient_on(folder, kind):
    model = adapted(quantised(folder, kind)).train()
    assert logits(model).isfinite().all()  # good enough to run
    with pytest.raises(ValueError, match=r"passes no gradient on \(Linear with \w+Tensor\).*What works: a weight-only"):
        gradients(model)


# ---- saving, loading, merging ----


@pytest.mark.parametrize("kind", KINDS)
def test_reloaded_on_quantised_and_full_precision_bases(folder, kind, tmp_path):
    model = train(adapted(quantised(folder, kind)).train()).eval()
    model.save_pretrained(tmp_path)
    assert all(".qtha_adapter." in name for name in load_file(tmp_path / FILE))
    again = PeftModel.from_pretrained(quantised(folder, kind), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    full = logits(PeftModel.from_pretrained(llama(), tmp_path).eval())
    difference = (full - logits(model)).abs().max().item()
    print(f"{kind}: full precision minus quantised, largest logit difference {difference:.4f}")
    with again.disable_adapter():
        rounding = (logits(again) - logits(llama())).abs().max().item()
    # what quantising does to the base alone (0.004 in 8 bits, 0.14 in 4), which the adapter may amplify
    assert 0 < difference <= 5 * rounding


@pytest.mark.parametrize("quantum", ["none", "qtha"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_and_changes_nothing(folder, kind, quantum):
    model = train(adapted(quantised(folder, kind), quantum=quantum).train()).eval()
    stored, expected = frozen(model), logits(model)
    reason = "the base is quantised" if quantum == "none" else "(the base is quantised|which is not linear)"
    for merge in (model.merge_adapter, model.merge_and_unload, *(layer.merge for layer in layers(model).values())):
        with pytest.raises(ValueError, match=rf"{reason}.*What works"):
            merge()
    after = frozen(model)
    assert all(torch.equal(after[name], value) for name, value in stored.items())
    assert torch.equal(logits(model), expected)


def test_merging_is_refused_where_one_layer_alone_is_quantised(folder):
    base = quantised(folder, "nf4")
    base.set_submodule("model.layers.0.self_attn.q_proj", nn.Linear(48, 48, bias=False))  # comes first and could be merged
    model = train(adapted(base, quantum="none").train())
    weight = layers(model)["base_model.model.model.layers.0.self_attn.q_proj"].base_layer.weight
    before = weight.clone()
    with pytest.raises(ValueError, match="the base is quantised"):
        model.merge_adapter()
    assert torch.equal(weight, before)


# ---- initial values from the weights ----


@pytest.mark.parametrize("kind", READABLE)
def test_tt_svd_sees_the_dequantised_weight(folder, kind):
    base = quantised(folder, kind)
    weights = {name: weight_of(layer) for name, layer in base.named_modules()}
    model = adapted(base, init="tt_svd")
    assert len(adapters(model)) == 14
    for name, adapter in adapters(model).items():
        weight = weights[name].detach().float()
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        seed = adapter.config.seed + zlib.crc32(name.encode())
        expected = QTHALinear(layer, "default", adapter.config, seed).qtha_adapter["default"].state_dict()
        for key, value in adapter.state_dict().items():
            assert torch.equal(value, expected[key]), (name, key)


def test_tt_svd_is_refused_for_weights_that_cannot_be_read(folder):
    with pytest.raises(ValueError, match=r"qtha.init: 'tt_svd' reads the frozen weights.*What works: `init: kaiming`"):
        adapted(quantised(folder, "gptq"), init="tt_svd")


class Dequantised(TorchDispatchMode):
    """Counts the weights that bitsandbytes has dequantised and that are still in memory."""

    def __init__(self):
        super().__init__()
        self.weights, self.most = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "dequantize_4bit" in str(function):
            self.weights.append(weakref.ref(result))
            self.most = max(self.most, self.alive())
        return result

    def alive(self):
        return sum(weight() is not None for weight in self.weights)


def test_tt_svd_dequantises_one_layer_at_a_time(folder):
    base = quantised(folder, "nf4")
    with Dequantised() as counted:
        model = adapted(base, init="tt_svd")
    assert len(counted.weights) == len(adapters(model)) == 14
    assert counted.most == 1
    assert counted.alive() == 0


# ---- bitsandbytes' form for inference on CPUs ----


def even(tmp_path):
    """Save a Llama of sizes that bitsandbytes can repack, and return the folder."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64)).save_pretrained(tmp_path)
    return tmp_path


def repacked(model):
    """Return for each 4-bit layer whether it is in the form for inference."""
    return {
        name: getattr(module.weight.quant_state, "packing_format_for_cpu", False)
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


@repacking
def test_a_base_already_repacked_is_refused(tmp_path):
    base = quantised(even(tmp_path), "nf4")
    logits(base.eval())
    assert all(repacked(base).values())
    with pytest.raises(ValueError, match=r"q_proj: bitsandbytes has repacked.*What works: add the adapter to a freshly"):
        adapted(base)
    assert not layers(base)


@repacking
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_an_adapted_base_is_never_repacked(tmp_path, kind):
    model = adapted(quantised(even(tmp_path), kind))
    logits(model.eval())
    assert len(repacked(model)) == 7
    assert not any(repacked(model).values())
    assert all(gradient.isfinite().all() for gradient in gradients(model.train()).values())
