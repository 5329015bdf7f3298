"""All engines of this machine on one circuit, compared with Qiskit.

Values are compared with Qiskit's `Statevector`, gradients with the parameter shift run exactly on Aer in double precision. Where
the configuration asks for shots or noise, its values are compared with those of Aer run by hand on the same transpiled circuit,
and of a fake device with the device's own simulation: exact ones to rounding, those of shots in standard errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from ..circuit import torch_engine
from ..circuit.aer import Engine
from ..circuit.ansatz import Ansatz
from ..circuit.noise import FAKE
from ..circuit.simulation import Simulation
from ..tuner.backends import expectation_values
from .noisy import DEVICE_SHOTS, by_device, by_hand

STANDARD_ERRORS = 5.0
BY_HAND = ": Aer by hand"
EXACT, SINGLE = 1e-10, 1e-5  # of two exact density matrices in double and in single precision
REFERENCE = Simulation("aer")  # of the gradients


@dataclass(frozen=True)
class Row:
    """How far one engine is off: the largest differences, and whether they are within the tolerance."""

    engine: str
    values: float
    gradients: float | None  # None: not compared
    unit: str  # of `values`: "" or "standard errors"
    passed: bool


def compare(ansatz: Ansatz, simulation: Simulation, tokens: int, tolerance: float, seed: int, blocks: int = 1) -> Iterator[Row]:
    """Yield a row for every engine present, on random angles within a turn, for so many circuits side by side."""
    random = np.random.default_rng(seed)
    z = random.uniform(-np.pi, np.pi, (tokens, blocks * ansatz.width))
    angles = random.uniform(-np.pi, np.pi, (ansatz.rows, ansatz.columns(z.shape[1])))
    weights = random.normal(size=z.shape)
    exact = Engine(ansatz, REFERENCE, None)
    parts = zip(np.split(z, blocks, axis=1), np.split(angles, blocks, axis=1), strict=True)
    values = np.concatenate([_statevector(ansatz, *part) for part in parts], axis=1)
    gradients = exact.gradients(weights, z, angles)
    for name, dtype, device, how, plain in _engines(ansatz):
        inputs = [torch.tensor(array, dtype=dtype, device=device, requires_grad=True) for array in (z, angles)]
        with torch_engine.in_pytorch() if plain else nullcontext():
            result = expectation_values(inputs[0], inputs[1], ansatz, how)
            grads = torch.autograd.grad((result * torch.tensor(weights).to(result)).sum(), inputs)
        off = _largest(result, values)
        grads_off = max(_largest(grad, expected) for grad, expected in zip(grads, gradients, strict=True))
        reference = how == REFERENCE  # its own gradients would be compared with themselves
        yield Row(name, off, None if reference else grads_off, "", max(off, grads_off) <= tolerance)
    if simulation.noise_model != "none" or simulation.shots is not None:
        yield from _noisy(ansatz, simulation, np.split(z, blocks, axis=1), np.split(angles, blocks, axis=1), seed)


def _engines(ansatz: Ansatz) -> Iterator[tuple[str, torch.dtype, str, Simulation, bool]]:
    """Yield name, dtype, device, simulation, and whether the exact engine is kept to PyTorch."""
    from qiskit_aer import AerSimulator

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.float32, torch.float64):
            kind = f"{device}, {str(dtype).removeprefix('torch.')}"
            if torch_engine.fused(torch.empty(1, ansatz.width, dtype=dtype, device=device), ansatz):
                yield f"torch, {kind}, {'compiled' if device == 'cpu' else 'Triton'}", dtype, device, Simulation(), False
            yield f"torch, {kind}, PyTorch", dtype, device, Simulation(), True
    yield "aer, double", torch.float64, "cpu", REFERENCE, False
    yield "aer, single", torch.float32, "cpu", Simulation("aer", precision="single"), False
    if "GPU" in AerSimulator().available_devices():
        yield "aer_gpu, double", torch.float64, "cpu", Simulation("aer_gpu"), False


def _noisy(ansatz: Ansatz, simulation: Simulation, z: list[np.ndarray], angles: list[np.ndarray], seed: int) -> Iterator[Row]:
    """Compare shots and noise, as the configuration has them, with Aer run by hand, and with a fake device's own simulation."""
    name = f"{simulation.backend}, noise_model {simulation.noise_model}, {simulation.shots or 'no'} shots"
    # first, since it refuses what does not fit the memory
    exact = Engine(ansatz, dataclasses.replace(simulation, backend="aer", shots=None, precision="double"), None)
    inputs, trained = (torch.tensor(np.concatenate(parts, axis=1)) for parts in (z, angles))
    asked = expectation_values(inputs, trained, ansatz, simulation).numpy()
    hand = np.concatenate([by_hand(ansatz, simulation, *part) for part in zip(z, angles, strict=True)], axis=1)
    if simulation.shots is None:
        off = float(np.abs(asked - hand).max())
        # both are exact: rounding alone, in the configured precision
        yield Row(f"{name}{BY_HAND}", off, None, "", off <= (EXACT if simulation.precision == "double" else SINGLE))
    else:
        yield _counted(f"{name}{BY_HAND}", asked, hand, simulation.shots)
    if simulation.noise_model.startswith(FAKE):
        # without shots of our own, and at angles of zero too, where what is read wrongly shows best
        zero = np.zeros_like(z[0][:1]), np.zeros_like(angles[0])
        for what, point in (("", (z[0], angles[0])), (", all angles 0", zero)):
            ours = exact.expectations(exact.gates.points(*point))
            theirs = by_device(ansatz, simulation.noise_model, *point, seed)
            yield _counted(f"{simulation.noise_model}: the device's own {DEVICE_SHOTS:,} shots{what}", theirs, ours, DEVICE_SHOTS)


def _counted(name: str, counted: np.ndarray, exact: np.ndarray, shots: int) -> Row:
    """Compare values of shots with exact ones, in the standard errors of these shots."""
    # a value of +-1 has no spread; half a shot keeps rounding from counting as an infinity of standard errors
    error = np.sqrt((1 - exact**2).clip(0) / shots) + 0.5 / shots
    off = float((np.abs(counted - exact) / error).max())
    return Row(name, off, None, "standard errors", off <= STANDARD_ERRORS)


def _statevector(ansatz: Ansatz, z: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Return <Z_i>, (tokens, n), from Qiskit's `Statevector`."""
    from qiskit.quantum_info import Pauli, Statevector

    described = ansatz.described()
    observables = [Pauli(label) for label in described.observables]
    trained = dict(zip(described.trained, angles.reshape(-1), strict=True))
    rows = []
    for token in z:
        values = trained | dict(zip(described.inputs, token, strict=True))
        state = Statevector(described.circuit.assign_parameters(values))
        rows.append([state.expectation_value(observable).real for observable in observables])
    return np.array(rows)


def _largest(result: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(result.detach().cpu().double().numpy() - expected).max())


def table(rows: list[Row], ansatz: Ansatz, blocks: int = 1) -> Table:
    """Return the comparison as a table."""
    what = f"{ansatz.qubits} qubits, {ansatz.layers} layers" + (f", {blocks} side by side" if blocks > 1 else "")
    table = Table(title=f"{what}: largest differences from Qiskit")
    for column in ("engine", "values", "gradients", ""):
        table.add_column(column, justify="right" if column in ("values", "gradients") else "left")
    for row in rows:
        values = f"{row.values:.1f} {row.unit}" if row.unit else f"{row.values:.1e}"
        gradients = "not compared" if row.gradients is None else f"{row.gradients:.1e}"
        table.add_row(row.engine, values, gradients, "ok" if row.passed else "OFF")
    return table


def verdict(rows: list[Row], tolerance: float) -> str:
    """Return the comparison in a sentence."""
    off = [row for row in rows if not row.passed]
    noisy = [row.engine for row in off if row.unit or BY_HAND in row.engine]
    exact = [row.engine for row in off if row.engine not in noisy]
    words = f"Off by more than {tolerance:g}: {'; '.join(exact)}." if exact else "" if noisy else f"All within {tolerance:g}."
    words += f" Off by more than chance or rounding explain: {'; '.join(noisy)}." if noisy else ""
    if any(row.unit for row in rows):
        words += f" With shots up to {STANDARD_ERRORS:g} standard errors pass as chance."
    if any(BY_HAND in row.engine and not row.unit for row in rows):
        words += f" Noise without shots is exact in both ways: {EXACT:g} passes ({SINGLE:g} in single precision)."
    return words.strip()
