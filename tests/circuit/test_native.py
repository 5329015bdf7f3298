"""Building the compiled engine, and that it does not depend on threads; its numbers are tested in test_torch_engine.py."""

import subprocess
import sys

import pytest
import torch

from axolotl_qtha.circuit import native
from axolotl_qtha.circuit.ansatz import Ansatz

compiled = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
RUN = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.torch_engine import expectation_values
torch.manual_seed(0)
ansatz = Ansatz(4, 2)
z, angles = torch.randn(50, 4), torch.randn(ansatz.rows, 4)
for _ in range(2):
    result = expectation_values(z, angles, ansatz)
torch.save(result, sys.argv[1])
"""


def inputs(qubits=6, layers=3, tokens=1000, dtype=torch.float32):
    ansatz = Ansatz(qubits, layers)
    generator = torch.Generator().manual_seed(0)
    z, grad = (torch.randn(tokens, qubits, generator=generator, dtype=dtype) for _ in range(2))
    return grad, z, torch.randn(ansatz.rows, qubits, generator=generator, dtype=dtype), ansatz


@compiled
def test_any_number_of_threads_gives_the_same_bits():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            grad, z, angles, ansatz = inputs()
            results.append((native.forward(z, angles, ansatz), *native.backward(grad, z, angles, ansatz)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 511, 513])
def test_blocks_that_are_not_full(tokens):
    grad, z, angles, ansatz = inputs(tokens=tokens, dtype=torch.float64)
    result, (same, grad_z, grad_angles) = native.forward(z, angles, ansatz), native.backward(grad, z, angles, ansatz)
    assert torch.equal(result, same)
    sums = torch.zeros_like(angles)
    for i in range(tokens):
        one = slice(i, i + 1)
        alone = native.backward(grad[one], z[one], angles, ansatz)
        # the same operations on every token, whichever lane it is in
        assert torch.equal(result[one], native.forward(z[one], angles, ansatz))
        assert torch.equal(grad_z[one], alone[1])
        sums += alone[2]
    assert (sums - grad_angles).abs().max() <= 1e-11  # another order of the sum


def in_a_new_process(tmp_path, name, **env):
    path = tmp_path / name
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **env}, check=True
    )
    return torch.load(path), done.stdout + done.stderr


@pytest.mark.slow
@compiled
def test_built_once_then_found(tmp_path):
    cache = tmp_path / "cache"
    first, _ = in_a_new_process(tmp_path, "first", XDG_CACHE_HOME=str(cache))
    (library,) = (cache / "axolotl-qtha").iterdir()
    built = library.stat().st_mtime_ns
    again, _ = in_a_new_process(tmp_path, "again", XDG_CACHE_HOME=str(cache))
    assert library.stat().st_mtime_ns == built
    assert torch.equal(first, again)


@pytest.mark.slow
def test_without_a_compiler_pytorch_runs_and_says_so_once(tmp_path):
    result, log = in_a_new_process(tmp_path, "result", PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert log.count("no C++ compiler") == 1
    expected, _ = in_a_new_process(tmp_path, "expected")
    assert (result - expected).abs().max() <= 1e-5  # float32 rounding, as in test_torch_engine.py


@compiled
def test_a_source_that_does_not_compile(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "circuit.cpp"
    broken.write_text("this is no C++")
    monkeypatch.setattr(native, "SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level("WARNING"):
        assert native.library.__wrapped__() is None
    assert "circuit.cpp could not be built" in caplog.text
    assert "error" in caplog.text


@pytest.mark.slow
@compiled
def test_a_home_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert native.library.__wrapped__() is not None
