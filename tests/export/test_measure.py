"""What an export is said to cost, against the definitions in float64, sequence by sequence without padding."""

from types import SimpleNamespace

import pytest
import torch

from axolotl_qtha.export import fit
from axolotl_qtha.export.command import _check_error
from axolotl_qtha.export.measure import WITH_CONSTANTS, measure
from axolotl_qtha.trained.passes import adapters_of

from ..export_models import sequences, text_pass
from ..models import adapted, llama, train


@pytest.fixture(scope="module")
def trained():
    return train(adapted(llama(), quantum="qtha"))


@pytest.fixture(scope="module")
def layers(trained):
    """The linear exports, without and with their constants."""
    moments, _ = fit.collect(text_pass(trained))
    adapters = adapters_of(trained)
    return [
        {name: fit.linear(adapter, moments[name], constant).low_rank() for name, adapter in adapters.items()}
        for constant in (False, True)
    ]


@torch.no_grad()
def distributions(model):
    """Return the next-token distributions (N, vocabulary) and the tokens (N) that follow, float64."""
    logs, targets = [], []
    for sequence in sequences():
        ids = torch.tensor([sequence.ids])
        logs.append(model(input_ids=ids).logits[0, :-1].double().log_softmax(-1))
        targets.append(ids[0, 1:])
    return torch.cat(logs), torch.cat(targets)


def test_the_model_is_measured_by_definition(trained, layers):
    plain, whole = layers
    got = measure(text_pass(trained), plain, {WITH_CONSTANTS: whole})
    adapters = adapters_of(trained)
    expected = {"qtha": distributions(trained)}
    with trained.disable_adapter():
        expected["base"] = distributions(trained)
    for name, export in (("export", plain), (WITH_CONSTANTS, whole)):
        with fit.replaced(adapters, export):
            expected[name] = distributions(trained)
    p, targets = expected["qtha"]
    assert got.predicted == len(targets)
    assert set(got.models) == set(expected)
    for name, (q, _) in expected.items():
        found = got.models[name]
        # float32 logits in batches of other shapes
        assert found.perplexity == pytest.approx(float((-q.gather(1, targets[:, None]).mean()).exp()), rel=1e-5)
        assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-2, abs=1e-6)
        assert found.top1 == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()), abs=1.01 / len(targets))
    base, qtha, export = (got.models[name].perplexity for name in ("base", "qtha", "export"))
    assert got.gain_kept == (None if base <= qtha else pytest.approx((base - export) / (base - qtha)))


def test_nan_is_not_taken_for_no_difference(trained, layers):
    broken = {name: layer if i else layer.widened(len(layer.a)) for i, (name, layer) in enumerate(layers[0].items())}
    next(iter(broken.values())).a[0, 0] = float("nan")
    found = measure(text_pass(trained), broken, {}).models["export"]
    assert found.kl != found.kl
    with pytest.raises(ValueError, match="--max-kl: "):
        _check_error(SimpleNamespace(measured=SimpleNamespace(models={"export": found})), 0.1)


def test_the_layers_are_measured_by_definition(trained, layers):
    plain, whole = layers
    got = {error.name: error for error in measure(text_pass(trained), plain, {WITH_CONSTANTS: whole}).modules}
    adapters = adapters_of(trained)
    inputs = {name: [] for name in adapters}
    hooks = [
        adapter.register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0].flatten(0, -2)))
        for name, adapter in adapters.items()
    ]
    distributions(trained)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for name, adapter in adapters.items():
            x = torch.cat(inputs[name])
            z = x @ adapter.fold_a().T
            change = adapter.bottleneck()(z) @ adapter.fold_b().T
            linear_part = z @ adapter.effective("w_c").T @ adapter.fold_b().T
            for other, found in (
                (plain[name](x), got[name].export),
                (whole[name](x), got[name].with_constant),
                (linear_part, got[name].linear_part),
            ):
                assert found == pytest.approx(float((change - other).norm() / change.norm()), rel=1e-3)
