"""Serving without a merge: in eval mode without gradients an adapter is folded once, and gives the same numbers."""

from contextlib import nullcontext

import pytest
import torch

from axolotl_qtha.circuit.torch_engine import NonFiniteAngle
from axolotl_qtha.tuner.adapter import QTHAAdapter
from axolotl_qtha.tuner.fold_cache import folding_each_time

from ..decoding_models import generated, kept, one, trained, uncached
from ..models import QUANTUM, adapters, gradients, logits, tokens, train, trainable

MODES = [
    *[{"quantum": quantum, **more} for quantum in QUANTUM for more in ({}, {"mpo": "none"})],
    *[{"quantum": quantum, "angle_scale": scale} for quantum in ("qtha", "qwthn") for scale in ("raw", "learned")],
    {"rank": 1},
    {"core_gain": "none", "dropout": 0.1},
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Of an adapter's output, relative to the largest: the compiled engine takes the cosines of a few tokens from another library.
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14}


@pytest.fixture
def folds(monkeypatch):
    """Return the adapters that were folded, in order."""
    made, fold = [], QTHAAdapter._fold
    monkeypatch.setattr(QTHAAdapter, "_fold", lambda self, *args: made.append(self) or fold(self, *args))
    return made


# ---- the same numbers ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", MODES, ids=str)
def test_an_adapter_gives_the_same(settings, dtype, folds):
    module, x = one(**settings)
    module, x = module.to(dtype), x.to(dtype)
    folds.clear()
    with torch.no_grad():
        cached = [module(x) for _ in range(3)]
        assert len(folds) == 1
        with folding_each_time():
            expected = module(x)
        assert len(folds) == 2
    assert torch.equal(cached[0], cached[1])
    assert torch.equal(cached[1], cached[2])
    assert cached[0].dtype == expected.dtype == dtype
    if dtype == torch.bfloat16:  # float32 in between differs in its last bits, which may decide a rounding to bfloat16
        assert (cached[0] == expected).double().mean() > 0.95
        assert (cached[0] - expected).abs().max() <= 2**-6 * expected.abs().max()
    else:
        assert (cached[0] - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize("settings", [{}, {"quantum": "none"}, {"quantum": "silu"}, {"mpo": "none"}], ids=str)
def test_many_tokens_give_the_same_bits(settings):
    module, x = one(**settings)
    x = x.repeat(1, 40, 1)
    with torch.no_grad(), folding_each_time():
        expected = module(x)
    with torch.no_grad():
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_logits_and_generated_tokens_are_the_same(settings):
    model = trained(**settings)
    found, text = logits(model), generated(model)
    with folding_each_time():
        # an adapter's rounding, above, through two layers and the head
        assert (logits(model) - found).abs().max() <= 1e-5 * found.abs().max()
        assert torch.equal(generated(model), text)
    assert text.shape == (2, 19)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_of_a_cast_model_too(dtype):
    model = trained().to(dtype)
    # bfloat16: a rounding that falls the other way, 2**-8 of it, through two layers
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    expected = uncached(model)
    assert (logits(model) - expected).abs().max() <= tolerance * expected.abs().max()
    assert generated(model).shape == (2, 19)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("quantum", ["qtha", "none"])
def test_under_autocast(quantum, given):
    module, x = one(quantum=quantum)
    module, x = module.to(given) if given == torch.float64 else module, x.to(given)

    def run(autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            return module(x)

    with folding_each_time():
        expected = {autocast: run(autocast) for autocast in (False, True)}
    for autocast in (True, False, True):
        found, wanted = run(autocast), expected[autocast]
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() <= (1e-6 if wanted.dtype != torch.bfloat16 else 2**-6) * wanted.abs().max()


def test_one_batch_or_token_of_any_shape():
    module, x = one()
    with torch.no_grad():
        for inputs in (x, x[:, :1], x[0], x[0, 0], x[:, :0], x.transpose(0, 1), x.repeat(70, 1, 1)):
            found = module(inputs)
            with folding_each_time():
                expected = module(inputs)
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", [pytest.param("aer", marks=pytest.mark.slow), "in PyTorch"])
def test_other_engines(backend, monkeypatch):
    if backend == "in PyTorch":
        monkeypatch.setattr("axolotl_qtha.circuit.native.runs", lambda z: False)
    module, x = one(**({"quantum_backend": "aer"} if backend == "aer" else {}))
    with torch.no_grad():
        found, again = module(x), module(x)
        with folding_each_time():
            assert torch.equal(module(x), found)
    assert torch.equal(again, found)


# ---- once, and where nothing is trained ----


def test_generate_folds_each_layer_once(folds):
    model = trained()
    folds.clear()
    generated(model)
    assert len(folds) == len(set(map(id, folds))) == len(adapters(model)) == 14
    generated(model)
    assert len(folds) == 14
    with folding_each_time():
        generated(model)
    assert len(folds) == 14 + 12 * 14


def test_not_with_gradients_nor_in_training():
    model = trained()
    model(input_ids=tokens())
    assert kept(model) == 0
    with torch.no_grad():
        model.train()(input_ids=tokens())
    assert kept(model) == 0
    logits(model.eval())
    assert kept(model) == 14
    model(input_ids=tokens()).logits.sum().backward()  # uses none
    assert all(parameter.grad is not None for parameter in trainable(model).values())


@pytest.mark.parametrize("change", ["train", "eval", "to", "half", "drop_kept", "load_state_dict"])
def test_what_drops_them(change):
    model = trained()
    logits(model)
    assert kept(model) == 14
    if change == "to":
        model.to("cpu")
    elif change == "load_state_dict":
        model.load_state_dict(model.state_dict())
    elif change == "drop_kept":
        for module in adapters(model).values():
            module.drop_kept()
    else:
        getattr(model, change)()
    assert kept(model) == 0


def test_gradients_are_the_same_after_an_evaluation():
    model, other = trained().train(), trained().train()
    for _ in range(2):
        logits(model.eval())
        model.train()
        train(model, steps=1)
        train(other, steps=1)
    assert kept(model) == 0
    expected = gradients(other)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


def test_memory_is_that_of_lora():
    model = trained()
    logits(model)
    for module in adapters(model).values():
        fold, shape = module.kept._entry.fold, module.shape
        stored = sum(matrix.untyped_storage().nbytes() for matrix in (fold.a, fold.b))
        assert stored <= 4 * shape.rank * (shape.mpo_a.inputs.padded + shape.mpo_b.outputs.padded)


@pytest.mark.slow
def test_not_compiled():
    module, x = one()
    with torch.no_grad():
        expected = module(x)
        module.drop_kept()
        assert (torch.compile(module, backend="eager")(x) - expected).abs().max() <= 1e-6
    assert not module.kept


def test_on_the_meta_device_nothing_is_kept():
    module, x = one()
    with torch.no_grad():
        assert module.to("meta")(x.to("meta")).device.type == "meta"
    assert not module.kept


# ---- errors ----


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_not_finite_inputs_raise_the_same_error(number):
    module, x = one(angle_scale="raw")
    x[0, 1, 2] = number
    texts = []
    for context in (nullcontext(), folding_each_time()):
        with torch.no_grad(), context, pytest.raises(NonFiniteAngle) as error:
            module(x)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert "encoded input of qubit 0 (token 1)" in texts[0]


def test_not_finite_angles_name_their_layer():
    model = trained()
    module = adapters(model)["model.layers.1.self_attn.v_proj"]
    logits(model)
    with torch.no_grad():
        module.angles[5] = torch.nan
    texts = []
    for context in (nullcontext(), folding_each_time()):
        with context, pytest.raises(NonFiniteAngle) as error:
            logits(model)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert "layers.1.self_attn.v_proj: the circuit's trained angle of qubit 1 (row 1) is nan" in texts[0]
