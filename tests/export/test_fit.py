"""Fitting the surrogates of whole models, against fits made by hand from what the adapters see."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from axolotl_qtha.export import fit
from axolotl_qtha.export.distil import distilled
from axolotl_qtha.export.measure import measure
from axolotl_qtha.trained.calibration_text import Batch
from axolotl_qtha.trained.passes import Pass, adapters_of

from ..export_models import sequences, text_pass
from ..models import adapted, gpt2, llama, logits, qwen2, tokens, train


def seen(model, text):
    """Return z and what the branch adds to h, (N, r) each, of every adapter: from hooks, sequence by sequence without padding."""
    found = {}

    def hook(name, adapter):
        def look(_, inputs):
            z = F.linear(inputs[0], adapter.fold_a()).flatten(0, -2)
            q = adapter.bottleneck().branch(z) @ adapter.effective("w_q").T
            rest = q * (z @ adapter.effective("w_c").T) if adapter.config.quantum == "qwthn" else q
            found.setdefault(name, []).append((z, rest))

        return adapter.register_forward_pre_hook(look)

    hooks = [hook(name, adapter) for name, adapter in adapters_of(model).items()]
    with torch.no_grad():
        for sequence in text:
            model(input_ids=torch.tensor([sequence.ids]))
    for one in hooks:
        one.remove()
    return {name: [torch.cat(part).numpy() for part in zip(*parts, strict=True)] for name, parts in found.items()}


@pytest.mark.parametrize("quantum", ["qtha", "silu", "sine", "frozen", "product", "qwthn"])
@pytest.mark.parametrize("constant", [True, False])
def test_the_fit_is_that_of_the_tokens_without_padding(quantum, constant):
    model = train(adapted(llama(), quantum=quantum))
    moments, rows = fit.collect(text_pass(model))
    assert rows == {}  # RMSNorm
    for name, (z, rest) in seen(model, sequences()).items():
        adapter = adapters_of(model)[name]
        got = fit.linear(adapter, moments[name], constant)
        columns = np.hstack([z, np.ones((len(z), 1))]) if constant else z
        weights = np.linalg.lstsq(columns.astype(np.float64), rest.astype(np.float64), rcond=None)[0]
        known = np.zeros((4, 4)) if quantum == "qwthn" else adapter.effective("w_c").detach().numpy()
        expected = (known + weights[:4].T) @ adapter.fold_a().detach().numpy()
        # float32 z and h in both; a few hundred tokens in four directions
        np.testing.assert_allclose(got.rows.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        if constant:
            np.testing.assert_allclose(got.constant.numpy(), weights[4], rtol=1e-3, atol=1e-5)
        else:
            assert got.constant is None


def test_a_linear_adapter_is_exported_exactly():
    model = train(adapted(qwen2(), quantum="none"))
    expected = logits(model)
    layers = {name: fit.exact(adapter) for name, adapter in adapters_of(model).items()}
    with fit.replaced(adapters_of(model), layers):
        assert (logits(model) - expected).abs().max() <= 1e-5
    assert torch.equal(logits(model), expected)


def test_layers_after_a_layernorm_with_a_bias_can_carry_a_constant():
    base = gpt2()
    for norm in (module for module in base.modules() if isinstance(module, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.weight, 1, 0.2)
        torch.nn.init.normal_(norm.bias)
    model = train(adapted(base, target_modules=["c_attn", "c_proj", "c_fc"]))
    run = text_pass(model)
    moments, rows = fit.collect(run)
    assert {name.rsplit(".", 1)[-1] for name in rows} == {"c_attn", "c_fc"}  # c_proj sees no norm
    errors = []

    def observer(name, tokens):
        if name not in rows:
            return
        errors.append((tokens.x @ rows[name] - 1).abs().max())
        fitted = fit.linear(run.adapters[name], moments[name], constant=True)
        carried, biased = fitted.low_rank(rows[name]), fitted.low_rank()
        assert (len(carried.a), len(biased.a), carried.bias) == (5, 4, None)
        torch.testing.assert_close(carried(tokens.x), biased(tokens.x), rtol=1e-3, atol=1e-4)

    run.observe(observer, "testing")
    assert len(errors) > 0
    assert max(errors) < 1e-3  # sums of 48 float32 numbers that cancel


def test_a_layernorm_whose_row_is_not_constant_is_left_alone():
    base = gpt2()  # its biases are zero, so that the row would be infinite
    model = train(adapted(base, target_modules=["c_attn"]))
    assert fit.collect(text_pass(model))[1] == {}


def test_the_model_computes_the_same_while_it_is_watched_and_after():
    model = train(adapted(llama()))
    expected = logits(model)
    got = []
    mask = torch.ones_like(tokens(), dtype=torch.bool)
    run = Pass(model, adapters_of(model), lambda: [Batch(tokens(), tokens(), mask)], 1)
    model.register_forward_hook(lambda _m, _i, output: got.append(output.logits))
    run.observe(lambda name, tokens: None, "testing")
    torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-6)
    with pytest.raises(KeyError):
        run.observe(lambda name, tokens: {}[name], "testing")
    assert torch.equal(logits(model), expected)
    assert not any("forward" in adapter.__dict__ for adapter in run.adapters.values())


def kl(model, layers, others=None):
    return measure(text_pass(model, sequences(seed=2)), layers, others or {}).models


@pytest.mark.slow
def test_each_surrogate_is_better_than_the_one_before():
    model = train(adapted(llama(), target_modules=["q_proj", "v_proj", "down_proj"]), steps=12)
    text = sequences(count=200)
    run = text_pass(model, text, most=256)
    moments, _ = fit.collect(run)
    start = {name: fit.linear(adapter, moments[name], constant=False) for name, adapter in run.adapters.items()}
    without = {
        name: fit.Fitted(fitted.b, fit.classical(run.adapters[name]) @ fit.cpu(run.adapters[name].fold_a())).low_rank()
        for name, fitted in start.items()
    }
    wide = fit.wide(run, start, 4 * 2**30)
    linear = {name: fitted.low_rank() for name, fitted in start.items()}
    models = kl(
        model,
        linear,
        {
            "wide": {name: fitted.low_rank() for name, fitted in wide.items()},
            "none": without,
            "distilled": distilled(run, linear),
        },
    )
    assert models["export"].kl < models["none"].kl
    assert models["wide"].kl < models["export"].kl
    assert models["distilled"].kl < models["export"].kl
    assert models["qtha"].kl == 0
    assert models["base"].kl > models["export"].kl
    assert models["export"].top1 >= models["base"].top1


def test_a_small_memory_takes_more_passes_and_gives_the_same():
    model = train(adapted(llama(), target_modules=["q_proj", "down_proj"]))
    run = text_pass(model)
    moments, _ = fit.collect(run)
    start = {name: fit.linear(adapter, moments[name], constant=True) for name, adapter in run.adapters.items()}
    passes = []
    run.batches, plain = lambda: passes.append(1) or plain(), run.batches
    once = fit.wide(run, start, 2**30)
    assert len(passes) == 1
    each = fit.wide(run, start, 1)
    assert len(passes) == 1 + len(start)
    for name in start:
        # the sums are the same but for float32 matmuls, which the eigenvectors of small eigenvalues magnify
        torch.testing.assert_close(once[name].rows, each[name].rows, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(once[name].constant, each[name].constant, rtol=1e-3, atol=1e-3)


def test_distilling_leaves_the_adapter_as_it_was():
    model = train(adapted(llama(), target_modules=["v_proj"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = text_pass(model)
    layers = {name: fit.linear(adapter, fit.collect(run)[0][name], True).low_rank() for name, adapter in run.adapters.items()}
    after = distilled(run, layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not torch.equal(after[name].b, layers[name].b) and after[name].bias is not None for name in layers)
    assert not any(tensor.requires_grad for layer in after.values() for tensor in (layer.a, layer.b, layer.bias))
