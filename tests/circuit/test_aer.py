"""The circuit on Qiskit Aer, without noise: against Qiskit's state vector, the exact engine, and the statistics of shots."""

import subprocess
import sys
from collections import namedtuple

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from axolotl_qtha.circuit import aer, shifts
from axolotl_qtha.circuit.ansatz import GATE_ORDERS, Ansatz
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.circuit.torch_engine import NonFiniteAngle
from axolotl_qtha.tuner.backends import expectation_values, prepare

from .reference import angles_and_inputs, expectations, shift_gradients

AER = Simulation("aer")


def tensors(ansatz, tokens, dtype=torch.float64, seed=0):
    z, theta = angles_and_inputs(ansatz, tokens, seed)
    return torch.tensor(z, dtype=dtype, requires_grad=True), torch.tensor(theta, dtype=dtype, requires_grad=True)


def value_and_gradients(ansatz, simulation, z, theta):
    result = expectation_values(z, theta, ansatz, simulation)
    return result.detach(), *torch.autograd.grad(result.square().sum(), (z, theta))


@pytest.mark.parametrize("gate_order", GATE_ORDERS)
@pytest.mark.parametrize(("qubits", "layers"), [(1, 2), (2, 1), (3, 2), (4, 1), (6, 1)])
def test_exact_values_and_gradients(qubits, layers, gate_order):
    ansatz = Ansatz(qubits, layers, gate_order)
    z, theta = tensors(ansatz, tokens=3, seed=qubits)
    result, grad_z, grad_theta = value_and_gradients(ansatz, AER, z, theta)
    # double precision: rounding of some hundred gates
    assert np.abs(result.numpy() - expectations(ansatz, z.detach().numpy(), theta.detach().numpy())).max() <= 1e-10
    for grad, expected in zip((grad_z, grad_theta), value_and_gradients(ansatz, Simulation(), z, theta)[1:], strict=True):
        assert (grad - expected).abs().max() <= 1e-10
    single = value_and_gradients(ansatz, Simulation("aer", precision="single"), z, theta)
    for value, expected in zip(single, (result, grad_z, grad_theta), strict=True):
        assert 0 < (value - expected).abs().max() <= 1e-5  # single precision, gradients of size 1


def test_gradients_are_the_reference_parameter_shift():
    ansatz = Ansatz(3, 1)
    z, theta = angles_and_inputs(ansatz, tokens=2)
    grad = np.random.default_rng(1).normal(size=z.shape)
    grad_z, grad_theta = aer.engine(ansatz, AER).gradients(grad, z, theta)
    shifted = [shift_gradients(ansatz, row, theta, weight) for row, weight in zip(z, grad, strict=True)]
    assert np.abs(grad_z - np.stack([by_z for by_z, _ in shifted])).max() <= 1e-10
    assert np.abs(grad_theta - sum(by_theta for _, by_theta in shifted)).max() <= 1e-10


def test_the_rules_differentiate_their_frequencies_exactly():
    for gate, frequencies in (("ry", [1]), ("crz", [0.5, 1])):
        for frequency in frequencies:
            for x in (0.0, 0.7, 2.9):
                slope = sum(
                    c * (np.sin(frequency * (x + s)) - np.sin(frequency * (x - s)))
                    for c, s in zip(shifts.RULES[gate], shifts.SHIFTS, strict=False)
                )
                assert slope == pytest.approx(frequency * np.cos(frequency * x), abs=1e-14)


def count_circuits(monkeypatch):
    counts = []
    run = aer.Engine.expectations
    monkeypatch.setattr(aer.Engine, "expectations", lambda self, angles: counts.append(len(angles)) or run(self, angles))
    return counts


def test_the_number_of_circuits(monkeypatch):
    ansatz = Ansatz(3, 2)
    assert shifts.shift_circuits(shifts.GateAngles(ansatz)) == 3 * (
        2 * 3 * 2 + 4 * 2 * 2
    )  # per qubit: 3 RY and 2 CRZ a layer, 2 and 4 shifts
    counts = count_circuits(monkeypatch)
    z, theta = tensors(ansatz, tokens=5)
    value_and_gradients(ansatz, AER, z, theta)
    assert counts == [5, 5 * shifts.shift_circuits(shifts.GateAngles(ansatz))]


def test_only_wanted_gradients_are_run(monkeypatch):
    ansatz = Ansatz(2, 2)
    counts = count_circuits(monkeypatch)
    z, theta = tensors(ansatz, tokens=3)
    full = value_and_gradients(ansatz, AER, z, theta)
    expectation_values(z, theta.detach(), ansatz, AER).square().sum().backward()  # `quantum: frozen`
    assert counts[-1] == 3 * 2 * 2 * 2  # two RY(z) a qubit
    assert torch.equal(z.grad, full[1])
    expectation_values(z.detach(), theta, ansatz, AER).square().sum().backward()
    assert counts[-1] == 3 * (shifts.shift_circuits(shifts.GateAngles(ansatz)) - 8)
    assert torch.equal(theta.grad, full[2])


def test_chunks_of_circuits_do_not_matter(monkeypatch):
    ansatz = Ansatz(2, 1)
    z, theta = tensors(ansatz, tokens=7)
    whole = value_and_gradients(ansatz, AER, z, theta)
    for circuits in (1, 60, 100):  # 28 circuits a token and gradient
        monkeypatch.setattr(aer, "CIRCUITS", circuits)
        aer._engine.cache_clear()
        for a, b in zip(value_and_gradients(ansatz, AER, z, theta), whole, strict=True):
            assert (a - b).abs().max() <= 1e-12
    aer._engine.cache_clear()


def test_shapes_dtypes_and_no_tokens():
    ansatz = Ansatz(2, 1)
    z, theta = tensors(ansatz, tokens=6)
    result = expectation_values(z, theta, ansatz, AER)
    assert torch.equal(expectation_values(z.reshape(2, 3, 2), theta, ansatz, AER), result.reshape(2, 3, 2))
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (z, theta)]
    result, grad_z, grad_theta = value_and_gradients(ansatz, AER, *low)
    assert (result.dtype, grad_z.dtype, grad_theta.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    empty = torch.zeros(0, 2, requires_grad=True)
    result, grad_z, grad_theta = value_and_gradients(ansatz, AER, empty, theta)
    assert result.shape == grad_z.shape == (0, 2)
    assert grad_theta.eq(0).all()
    meta = [tensor.detach().to("meta").requires_grad_() for tensor in (z, theta)]
    assert [tensor.shape for tensor in value_and_gradients(ansatz, AER, *meta)] == [(6, 2), (6, 2), (4, 2)]
    with pytest.raises(ValueError, match="do not fit"):
        expectation_values(torch.zeros(5, 3), theta, ansatz, AER)


# Shots. A <Z> from N shots has the standard error sqrt((1 - <Z>^2) / N).


def test_shots_are_within_five_standard_errors():
    ansatz = Ansatz(3, 2)
    z, theta = tensors(ansatz, tokens=100)
    exact = expectation_values(z, theta, ansatz, AER).detach()
    for shots in (10, 1000):
        sampled = expectation_values(z, theta, ansatz, Simulation("aer", shots=shots)).detach()
        scores = (sampled - exact) / ((1 - exact**2) / shots).sqrt()
        # of 300 values none is further off in 3000 of 3001 runs; and they do spread as much as they should
        assert scores.abs().max() <= 5
        assert scores.std() == pytest.approx(1, abs=0.25)


@pytest.mark.slow
def test_standard_errors_fall_with_the_square_root_of_shots():
    ansatz = Ansatz(2, 1)
    z, theta = tensors(ansatz, tokens=200)
    exact = expectation_values(z, theta, ansatz, AER)
    shots = np.array([16, 128, 1024, 8192])
    errors = [
        (expectation_values(z, theta, ansatz, Simulation("aer", shots=int(n))) - exact).square().mean().sqrt().item()
        for n in shots
    ]
    slope = np.polyfit(np.log(shots), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.05)  # 400 values: each error is known to 4 %


def test_gradients_from_shots_are_unbiased():
    ansatz = Ansatz(2, 1)
    z, theta = angles_and_inputs(ansatz, tokens=1)
    grad = np.ones_like(z)
    exact = np.concatenate([g.ravel() for g in aer.engine(ansatz, AER).gradients(grad, z, theta)])
    engine, runs = aer.Engine(ansatz, Simulation("aer", shots=50), None), []
    for seed in range(100):
        engine.simulation = Simulation("aer", shots=50, seed=seed)
        runs.append(np.concatenate([g.ravel() for g in engine.gradients(grad, z, theta)]))
    mean, error = np.mean(runs, axis=0), np.std(runs, axis=0) / 10
    assert error.max() < 0.05
    assert (np.abs(mean - exact) <= 5 * error + 1e-12).all()


def test_shots_are_a_function_of_seed_and_angles():
    ansatz = Ansatz(2, 1)
    z, theta = tensors(ansatz, tokens=8)
    same = z[:1].detach().expand(8, 2)

    def run(seed, z=z):
        return expectation_values(z, theta, ansatz, Simulation("aer", shots=100, seed=seed))

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert len(set(run(0, same)[:, 0].tolist())) > 1  # tokens with the same angles have shots of their own
    assert not torch.equal(run(0, same), run(0, same + 1e-9))


def test_each_rank_has_shots_of_its_own():
    """Two ranks with the same tokens must not make the same errors; the first has those of a run on its own."""
    ansatz = Ansatz(3, 1)
    z, theta = tensors(ansatz, 4)

    def run():
        return expectation_values(z, theta, ansatz, Simulation("aer", shots=100))

    def run_as(rank):
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            return run()
        finally:
            dist.destroy_process_group()

    assert torch.equal(run_as(0), run())
    assert torch.equal(run_as(1), run_as(1))
    assert not torch.equal(run_as(1), run())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same_shots(use_reentrant):
    ansatz = Ansatz(2, 1)
    z, theta = tensors(ansatz, tokens=4, dtype=torch.float32)
    simulation = Simulation("aer", shots=20)
    plain = value_and_gradients(ansatz, simulation, z, theta)
    result = checkpoint(expectation_values, z, theta, ansatz, simulation, use_reentrant=use_reentrant)
    result.square().sum().backward()
    assert torch.equal(plain[1], z.grad)
    assert torch.equal(plain[2], theta.grad)


def test_adjoint_takes_the_exact_gradient(caplog):
    aer._engine.cache_clear()
    ansatz = Ansatz(3, 2)
    z, theta = tensors(ansatz, tokens=4)
    weights = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((weights * expectation_values(z, theta, ansatz)).sum(), (z, theta))
    simulation = Simulation("aer", shots=10, gradient="adjoint")
    for _ in range(2):
        result = expectation_values(z, theta, ansatz, simulation)
        grads = torch.autograd.grad((weights * result).sum(), (z, theta))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert torch.equal(result * 10, (result * 10).round())  # the values are counts of 10 shots
    assert caplog.text.count("gradient: adjoint") == 1


@pytest.mark.slow
def test_under_torch_compile():
    ansatz = Ansatz(2, 1)
    z, theta = tensors(ansatz, tokens=4, dtype=torch.float32)

    def function(z, theta):
        return 2 * expectation_values(torch.tanh(z), theta, ansatz, AER) + z

    compiled = torch.compile(function)(z, theta)
    assert (compiled - function(z, theta)).abs().max() <= 1e-6  # float32: tanh may round differently
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(compiled.sum(), (z, theta)))


FORKED = """
import torch
from torch.utils.data import DataLoader, Dataset
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.tuner.backends import expectation_values
from axolotl_qtha.circuit.simulation import Simulation

ansatz = Ansatz(3, 2)
z, angles = torch.randn(8, 3), torch.randn(ansatz.rows, 3)

class Rows(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return expectation_values(z[i : i + 1], angles, ansatz, Simulation("aer"))[0]

before = expectation_values(z, angles, ansatz, Simulation("aer"))  # the simulator has run before the workers are forked
rows = torch.stack([row for batch in DataLoader(Rows(), num_workers=2, batch_size=2) for row in batch])
assert torch.equal(before, expectation_values(z, angles, ansatz, Simulation("aer")))
assert (rows - before).abs().max() < 1e-6, rows - before
print("fine")
"""


@pytest.mark.slow
def test_forked_workers_can_use_the_simulator():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["fine"], done.stderr[-2000:]


# Bad input.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("simulation", [Simulation(), AER], ids=["torch", "aer"])
def test_angles_that_are_not_finite(simulation, value):
    ansatz = Ansatz(2, 1)
    z, theta = tensors(ansatz, tokens=4)
    with torch.no_grad():
        z[3, 1] = value
    with pytest.raises(NonFiniteAngle, match=rf"encoded input of qubit 1 \(token 3\) is {value}.*What works"):
        expectation_values(z, theta, ansatz, simulation)
    z, theta = tensors(ansatz, tokens=4)
    with torch.no_grad():
        theta[2, 0] = value
    with pytest.raises(NonFiniteAngle, match=rf"trained angle of qubit 0 \(row 2\) is {value}"):
        expectation_values(z, theta, ansatz, simulation)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(
        ValueError, match=r"qtha.quantum_backend: 'aer_gpu' finds no GPU.*pip uninstall -y qiskit-aer .*`quantum_b"
    ):
        prepare(Ansatz(2, 1), Simulation("aer_gpu"))


def test_not_enough_memory(monkeypatch):
    free = namedtuple("free", "available")(100 * 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    prepare(Ansatz(12, 1), Simulation("aer"))
    with pytest.raises(ValueError, match=r"qtha.qubits: 12 needs 0.2 GiB for a density matrix of 12 qubits.*0.1 GiB are free"):
        prepare(Ansatz(12, 1), Simulation("aer", noise_model="depolarizing"))
    # what the error says works
    prepare(Ansatz(12, 1), Simulation("aer", noise_model="depolarizing", shots=4095))


def test_a_failed_job_is_an_error():
    engine = aer.Engine(Ansatz(10, 1), Simulation("aer", noise_model="depolarizing"), None)
    engine.measurements[0].simulator.set_options(max_memory_mb=1)
    with pytest.raises(RuntimeError, match=r"Qiskit Aer failed on 2 circuits: .*[Mm]emory"):
        engine.expectations(np.zeros((2, len(engine.gates.kinds))))
