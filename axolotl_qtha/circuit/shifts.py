"""The circuit with an angle of its own for every gate, and gradients from circuits alone: by shifting angles one by one, or all.

Gradients by parameter shift are exact in expectation, also under noise, since noise does not depend on angles. As a function of
one angle x, <Z> is a sum of sines with few frequencies w: 1 for an RY and other rotations about Pauli operators, 1/2 and 1 for a
CRZ and other controlled ones. So with as many shifts s_k as there are frequencies f'(x) = sum_k c_k (f(x + s_k) - f(x - s_k)),
where c makes the rule hold for each sin(w x) (Anselmetti et al., arXiv 2104.05695).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from qiskit.circuit import ParameterVector
from torch import Tensor

from .ansatz import Ansatz
from .gates import angle_map, angle_of, unrolled

SHIFTS = np.array([np.pi / 2, 3 * np.pi / 2])
_ONE = np.array([0.5])  # differences of the generator's eigenvalues: 1
_TWO = (np.sqrt(2) + np.array([1, -1])) * np.array([1, -1]) / (4 * np.sqrt(2))  # 1/2 and 1
RULES = dict.fromkeys(("rx", "ry", "rz", "p", "cp", "rxx", "ryy", "rzz", "rzx"), _ONE) | dict.fromkeys(
    ("crx", "cry", "crz"), _TWO
)

SPSA_STEP = 0.1  # radians

# (circuits, gates) in radians -> <Z_i> (circuits, n)
Expectations = Callable[[np.ndarray], np.ndarray]


class GateAngles:
    """The circuit of an ansatz, each of whose gates with an angle takes a parameter of its own, `angles[k]`, and where its value
    comes from.
    """

    def __init__(self, ansatz: Ansatz) -> None:
        described = ansatz.described()
        flat = unrolled(described.circuit)
        turned = [gate for gate in flat.data if angle_of(gate.operation) is not None]
        self.kinds = [gate.operation.name for gate in turned]
        self.angles = ParameterVector("angle", len(turned))
        own = iter(self.angles)
        self.circuit = flat.copy_empty_like()
        for gate in flat.data:
            turns = angle_of(gate.operation) is not None
            self.circuit.append(type(gate.operation)(next(own)) if turns else gate.operation, gate.qubits)
        self.observables, self.width, self.columns = described.observables, ansatz.width, ansatz.columns(ansatz.width)
        self.map = angle_map([angle_of(gate.operation) for gate in turned], described.inputs, described.trained)

    def points(self, z: np.ndarray, angles: np.ndarray) -> np.ndarray:
        """Return the angle of every gate, (tokens * B, gates), from z (tokens, B n) and angles (rows, B n) in radians.

        B circuits side by side are B circuits one after the other, token by token. Of the user's own circuits each has one column
        of angles, (rows, B).
        """
        return self.map.angles(self._inputs(z), self._trained(angles)).reshape(-1, len(self.kinds)).numpy()

    def circuits(self, z: np.ndarray) -> int:
        """Return how many circuits side by side z (tokens, B n) is for."""
        return z.shape[1] // self.width

    def _inputs(self, z: np.ndarray) -> Tensor:
        return torch.from_numpy(z).unflatten(1, (-1, self.width))  # (tokens, B, n)

    def _trained(self, angles: np.ndarray) -> Tensor:
        return torch.from_numpy(angles).unflatten(1, (-1, self.columns)).transpose(0, 1).flatten(1)  # (B, rows * columns)

    def wanted(self, wants: tuple[bool, bool]) -> np.ndarray:
        """Return for each gate whether its slope is wanted: those of z, those of the angles."""
        return (self.map.from_z & wants[0]) | (self.map.from_trained & wants[1])

    def back(
        self, slopes: np.ndarray, z: np.ndarray, angles: np.ndarray, wants: tuple[bool, bool] = (True, True)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients for z (tokens, B n) and angles (rows, B n) from the slopes of gates' angles, (tokens * B, gates).

        Those that are not wanted are zero.
        """
        inputs, trained = self._inputs(z), self._trained(angles)
        by_z, by_angles = self.map.back(torch.from_numpy(slopes).reshape(*inputs.shape[:2], -1), inputs, trained)
        table = by_angles.unflatten(1, (-1, self.columns)).transpose(0, 1).flatten(1)
        return by_z.reshape(z.shape).numpy() * wants[0], table.numpy() * wants[1]


@dataclass(frozen=True)
class Slopes:
    """A gradient of sum(grad * <Z>) that is asked of something that can only run circuits."""

    gates: GateAngles
    expectations: Expectations  # what runs the circuit
    grad: np.ndarray  # gradient with respect to <Z>, (tokens, B n) for B circuits side by side
    z: np.ndarray  # encoded inputs in radians, (tokens, B n)
    angles: np.ndarray  # trainable angles in radians, (rows, B n)
    wants: tuple[bool, bool] = (True, True)  # whether those of z and of the angles are needed; others are zero, without circuits

    def by_parameter_shift(self, circuits: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients by parameter shift: (tokens, B n) for z and (rows, B n) for the angles.

        Args:
            circuits: how many to ask for at a time, at least those of one token; None for all at once.
        """
        gates, z, kinds = self.gates, self.z, len(self.gates.kinds)
        grad_z, grad_angles = np.zeros(z.shape), np.zeros(self.angles.shape)
        wanted = np.flatnonzero(gates.wanted(self.wants))
        rows = [(k, c, s) for k in wanted for c, s in zip(RULES[gates.kinds[k]], SHIFTS, strict=False)]
        shifts = np.zeros((2 * len(rows), kinds))
        for i, (k, _, shift) in enumerate(rows):
            shifts[2 * i, k], shifts[2 * i + 1, k] = shift, -shift
        each = max(1, len(shifts)) * gates.circuits(z)
        tokens = len(z) if circuits is None else max(1, circuits // each)
        for start in range(0, len(z) if rows else 0, tokens):
            part = slice(start, start + tokens)
            points = gates.points(z[part], self.angles)
            shifted = (points[:, None] + shifts).reshape(-1, kinds)
            values = self.expectations(shifted).reshape(len(points), len(shifts), -1)
            costs = np.einsum("tsn,tn->ts", values, self.grad[part].reshape(len(points), -1))
            slopes = np.zeros(points.shape)
            for i, (k, coefficient, _) in enumerate(rows):
                slopes[:, k] += coefficient * (costs[:, 2 * i] - costs[:, 2 * i + 1])
            grad_z[part], of_angles = gates.back(slopes, z[part], self.angles, self.wants)
            grad_angles += of_angles
        return grad_z, grad_angles

    def by_spsa(self, draws: int, seed: int, step: float = SPSA_STEP) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients by simultaneous perturbation (Spall 1992): (tokens, B n) for z and (rows, B n) for the angles.

        All wanted angles of a circuit move by +-step at once, each in a random direction, and back: two circuits a draw.
        In expectation a slope is off by the order of step**2 of itself. A draw's spread comes from the slopes of the other
        angles; that of the mean falls with the square root of the draws.

        Args:
            draws: directions per circuit.
            seed: of the directions, which are a function of it and the angles: a run that is repeated asks for the same circuits.
            step: how far the angles move, in radians.
        """
        gates, z, kinds = self.gates, self.z, len(self.gates.kinds)
        points = gates.points(z, self.angles)
        key = hashlib.blake2b(points.tobytes(), digest_size=8, key=seed.to_bytes(8, "big")).digest()
        random = np.random.default_rng(int.from_bytes(key, "big"))
        signs = random.choice([-1.0, 1.0], (len(points), draws, kinds)) * gates.wanted(self.wants)
        moved = points[:, None, None] + step * np.stack([signs, -signs], axis=2)  # (circuits, draws, 2, gates)
        values = self.expectations(moved.reshape(-1, kinds)).reshape(len(points), draws, 2, -1)
        costs = np.einsum("tdsn,tn->tds", values, self.grad.reshape(len(points), -1))
        slopes = np.einsum("td,tdg->tg", (costs[:, :, 0] - costs[:, :, 1]) / (2 * step * draws), signs)
        return gates.back(slopes, z, self.angles, self.wants)


def shift_circuits(gates: GateAngles, wants: tuple[bool, bool] = (True, True)) -> int:
    """Return how many circuits the parameter shift of one circuit takes: 2 for each RY whose slope is wanted, 4 for each CRZ.

    >>> gates = GateAngles(Ansatz(qubits=2, layers=1))
    >>> shift_circuits(gates), shift_circuits(gates, wants=(True, False))
    (28, 4)
    """
    return sum(2 * len(RULES[gates.kinds[k]]) for k in np.flatnonzero(gates.wanted(wants)))
