"""From z to h on a GPU, against the formula in PyTorch and against Qiskit: in Triton's interpreter, and on a GPU if there is.

The interpreter runs the same source with NumPy, in a process of its own: see tests/circuit/test_triton_kernel.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from axolotl_qtha.circuit import torch_engine
from axolotl_qtha.circuit.ansatz import GATE_ORDERS, Ansatz
from axolotl_qtha.circuit.program import program
from axolotl_qtha.circuit.simulation import Simulation
from axolotl_qtha.tuner import join_kernel
from axolotl_qtha.tuner.bottleneck import Bottleneck, Circuit
from axolotl_qtha.tuner.joint import Joint

from .. import triton_runs
from ..circuit.reference import expectations

# The rounding of the gates, of sums over the rank and, for parameters, over up to 40 tokens: of the largest entry, or of 1.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# Of each entry, where z and h are no more precise than that: a GPU rounds bfloat16 to the nearest, the interpreter cuts it off.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-11}
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@dataclass(frozen=True)
class Case:
    """Sizes of a join, and how it is computed."""

    ansatz: Ansatz
    rank: int
    tokens: int
    dtype: torch.dtype = torch.float64  # of the parameters
    z_dtype: torch.dtype | None = None  # if it is another
    options: str = ""  # b: bounded, s: scale, p: product
    programs: int = 1024  # at most
    gain: float = 1.3  # not a float32

    def __str__(self):
        qubits, layers, order = self.ansatz.qubits, self.ansatz.layers, self.ansatz.gate_order
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.z_dtype) if dtype]
        sizes = f"{self.rank // qubits}x{qubits}", layers, order, f"{self.tokens}tokens", f"{self.programs}programs"
        return "-".join(map(str, (*sizes, *dtypes, self.options)))

    @property
    def joint(self):
        return Joint(self.ansatz, "b" in self.options, "p" in self.options, self.gain)


EACH = [  # 1 to 8 qubits in both orders
    Case(Ansatz(qubits, layers, order), qubits, 1 if qubits > 6 else 3, dtype, options=options)
    for qubits in range(1, 9)
    for layers, order, dtype, options in ((1, "2025-06", torch.float32, "bs"), (2, "2025-05", torch.float64, "b"))
]
OPTIONS = [
    Case(Ansatz(3, 2, order), 3, 4, options=options) for order in GATE_ORDERS for options in ("", "b", "s", "bs", "p", "bsp")
]
SIDE_BY_SIDE = [
    Case(Ansatz(1, 2), 3, 5, options="bs"),
    Case(Ansatz(3, 1), 9, 2, options="p"),
    Case(Ansatz(4, 1), 32, 3, options="bs"),
    Case(Ansatz(4, 1, "2025-05"), 20, 2, torch.float32, options="bp"),
    Case(Ansatz(4, 1), 64, 2, torch.float32, options="bsp"),
    Case(Ansatz(8, 1), 16, 1, options="b"),
]
COUNTS = [  # several blocks for a program, the last not full, or no token for some lanes
    Case(Ansatz(4, 1), 4, tokens, dtype, options="bs", programs=programs)
    for tokens, programs in ((0, 1024), (1, 1024), (33, 1024), (33, 2), (40, 1))
    for dtype in TOLERANCE
]
COUNTS += [Case(Ansatz(8, 1), 8, 3, options="bs", programs=2), Case(Ansatz(2, 1), 2, 33, options="sp", programs=1)]
LOW = [
    Case(Ansatz(4, 1), 8, 17, torch.float32, dtype, options, programs=1)
    for dtype, options in ((torch.bfloat16, "bs"), (torch.bfloat16, "bsp"), (torch.float16, "b"), (torch.float64, "s"))
]
REPEATED = [case for case in COUNTS if case.dtype == torch.float32]
CASES = EACH + OPTIONS + SIDE_BY_SIDE + COUNTS + LOW
BY_QISKIT = [case for case in OPTIONS + SIDE_BY_SIDE if case.dtype == torch.float64]

INTERPRETED = """
import sys, torch
from axolotl_qtha.tuner import join_kernel
from tests.tuner.test_join_kernel import CASES, REPEATED, numbers_of
join_kernel.TOTALS = (4, 512)
torch.save([[numbers_of(case, "cpu") for _ in range(1 + (case in REPEATED))] for case in CASES], sys.argv[1])
"""


def inputs(case, device="cpu"):
    """Return the gradients of h, z, fusion, angles and the scale."""
    random, r = np.random.default_rng(case.tokens), case.rank
    z_dtype = case.z_dtype or case.dtype
    grad, z = (torch.tensor(random.normal(size=(case.tokens, r)) * by, dtype=z_dtype) for by in (1, 2))
    fusion = random.uniform(-1, 1, 2 * r * r) * math.sqrt(3 / r)
    angles, scale = random.uniform(-4, 4, case.ansatz.rows * r), random.uniform(0.5, 1.5, r)
    fusion, angles, scale = (torch.tensor(array, dtype=case.dtype, device=device) for array in (fusion, angles, scale))
    return grad.to(device), z.to(device), fusion, angles, scale if "s" in case.options else None


def numbers_of(case, device):
    """Return h and the gradients of z, fusion, angles and the scale, from the kernels."""
    grad, *tensors = inputs(case, device)
    before, join_kernel.PROGRAMS = join_kernel.PROGRAMS, case.programs
    try:
        h = join_kernel.forward(*tensors, case.joint)
        gradients = join_kernel.backward(grad, *tensors, case.joint)
    finally:
        join_kernel.PROGRAMS = before
    return [None if x is None else x.cpu() for x in (h, *gradients)]


def expected(case):
    """Return the same of the formula in float64, by autograd in PyTorch."""
    grad, *tensors = (None if x is None else x.double() for x in inputs(case))
    z, fusion, angles, scale = (None if x is None else x.requires_grad_() for x in tensors)
    w_c, w_q = (case.gain * fusion).view(2, case.rank, case.rank)
    circuit = Circuit(angles.view(-1, case.rank), case.ansatz, Simulation(), scale, "b" in case.options)
    with torch_engine.in_pytorch():
        h = Bottleneck(w_c, w_q, circuit, "p" in case.options)(z)
        gradients = torch.autograd.grad((grad * h).sum(), [x for x in (z, fusion, angles, scale) if x is not None])
    return [h.detach(), *gradients] if scale is not None else [h.detach(), *gradients, None]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Return the numbers of every case, from the interpreter."""
    path = tmp_path_factory.mktemp("interpreted") / "numbers"
    triton_runs.interpreted(INTERPRETED, path)
    return dict(zip(CASES, torch.load(path), strict=True))


@pytest.fixture(params=[pytest.param("interpreter", marks=pytest.mark.slow), pytest.param("cuda", marks=on_gpu)])
def numbers(request):
    """Return a function from a case to h and the gradients."""
    if request.param == "interpreter":
        every = request.getfixturevalue("interpreted")
        return lambda case: every[case][0]
    return lambda case: numbers_of(case, "cuda")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_formula(case, numbers):
    for found, wanted, given in zip(numbers(case), expected(case), (None, *inputs(case)[1:]), strict=True):
        if wanted is None:
            assert found is None
            continue
        dtype = case.z_dtype or case.dtype if given is None else given.dtype
        assert (found.dtype, found.shape) == (dtype, wanted.shape)
        largest = max([1.0, *wanted.abs().flatten().tolist()])
        allowed = TOLERANCE[case.dtype] * largest + ROUNDING.get(dtype, 0) * wanted.abs()
        assert ((found - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("case", BY_QISKIT, ids=str)
def test_values_match_qiskit(case, numbers):
    _, z, fusion, angles, scale = (None if x is None else x.numpy() for x in inputs(case))
    encoded = z if scale is None else z * scale
    encoded = math.pi * np.tanh(encoded / math.pi) if "b" in case.options else encoded
    w_c, w_q = case.gain * fusion.reshape(2, case.rank, case.rank)
    linear, branch = z @ w_c.T, expectations(case.ansatz, encoded, angles.reshape(-1, case.rank)) @ w_q.T
    wanted = linear * branch if "p" in case.options else linear + branch
    assert np.abs(numbers(case)[0].numpy() - wanted).max() <= 1e-10


@pytest.mark.slow
def test_repeated_runs_give_the_same_bits(interpreted):
    repeated = [runs for runs in interpreted.values() if len(runs) > 1]
    assert len(repeated) == len(REPEATED)
    assert all(torch.equal(a, b) for first, second in repeated for a, b in zip(first, second, strict=True) if a is not None)


@pytest.mark.parametrize("tokens", [1, 2, 3, 2047, 2048, 2049, 8192, 100_000])
@pytest.mark.parametrize("block", [1, 2, 32])
@pytest.mark.parametrize("limit", [1, 7, 1024])
def test_every_token_has_one_program(tokens, block, limit):
    span, programs = join_kernel.split(tokens, block, limit)
    assert span % block == 0
    assert 1 <= programs <= limit
    assert (programs - 1) * span < tokens <= programs * span


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Return the list of what was compiled instead of launched."""
    yield from triton_runs.compiling(monkeypatch, tmp_path)


def run(case):
    grad, *tensors = inputs(case)
    join_kernel.forward(*tensors, case.joint)
    join_kernel.backward(grad, *tensors, case.joint)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(Ansatz(8, 2), 8, 17, torch.float32, torch.bfloat16, "bs"),
        Case(Ansatz(4, 2), 64, 17, torch.float32, torch.bfloat16, "bsp"),
    ],
    ids=str,
)
def test_compiles_for_a_gpu_without_spilling(case, compiled, capfd):
    run(case)
    assert len(compiled) == 3  # launches
    reports = [line for line in capfd.readouterr().out.splitlines() if "spill stores" in line]
    assert len(reports) >= 3
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in reports)
    assert all(kernel.metadata.shared <= 2048 for kernel in compiled)  # two tiles: no states


@pytest.mark.slow
def test_compiled_once_for_any_tokens_layers_rank_and_gain(compiled):
    for tokens, layers, rank, gain in ((1, 1, 1, 1.0), (3, 1, 2, 0.5), (16, 3, 16, 1.0), (160, 1, 48, 1.0)):
        run(Case(Ansatz(1, layers), rank, tokens, torch.float32, gain=gain))
    assert len(compiled) == 12
    assert len({kernel.hash for kernel in compiled}) == 3


class TestOnAGPU:
    """What only a GPU can show."""

    pytestmark = on_gpu
    case = Case(Ansatz(8, 2), 8, 5001, torch.float32, options="bs")

    def test_many_tokens(self):
        for case in (self.case, Case(Ansatz(4, 2), 32, 5001, torch.float32, options="bsp")):
            for found, wanted in zip(numbers_of(case, "cuda"), expected(case), strict=True):
                assert (found - wanted).abs().max() <= 2e-5 * max(1, wanted.abs().max())  # sums of 5001 terms

    def test_repeated_runs_give_the_same_bits(self):
        runs = [numbers_of(self.case, "cuda") for _ in range(3)]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))

    def test_half_precision_is_rounded_at_the_end(self):
        _, z, *others = inputs(self.case, "cuda")
        for dtype in ROUNDING:
            low, same = z.to(dtype), z.to(dtype).float()
            found, wanted = (join_kernel.forward(x, *others, self.case.joint) for x in (low, same))
            assert torch.equal(found, wanted.to(dtype))

    def test_the_states_are_not_in_memory(self):
        grad, *tensors = inputs(self.case, "cuda")
        join_kernel.backward(grad, *tensors, self.case.joint)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        join_kernel.backward(grad, *tensors, self.case.joint)
        walls, r = len(program(self.case.ansatz).walls), self.case.rank
        scratch = 2 * r * (r + walls) + 2 * walls * (8 + 2**8)
        # three arrays as long as z, and each program's tables and sums; the states of all programs' tokens would be 20 MB
        assert torch.cuda.max_memory_allocated() - before <= 4 * (4 * self.case.tokens * r + 1.1 * join_kernel.PROGRAMS * scratch)
