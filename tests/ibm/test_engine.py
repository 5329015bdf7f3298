"""`quantum_backend: ibm` inside autograd: which tokens go to the device, and their gradients, on a noiseless simulated one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from axolotl_qtha.circuit import torch_engine
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.circuit.torch_engine import NonFiniteAngle
from axolotl_qtha.ibm import calls, engine
from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.options import IBMOptions
from axolotl_qtha.ibm.runner import Runner
from axolotl_qtha.ibm.service import LocalService
from axolotl_qtha.tuner.backends import expectation_values, prepare

from ..circuit.reference import angles_and_inputs, shift_gradients
from .boundary import NOISELESS

pytestmark = pytest.mark.filterwarnings("ignore:.*no QubitProperties")

ANSATZ = Ansatz(2, 1)
SHOTS = 4000


@pytest.fixture
def simulation(tmp_path, monkeypatch):
    """Return what makes a simulation whose device is noiseless."""
    journal = Journal(tmp_path)

    def make(seed=0, **changes):
        options = IBMOptions(**{"backend": "fake:manila", "shots": SHOTS, "journal": str(tmp_path), **changes})
        runner = Runner(ANSATZ, options, LocalService(NOISELESS, options), journal)
        monkeypatch.setattr(engine, "runner", lambda *_: runner)
        engine.CALLS.take()
        return Simulation("ibm", seed=seed, ibm=options)

    yield make
    journal.close()


def inputs(tokens=6, dtype=torch.float64):
    z, theta = angles_and_inputs(ANSATZ, tokens)
    return [torch.tensor(array, dtype=dtype, requires_grad=True) for array in (z, theta)]


@pytest.mark.parametrize("tokens_per_step", [2, 6, 100])
def test_some_tokens_go_to_the_device_and_the_others_are_exact(simulation, tokens_per_step):
    how = simulation(tokens_per_step=tokens_per_step)
    z, theta = inputs()
    result, exact = expectation_values(z, theta, ANSATZ, how), torch_engine.expectation_values(z, theta, ANSATZ)
    chosen = engine.choose(z.detach(), tokens_per_step, 0)
    assert len(chosen) == min(6, tokens_per_step)
    others = [i for i in range(6) if i not in chosen.tolist()]
    assert torch.equal(result[others], exact[others])
    off = (result - exact)[chosen].detach()
    assert 0 < off.abs().max() <= 5 / SHOTS**0.5
    (difference,) = engine.CALLS.take()
    assert difference.tokens == len(chosen)
    assert difference.mean == pytest.approx(off.mean().item())
    assert difference.variance == pytest.approx(off.var(correction=0).item())
    assert 0 < difference.standard_error < 1 / SHOTS**0.5
    assert engine.CALLS.take() == []
    grads = torch.autograd.grad(result[others].sum(), (z, theta)) if others else ()
    expected = torch.autograd.grad(exact[others].sum(), (z, theta)) if others else ()
    assert all(torch.allclose(a, b) for a, b in zip(grads, expected, strict=True))


def test_the_draw_repeats_itself_and_takes_every_token_as_often(simulation):
    z = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(engine.choose(z, 3, 0), engine.choose(z, 3, 0))
    counts = torch.zeros(8)
    for seed in range(400):
        counts[engine.choose(z, 3, seed)] += 1
    assert (counts - 150).abs().max() < 5 * (400 * 3 / 8 * 5 / 8) ** 0.5
    how = simulation(seed=3, tokens_per_step=2)
    first = expectation_values(*inputs(), ANSATZ, how)
    assert torch.equal(first, expectation_values(*inputs(), ANSATZ, how)), "a recomputed layer has the same shots"


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_parameter_shift_is_within_five_standard_errors(simulation, wants):
    how = simulation(tokens_per_step=3)
    z, theta = inputs(3)
    for tensor, wanted in zip((z, theta), wants, strict=True):
        tensor.requires_grad_(wanted)
    weights = torch.tensor(np.random.default_rng(1).normal(size=(3, 2)))
    (expectation_values(z, theta, ANSATZ, how) * weights).sum().backward()
    rows = zip(z.detach().numpy(), weights.numpy(), strict=True)
    shifted = [shift_gradients(ANSATZ, row, theta.detach().numpy(), weight) for row, weight in rows]
    # a cost of one circuit is at most sum |weight|; a slope sums at most 4 of them with coefficients below 0.61
    error = 4**0.5 * 0.61 * weights.abs().sum(dim=1).max().item() / SHOTS**0.5
    if wants[0]:
        off = np.abs(z.grad.numpy() - np.stack([by_z for by_z, _ in shifted]))
        assert 0 < off.max() <= 5 * error
    if wants[1]:
        off = np.abs(theta.grad.numpy() - sum(by_theta for _, by_theta in shifted))
        assert 0 < off.max() <= 5 * error * 3**0.5
    assert (z.grad is None, theta.grad is None) == (not wants[0], not wants[1])
    assert error < 0.1  # gradients are of the size of 1


@pytest.mark.parametrize("gradient", ["parameter_shift", "spsa"])
def test_tokens_on_which_nothing_depends_cost_no_gradient(simulation, gradient):
    how = simulation(tokens_per_step=3, gradient=gradient)
    z, theta = inputs(3)
    result = expectation_values(z, theta, ANSATZ, how)
    entries = engine.runner().journal.entries
    grads = torch.autograd.grad(result, (z, theta), torch.zeros(3, 2), retain_graph=True)
    assert not any(grad.any() for grad in grads)
    assert [entry.circuits for entry in entries.values()] == [3]
    by_z, by_theta = torch.autograd.grad(result, (z, theta), torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.0, 0.0]]))
    assert [entry.circuits for entry in entries.values()] == [3, 28 if gradient == "parameter_shift" else 2]
    assert by_z.any(dim=1).tolist() == [False, True, False]
    assert by_theta.any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_cost_nothing_and_count_once(simulation, reentrant):
    how = simulation(tokens_per_step=3)
    plain, recomputed = inputs(), inputs()
    expectation_values(*plain, ANSATZ, how).square().sum().backward()
    (first,) = engine.CALLS.take()
    entries = engine.runner().journal.entries
    jobs = len(entries)

    def layer(z, theta):
        return expectation_values(z, theta, ANSATZ, how)

    checkpoint(layer, *recomputed, use_reentrant=reentrant).square().sum().backward()
    assert (len(entries), jobs) == (2, 2)
    assert engine.CALLS.take() == [first]
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, recomputed, strict=True))


def test_pooled_differences_are_those_of_all_tokens_together():
    random = np.random.default_rng(0)
    offs = [random.normal(0.1 * tokens, 0.3, (tokens, 2)) for tokens in (1, 3, 8)]
    errors = [np.full(off.shape, 0.01 * len(off)) for off in offs]
    parts = [
        calls.Difference(len(off), off.mean(), off.var(), np.sqrt((error**2).mean()))
        for off, error in zip(offs, errors, strict=True)
    ]
    off, error = np.concatenate(offs), np.concatenate(errors)
    pooled = calls.pool(parts)
    assert pooled.tokens == 12
    found = (pooled.mean, pooled.variance, pooled.standard_error)
    assert found == pytest.approx((off.mean(), off.var(), np.sqrt((error**2).mean())))
    assert calls.pool(parts[:1]) == parts[0]
    with pytest.raises(ValueError, match="no calls"):
        calls.pool([])


def test_the_exact_simulator_alone_submits_nothing(simulation):
    how = simulation()
    z, theta = inputs()
    engine.CALLS.on_device = False
    try:
        result = expectation_values(z, theta, ANSATZ, how)
    finally:
        engine.CALLS.on_device = True
    assert torch.equal(result, torch_engine.expectation_values(z, theta, ANSATZ))
    assert not engine.runner().journal.entries
    assert engine.CALLS.take() == []


@pytest.mark.slow
def test_spsa_through_autograd_is_the_gradient_on_average(simulation):
    z, theta = inputs(1)
    exact = torch.autograd.grad(torch_engine.expectation_values(z, theta, ANSATZ).sum(), (z, theta))
    how = simulation(gradient="spsa", spsa_draws=400, tokens_per_step=1)
    grads = torch.autograd.grad(expectation_values(z, theta, ANSATZ, how).sum(), (z, theta))
    flat, expected = (torch.cat([grad.flatten() for grad in pair]) for pair in (grads, exact))
    # each draw of a slope has the spread of the others' slopes and of the shots, two circuits over twice the step
    spread = (expected.square().sum().item() + 2 * 2 / SHOTS / (2 * 0.1) ** 2) ** 0.5 / 400**0.5
    bias = 10 * 0.1**2 / 2 * expected.abs().max().item()  # nine other gates, each a share of up to step**2 / 2
    assert (flat - expected).abs().max() <= 5 * spread + bias
    assert spread + bias < 0.5 * expected.abs().max()


def test_shapes_and_dtypes(simulation):
    how = simulation(tokens_per_step=3)
    z, theta = inputs()
    result = expectation_values(z.reshape(2, 3, 2), theta, ANSATZ, how)
    assert result.shape == (2, 3, 2)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (z, theta)]
    result = expectation_values(*low, ANSATZ, how)
    grads = torch.autograd.grad(result.sum(), low)
    assert (result.dtype, grads[0].dtype, grads[1].dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert expectation_values(z[:0], theta, ANSATZ, how).shape == (0, 2)
    assert expectation_values(z.to("meta"), theta.to("meta"), ANSATZ, how).shape == (6, 2)
    with torch.no_grad():
        z[3, 1] = float("nan")
    with pytest.raises(NonFiniteAngle, match="qubit 1"):
        expectation_values(z, theta, ANSATZ, how)


def test_prepare_opens_the_journal_and_one_process_at_most(tmp_path):
    how = Simulation("ibm", ibm=IBMOptions(backend="fake:manila", journal=str(tmp_path / "journal")))
    prepare(ANSATZ, how)
    runner = engine.runner(ANSATZ, how.ibm)
    assert runner is engine.runner(ANSATZ, how.ibm)
    assert engine.runner(Ansatz(1, 1), how.ibm).journal is runner.journal
    with pytest.raises(ValueError, match=r"qtha.ibm.journal: .*in use by process \d+ on "):
        Journal(tmp_path / "journal")
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match=r"qtha.quantum_backend: 'ibm' has one journal and one cap, 2 ranks"):
            prepare(Ansatz(3, 1), how)
    finally:
        dist.destroy_process_group()
