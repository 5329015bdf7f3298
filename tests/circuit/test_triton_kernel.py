"""The fused GPU kernel against Qiskit, parameter shift and the CPU's engine: in Triton's interpreter, and on a GPU if there is.

The interpreter runs the same source with NumPy. It is chosen before Triton is imported, so it has a process of its own: one for
all cases.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from axolotl_qtha.circuit import triton_kernel
from axolotl_qtha.circuit.ansatz import GATE_ORDERS, Ansatz
from axolotl_qtha.circuit.program import program
from axolotl_qtha.circuit.torch_engine import expectation_values

from .. import triton_runs
from .reference import angles_and_inputs, expectations, shift_gradients, shift_gradients_side_by_side

# Rounding of up to 90 gates, as in test_torch_engine.py. Angle gradients are sums over up to 65 tokens, each of size 1.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = list(TOLERANCE)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# (ansatz, tokens, dtype), and how many circuits side by side, if not one.
# The interpreter needs up to 2 s for a block of 8 qubits: so one token, and each depth in one dtype.
CIRCUITS = [
    (Ansatz(qubits, layers, gate_order), 1 if qubits > 6 else 3, dtype)
    for qubits in range(1, 9)
    for layers, dtype in ((1, torch.float64), (2, torch.float32), (3, torch.float64))
    for gate_order in GATE_ORDERS
]
COUNTS = [(Ansatz(qubits, 1), tokens, dtype) for qubits in (1, 4) for tokens in (0, 1, 17, 32, 65) for dtype in DTYPES]
LARGE = [(Ansatz(qubits, 1), tokens, torch.float32) for qubits, tokens in ((6, 9), (7, 5), (8, 3))]
SHIFTED = [(Ansatz(*sizes, order), 2, torch.float64) for sizes in ((1, 2), (2, 2), (3, 3), (5, 1)) for order in GATE_ORDERS]
SIDE_BY_SIDE = [
    (Ansatz(4, 2), 3, torch.float64, 4),
    (Ansatz(4, 1), 33, torch.float32, 8),
    (Ansatz(3, 1, "2025-05"), 2, torch.float64, 3),
]
SIDE_BY_SIDE += [(Ansatz(8, 1), 1, torch.float64, 2), (Ansatz(1, 2), 40, torch.float64, 3)]
CASES = CIRCUITS + COUNTS + LARGE + SHIFTED + SIDE_BY_SIDE

INTERPRETED = """
import sys, torch
from axolotl_qtha.circuit import native, torch_engine, triton_kernel
from tests.circuit.test_triton_kernel import CASES, COUNTS, value_and_gradients
value_and_gradients(CASES[0], "cpu")
assert "axolotl_qtha.circuit.circuit_triton" not in sys.modules, "imported where it is not needed"
native.runs = lambda z: False
triton_kernel.runs = lambda z, qubits: True
torch.save([[value_and_gradients(case, "cpu") for _ in range(1 + (case in COUNTS))] for case in CASES], sys.argv[1])
assert "axolotl_qtha.circuit.circuit_triton" in sys.modules
"""


def inputs(case, device="cpu"):
    """Return z, angles and the weights of the <Z_i> in the scalar that is differentiated."""
    ansatz, tokens, dtype, *blocks = case
    z, angles = angles_and_inputs(ansatz, tokens, tokens, *blocks)
    arrays = z, angles, np.random.default_rng(1).normal(size=z.shape)
    return [torch.tensor(array, dtype=dtype, device=device) for array in arrays]


def value_and_gradients(case, device, z_angles_weights=None):
    z, angles, weights = z_angles_weights or inputs(case, device)
    z.requires_grad_()
    angles.requires_grad_()
    result = expectation_values(z, angles, case[0])
    return tuple(t.detach().cpu() for t in (result, *torch.autograd.grad((weights * result).sum(), (z, angles))))


def name(case):
    ansatz, tokens, dtype, *blocks = case
    return "-".join(map(str, (ansatz.qubits, ansatz.layers, ansatz.gate_order, f"{tokens}tokens", dtype, *blocks)))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Return the numbers of every case, from the interpreter."""
    path = tmp_path_factory.mktemp("interpreted") / "numbers"
    triton_runs.interpreted(INTERPRETED, path)
    return dict(zip(CASES, torch.load(path), strict=True))


@pytest.fixture(params=[pytest.param("interpreter", marks=pytest.mark.slow), pytest.param("cuda", marks=on_gpu)])
def numbers(request):
    """Return a function from a case to its result and gradients."""
    if request.param == "interpreter":
        every = request.getfixturevalue("interpreted")
        return lambda case: every[case][0]
    assert triton_kernel.works()
    return lambda case: value_and_gradients(case, "cuda")


@pytest.mark.parametrize("case", CIRCUITS + SIDE_BY_SIDE, ids=name)
def test_matches_the_state_vector(case, numbers):
    ansatz, _, dtype, *blocks = case
    result = numbers(case)[0]
    assert result.dtype == dtype
    z, angles, _ = inputs((*case[:2], torch.float64, *blocks))
    assert np.abs(result.numpy() - expectations(ansatz, z.numpy(), angles.numpy())).max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("case", SHIFTED, ids=name)
def test_gradients_match_parameter_shift(case, numbers):
    ansatz = case[0]
    _, grad_z, grad_angles = numbers(case)
    z, angles, weights = (t.numpy() for t in inputs(case))
    shifted = [shift_gradients(ansatz, row, angles, weight) for row, weight in zip(z, weights, strict=True)]
    assert np.abs(grad_z.numpy() - np.stack([by_z for by_z, _ in shifted])).max() <= 1e-10
    assert np.abs(grad_angles.numpy() - sum(by_angles for _, by_angles in shifted)).max() <= 1e-10


@pytest.mark.parametrize("case", [case for case in SIDE_BY_SIDE if case[2] == torch.float64], ids=name)
def test_gradients_side_by_side_match_parameter_shift(case, numbers):
    z, angles, weights = (t.numpy() for t in inputs(case))
    for mine, expected in zip(numbers(case)[1:], shift_gradients_side_by_side(case[0], z, angles, weights), strict=True):
        assert np.abs(mine.numpy() - expected).max() <= 1e-10


@pytest.mark.parametrize("case", CIRCUITS + COUNTS + LARGE + SIDE_BY_SIDE, ids=name)
def test_gradients_match_the_cpu(case, numbers):
    ansatz, tokens, dtype, *blocks = case
    expected = value_and_gradients((ansatz, tokens, torch.float64, *blocks), "cpu")
    for mine, other in zip(numbers(case), expected, strict=True):
        assert mine.shape == other.shape
        assert mine.numel() == 0 or (mine - other).abs().max() <= TOLERANCE[dtype]


@pytest.mark.slow
def test_repeated_runs_give_the_same_bits(interpreted):
    repeated = [runs for runs in interpreted.values() if len(runs) > 1]
    assert len(repeated) == len(COUNTS)
    assert all(torch.equal(a, b) for first, second in repeated for a, b in zip(first, second, strict=True))


def test_runs_where_it_is_made_for(monkeypatch):
    gpu, cpu = (SimpleNamespace(device=torch.device(kind)) for kind in ("cuda", "cpu"))
    monkeypatch.setattr(triton_kernel, "works", lambda: True)
    assert triton_kernel.runs(gpu, 8)
    assert not triton_kernel.runs(gpu, 9)
    assert not triton_kernel.runs(cpu, 8)
    monkeypatch.setattr(triton_kernel, "works", lambda: False)
    assert not triton_kernel.runs(gpu, 8)


def test_without_triton_pytorch_runs_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    triton_kernel.works.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            assert not triton_kernel.works()
            assert not triton_kernel.works()
    finally:
        triton_kernel.works.cache_clear()
    assert caplog.text.count("Triton cannot be used") == 1
    assert "ModuleNotFoundError" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_driver_pytorch_runs(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with caplog.at_level("WARNING"):
        assert not triton_kernel.works.__wrapped__()
    assert "0 active drivers" in caplog.text


@pytest.mark.parametrize("qubits", range(1, 9))
def test_every_block_fits_the_registers(qubits):
    for dtype, bits in ((torch.float32, 32), (torch.float64, 64)):
        block = triton_kernel.block(qubits, dtype)
        assert block & (block - 1) == 0  # Triton wants powers of two
        assert block >= 1
        assert block * 2**qubits * 4 * bits / 32 / triton_kernel.LANES <= 64


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Return the list of what was compiled instead of launched."""
    yield from triton_runs.compiling(monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("qubits", [4, 7, 8])
def test_compiles_for_a_gpu_without_spilling(qubits, compiled, capfd):
    z, angles, weights = inputs((Ansatz(qubits, 2), 17, torch.float32))
    triton_kernel.forward(z, angles, Ansatz(qubits, 2))
    triton_kernel.backward(weights, z, angles, Ansatz(qubits, 2))
    assert len(compiled) == 2
    assert capfd.readouterr().out.count("0 bytes spill stores, 0 bytes spill loads") == 2
    # no states in shared memory: what there is serves the sums of the angles' gradients
    assert all(kernel.metadata.shared < 2**qubits * 4 for kernel in compiled)


@pytest.mark.slow
def test_compiled_once_for_any_tokens_layers_and_address(compiled):
    for tokens in (1, 3, 16):
        for layers in (1, 8):
            for offset in (0, 1):
                ansatz = Ansatz(2, layers)
                z = torch.zeros(tokens * 2 + offset)[offset:].view(tokens, 2)
                triton_kernel.forward(z, torch.zeros(ansatz.rows, 2), ansatz)
                triton_kernel.backward(z, z, torch.zeros(ansatz.rows, 2), ansatz)
    assert len(compiled) == 24
    assert len({kernel.hash for kernel in compiled}) == 2


class TestOnAGPU:
    """What only a GPU can show."""

    pytestmark = on_gpu
    case = (Ansatz(8, 2), 5001, torch.float32)

    def test_many_tokens(self):
        result, grad_z, grad_angles = value_and_gradients(self.case, "cuda")
        expected = value_and_gradients((*self.case[:2], torch.float64), "cpu")
        assert (result - expected[0]).abs().max() <= 1e-5
        assert (grad_z - expected[1]).abs().max() <= 5e-5  # weights of up to 4 times the usual
        assert (grad_angles - expected[2]).abs().max() <= 5e-4  # sums of 5001 terms, up to 70

    def test_repeated_runs_give_the_same_bits(self):
        runs = [value_and_gradients(self.case, "cuda") for _ in range(3)]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))

    def test_allowing_tf32_changes_nothing(self, monkeypatch):
        exact = value_and_gradients(self.case, "cuda")
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
        assert all(torch.equal(a, b) for a, b in zip(exact, value_and_gradients(self.case, "cuda"), strict=True))

    def test_z_anywhere_in_memory(self):
        z, angles, weights = inputs(self.case, "cuda")
        shifted = torch.empty(z.numel() + 1, device="cuda")[1:].view_as(z).copy_(z)
        both = [value_and_gradients(self.case, "cuda", (each, angles, weights)) for each in (z, shifted)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))

    def test_the_states_are_not_in_memory(self):
        value_and_gradients(self.case, "cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value_and_gradients(self.case, "cuda")
        walls, (ansatz, tokens, dtype) = len(program(self.case[0]).walls), self.case
        sums = tokens // triton_kernel.block(ansatz.qubits, dtype) * (2 * walls - 1) * ansatz.qubits * 4
        # z, weights, <Z>, what is made of them, and the programs' sums; the states would be 10 MB
        assert torch.cuda.max_memory_allocated() - before <= 12 * tokens * ansatz.qubits * 4 + 2 * sums

    def test_nine_qubits_run_in_pytorch(self):
        case = (Ansatz(9, 2), 5, torch.float64)
        for mine, other in zip(value_and_gradients(case, "cuda"), value_and_gradients(case, "cpu"), strict=True):
            assert (mine - other).abs().max() <= 1e-10

    def test_compiles_without_a_graph_break(self):
        z, angles, _ = inputs(self.case, "cuda")
        compiled = torch.compile(lambda z: expectation_values(torch.tanh(z), angles, self.case[0]), fullgraph=True)
        assert (compiled(z) - expectation_values(torch.tanh(z), angles, self.case[0])).abs().max() <= 1e-5  # another tanh
