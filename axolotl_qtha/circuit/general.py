"""Exact state vectors of any circuit, gate by gate in PyTorch, batched over tokens and circuits side by side.

Slower than the engines of the built-in circuit, see `slowness`. Backward un-computes the state gate by gate (adjoint
differentiation, Jones and Gacon, arXiv 2009.02823), so what it keeps does not depend on the number of gates: of a gate U = exp(-i
angle G) the slope is 2 Im <adjoint| G |state>.

Conjugates are computed at once (`conj_physical`): the first call of a compiled function runs operators below the dispatch key
that would resolve those that are only marked.

States are (tokens, circuits, 2**n), complex, in Qiskit's order: qubit 0 is the lowest bit.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..timing import seconds
from .gates import AngleMap, angle_map, angle_of, generator, unrolled
from .own import OwnCircuit, known

CHUNK_AMPLITUDES = 2**18  # of a chunk of tokens: 2 MiB in single precision
Entries = dict[tuple[int, int], "complex | Tensor"]  # a matrix without its zeros


@dataclass(frozen=True)
class Step:
    """One gate: a fixed matrix, or exp(-i angle G) as a sum over the eigenvalues of G."""

    qubits: tuple[int, ...]
    angle: int | None  # which of the gates' angles; None: fixed
    matrix: Entries  # the gate's, or its generator's
    spectrum: tuple[tuple[float, Entries], ...] = ()  # eigenvalues of G, and the projectors on their spaces


@dataclass(frozen=True)
class Plan:
    """A circuit as it is run."""

    qubits: int
    steps: tuple[Step, ...]
    angles: AngleMap
    uses_z: tuple[bool, ...]  # which gates' angles differ from token to token


@lru_cache(maxsize=64)
def plan(gate_order: str) -> Plan:
    """Return the plan of the circuit with this `gate_order`."""
    own = known(gate_order)
    flat = unrolled(own.circuit)
    steps, expressions = list[Step](), list[Any]()
    for entry in flat.data:
        qubits, name = tuple(flat.find_bit(qubit).index for qubit in entry.qubits), entry.operation.name
        if (angle := angle_of(entry.operation)) is not None:
            matrix = generator(name)
            steps.append(Step(qubits, len(expressions), _entries(matrix), _spectrum(matrix)))
            expressions.append(angle)
        elif name != "id":
            steps.append(Step(qubits, None, _entries(entry.operation.to_matrix())))
    angles = angle_map(expressions, own.inputs, own.trained)
    return Plan(flat.num_qubits, tuple(steps), angles, tuple(angles.from_z.tolist()))


def _entries(matrix: np.ndarray) -> Entries:
    return {(int(i), int(j)): complex(matrix[i, j]) for i, j in np.argwhere(np.abs(matrix) > 1e-14)}


def _spectrum(matrix: np.ndarray) -> tuple[tuple[float, Entries], ...]:
    values, vectors = np.linalg.eigh(matrix)
    parts = []
    for value in np.unique(values.round(9)):
        space = vectors[:, np.isclose(values, value)]
        parts.append((float(value), _entries(space @ space.conj().T)))
    return tuple(parts)


def _gate(step: Step, angles: Tensor, uses_z: tuple[bool, ...]) -> Entries:
    """Return the matrix of a gate; entries (tokens or 1, circuits) where it has an angle."""
    if step.angle is None:
        return step.matrix
    angle = angles[..., step.angle]
    angle = angle if uses_z[step.angle] else angle[:1]
    found: Entries = {}
    for value, projector in step.spectrum:
        phase = torch.polar(torch.ones_like(angle), -value * angle) if value else 1.0
        for place, entry in projector.items():
            found[place] = found.get(place, 0.0) + entry * phase
    return found


def _adjoint(matrix: Entries) -> Entries:
    return {
        (j, i): torch.conj_physical(entry) if isinstance(entry, Tensor) else entry.conjugate() for (i, j), entry in matrix.items()
    }


def _applied(state: Tensor, qubits: tuple[int, ...], matrix: Entries) -> Tensor:
    """Return matrix @ state on some qubits, for states (..., tokens, circuits, 2**n)."""
    n, lead = state.shape[-1].bit_length() - 1, state.shape[:-1]
    result = torch.zeros_like(state)
    axes = state.view(*lead, *[2] * n), result.view(*lead, *[2] * n)

    def part(tensor: Tensor, index: int) -> Tensor:
        picked: list[slice | int] = [slice(None)] * n
        for bit, qubit in enumerate(qubits):
            picked[n - 1 - qubit] = index >> bit & 1
        return tensor[(..., *picked)]

    rest = (1,) * (n - len(qubits))
    for (i, j), entry in matrix.items():
        factor = entry.reshape(*entry.shape, *rest) if isinstance(entry, Tensor) else entry
        part(axes[1], i).add_(part(axes[0], j) * factor)
    return result


def states(z: Tensor, angles: Tensor, gate_order: str) -> Tensor:
    """Return the final states, (tokens, circuits, 2**n), of z (tokens, circuits, inputs) and angles (circuits, trained)."""
    return _run(plan(gate_order), plan(gate_order).angles.angles(z, angles))


def _run(how: Plan, angles: Tensor) -> Tensor:
    complex_of = {torch.float32: torch.complex64, torch.float64: torch.complex128}
    state = torch.zeros(*angles.shape[:-1], 2**how.qubits, dtype=complex_of[angles.dtype], device=angles.device)
    state[..., 0] = 1
    for step in how.steps:
        state = _applied(state, step.qubits, _gate(step, angles, how.uses_z))
    return state


@lru_cache(maxsize=64)
def _observables(labels: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor | None, Tensor]]:
    """Return each Pauli observable as (where its entry of each row is, None on the diagonal; that entry), (2**n) each."""
    found: list[tuple[Tensor | None, Tensor]] = []
    for label in labels:
        rows = torch.arange(2 ** len(label), device="cpu")
        column, entry = rows, torch.ones(len(rows), dtype=torch.complex128, device="cpu")
        for qubit, letter in enumerate(reversed(label)):
            sign = 1.0 - 2.0 * (rows >> qubit & 1)
            column = column ^ (1 << qubit) if letter in "XY" else column
            entry = entry * (sign if letter == "Z" else -1j * sign if letter == "Y" else 1.0)
        found.append((column.to(device) if set(label) & set("XY") else None, entry.to(device, dtype)))
    return found


def _observed(state: Tensor, observable: tuple[Tensor | None, Tensor]) -> Tensor:
    column, entry = observable
    return (state if column is None else state[..., column]) * entry


def _expectations(state: Tensor, own: OwnCircuit) -> Tensor:
    found, conjugate = _observables(own.observables, state.device, state.dtype), torch.conj_physical(state)
    return torch.stack([(conjugate * _observed(state, each)).sum(-1).real for each in found], dim=-1)


def _chunks(z: Tensor, angles: Tensor, own: OwnCircuit) -> Iterator[slice]:
    size = max(1, CHUNK_AMPLITUDES // (angles.shape[1] << own.circuit.num_qubits))
    for start in range(0, z.shape[0], size):
        yield slice(start, start + size)


def values(z: Tensor, angles: Tensor, gate_order: str) -> Tensor:
    """Return the expectation values, (tokens, width), of z (tokens, width) and angles (trained, circuits), in radians."""
    own, how = known(gate_order), plan(gate_order)
    by_circuit, result = z.unflatten(1, (-1, len(own.inputs))), torch.empty_like(z)
    for part in _chunks(z, angles, own):
        state = _run(how, how.angles.angles(by_circuit[part], angles.T))
        result[part] = _expectations(state, own).flatten(1)
    return result


def values_and_gradients(grad: Tensor, z: Tensor, angles: Tensor, gate_order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the expectation values, and the gradients of sum(grad * values) for z and the angles."""
    own, how = known(gate_order), plan(gate_order)
    by_circuit, weights = z.unflatten(1, (-1, len(own.inputs))), grad.unflatten(1, (-1, len(own.inputs)))
    result, grad_z, grad_angles = torch.empty_like(z), torch.empty_like(z), torch.zeros_like(angles)
    for part in _chunks(z, angles, own):
        of_gates = how.angles.angles(by_circuit[part], angles.T)
        state = _run(how, of_gates)
        result[part] = _expectations(state, own).flatten(1)
        found = _observables(own.observables, state.device, state.dtype)
        adjoint = sum(_observed(state, each) * weights[part, :, k, None] for k, each in enumerate(found))
        slopes = _slopes(how, of_gates, torch.stack([state, adjoint]))
        of_z, of_angles = how.angles.back(slopes, by_circuit[part], angles.T)
        grad_z[part] = of_z.flatten(1)
        grad_angles += of_angles.T
    return result, grad_z, grad_angles


def _slopes(how: Plan, angles: Tensor, both: Tensor) -> Tensor:
    """Return the slope of each gate's angle, (tokens, circuits, gates), from the final state and its adjoint, side by side."""
    slopes = torch.zeros_like(angles)
    for step in reversed(how.steps):
        if step.angle is not None:
            turned = _applied(both[0], step.qubits, step.matrix)
            slopes[..., step.angle] = 2 * (torch.conj_physical(both[1]) * turned).sum(-1).imag
        both = _applied(both, step.qubits, _adjoint(_gate(step, angles, how.uses_z)))
    return slopes


Engine = Callable[[Tensor, Tensor, Tensor], object]  # of grad, z and angles


def slowness(own: OwnCircuit, built_in: Engine, shape: tuple[int, int], tokens: int = 256) -> tuple[float, float]:
    """Return how long values and gradients of some tokens take on this machine's CPU, in seconds, and how many times the built-in
    circuit's; medians of runs side by side.

    Args:
        own: the circuit.
        built_in: what runs the built-in circuit, forward and backward.
        shape: of its table of angles.
        tokens: how many.
    """
    random, cpu = torch.Generator("cpu").manual_seed(0), torch.device("cpu")

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random, device="cpu", dtype=torch.float32)

    z, theirs = draw(tokens, len(own.inputs)), draw(tokens, shape[1])
    angles, of_built_in = draw(len(own.trained), 1), draw(*shape)
    times = [
        (
            seconds(lambda: values_and_gradients(z, z, angles, own.gate_order), cpu),
            seconds(lambda: built_in(theirs, theirs, of_built_in), cpu),
        )
        for _ in itertools.repeat(None, 5)
    ]
    ours, others = (statistics.median(each) for each in zip(*times[1:], strict=True))  # the first one starts engines
    return ours, ours / others
