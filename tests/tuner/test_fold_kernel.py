"""The GPU's kernel that folds, against the products of `fold.py` in float64: in Triton's interpreter, and on a GPU.

The products themselves are tested against TensorLy and finite differences in test_fold.py. The interpreter is chosen before
Triton is imported, so it has a process of its own: one for all cases.
"""

import re

import pytest
import torch

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner import fold_kernel
from axolotl_qtha.tuner.fold import fold
from axolotl_qtha.tuner.side import sides, sides_of
from axolotl_qtha.tuner.sizes import adapter_shape
from axolotl_qtha.tuner.table import table, tensor_sizes

from .. import triton_runs

# Sums of at most some thousand products, of the norm: rounding of 6e-8 or 1e-16 that averages out. Results in 16 bits: theirs.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# (in, out), rank, cores or "none", bond, mid, W_C joined, dtype of the tensors, of the results
F64 = torch.float64
CASES = [((21, 35), 5, 2, 6, 9, fused, dtype, dtype) for fused, dtype in ((False, torch.float32), (False, F64), (True, F64))]
CASES += [((21, 35), 5, cores, 6, 9, fused, F64, F64) for cores in (1, "none") for fused in (False, True)]
CASES += [((13, 17), 3, cores, 5, 7, True, F64, F64) for cores in (1, 2, "none")]  # primes: padded
CASES += [((12, 10), 1, 2, 1, 1, fused, F64, F64) for fused in (False, True)]
CASES += [((12, 24), 4, 2, 500, 6, True, F64, F64)]  # the bond is as wide as it can be: more than a tile
CASES += [((6, 70), 70, cores, 3, 72, True, F64, F64) for cores in (1, "none")]  # more rows and columns than a tile has
CASES += [((4, 6), 66, 2, 2, 66, fused, F64, F64) for fused in (False, True)]
CASES += [((21, 35), 5, 2, 6, 9, True, torch.float32, dtype) for dtype in (torch.bfloat16, torch.float16)]
CASES += [((90, 8), 4, 2, 4, 6, True, F64, F64)]  # ten of the first factor, for three groups of programs
CASES += [((400, 20), 2, 1, 1, 3, True, F64, F64)]  # seven tiles of columns, for three groups

INTERPRETED = """
import sys, torch
from axolotl_qtha.tuner import fold_kernel
from tests.tuner.test_fold_kernel import CASES, results
results(CASES[0], "cpu")
assert "axolotl_qtha.tuner.fold_triton" not in sys.modules, "imported where it is not needed"
fold_kernel.runs = lambda flat, sides: all(len(side.cores) <= 2 for side in sides)
fold_kernel.GROUPS = 3  # so that a program has several i
alone = lambda case: (0, 1) if case in CASES[2:7] else ()
torch.save([[results(case, "cpu", side) for side in (None, *alone(case))] for case in CASES], sys.argv[1])
assert "axolotl_qtha.tuner.fold_triton" in sys.modules
"""


def sides_in(case, alone=None):
    """Return the sides of a case in their flat tensor, and its size; `alone`: of one side as a tensor of its own."""
    (inputs, outputs), rank, cores, bond, mid, fused, *_ = case
    network = {"mpo": "none"} if cores == "none" else {"num_cores": cores, "bond_dim": bond, "mid_dim": mid}
    share = {} if alone is None else {"share": {"inputs": True}}
    config = QTHAConfig(rank=rank, quantum="none", **network, **share)
    parts = table(config, adapter_shape(config, inputs, outputs))
    name = "cores" if alone is None else f"cores_{'ab'[alone]}"
    return sides(parts, rank, inputs, outputs, config.scaling, fused)[name], tensor_sizes(parts)[name]


def results(case, device, alone=None, exact=False):
    """Return the matrices, and the gradients of the flat tensor and W_C."""
    _, rank, *_, fused, stored, dtype = case
    wanted, size = sides_in(case, alone)
    generator = torch.Generator().manual_seed(0)

    def made(*size):
        value = torch.randn(*size, generator=generator, dtype=torch.float64).to(stored)
        return (value.double() if exact else value).to(device).requires_grad_()

    flat, w_c = made(size), made(rank * rank)
    found = fold(flat, w_c if fused else None, wanted, torch.float64 if exact else dtype)
    weights = [torch.randn(m.shape, generator=generator, dtype=torch.float64).to(dtype).to(device) for m in found]
    total = sum((matrix.double() * weight.double()).sum() for matrix, weight in zip(found, weights, strict=True))
    gradients = torch.autograd.grad(total, (flat, w_c) if fused and wanted.hold_b else (flat,))
    return [tensor.detach().cpu() for tensor in (*found, *gradients)]


def check(case, ours, alone):
    """Compare with float64; gradients of 16-bit results have their rounding too."""
    for found, exact in zip(ours, results(case, "cpu", alone, exact=True), strict=True):
        assert found.shape == exact.shape
        assert (found.double() - exact).norm() <= TOLERANCE[case[-1]] * exact.norm()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    triton_runs.interpreted(INTERPRETED, path)
    return torch.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_in_the_interpreter(index, interpreted):
    for alone, ours in zip((None, 0, 1), interpreted[index], strict=False):
        check(CASES[index], ours, alone)


@pytest.mark.parametrize("case", [pytest.param(case, marks=on_gpu) for case in CASES], ids=str)
def test_on_a_gpu_twice_the_same(case):
    ours = results(case, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(ours, results(case, "cuda"), strict=True))
    check(case, ours, None)


def test_more_cores_are_not_for_the_kernel(monkeypatch):
    monkeypatch.setattr(fold_kernel, "works", lambda: True)
    sizes = {"rank": 4, "quantum": "none", "bond_dim": 3, "mid_dim": 8}
    for cores, taken in ((1, True), (2, True), (3, False)):
        config = QTHAConfig(num_cores=cores, **sizes)
        numbers = sides(table(config, adapter_shape(config, 64, 64)), 4, 64, 64, 1.0, False)["cores"]
        wanted = sides_of(tuple(numbers.numbers), tuple(numbers.gains))
        assert fold_kernel.runs(torch.empty(1, device="meta"), wanted) is False
        assert all(len(side.cores) <= 2 for side in wanted) is taken


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Return the list of what was compiled instead of launched."""
    yield from triton_runs.compiling(monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ((3584, 3584), 8, 2, 6, 9, False, torch.float32, torch.bfloat16),
        ((3584, 18944), 64, 2, 12, 80, True, torch.float32, torch.bfloat16),
        ((3584, 3584), 64, "none", None, None, True, torch.float32, torch.bfloat16),
        ((3584, 3584), 64, 1, 4, 64, True, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_compiles_for_a_gpu_almost_without_spilling(case, compiled, capfd):
    _, rank, *_, fused, stored, dtype = case
    both, size = sides_in(case)
    wanted = sides_of(tuple(both.numbers), tuple(both.gains))
    flat, w_c = torch.empty(size, dtype=stored), torch.empty(rank * rank, dtype=stored)
    w_c = w_c if fused else None
    fold_kernel.backward(fold_kernel.forward(flat, w_c, wanted, dtype), flat, w_c, wanted)
    assert len(compiled) == 3  # launches: one, and two back
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill stores", capfd.readouterr().out)]
    assert len(spilled) >= 3
    assert max(spilled) <= 64  # bytes a thread, of some hundred registers; tiles twice as large spill up to 27 kB
