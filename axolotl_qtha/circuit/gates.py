"""A circuit in gates whose action on a state is known: fixed ones, and exp(-i angle G) with a Hermitian generator G.

Every gate with an angle has one of its own, a function of the inputs and the trained parameters: mostly a sum of some of them,
times constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from qiskit.circuit import Parameter, QuantumCircuit

_PAULI = {
    "I": np.eye(2),
    "X": np.array([[0, 1], [1, 0]]),
    "Y": np.array([[0, -1j], [1j, 0]]),
    "Z": np.diag([1, -1]),
    "1": np.diag([0, 1]),  # the projector on |1>, of a control
}
# Generators as factors, qubit by qubit, the first qubit first, and a constant: RX = exp(-i angle X / 2).
_GENERATORS = {
    **{f"r{axis.lower()}": (axis, 0.5) for axis in "XYZ"},
    **{f"cr{axis.lower()}": (f"1{axis}", 0.5) for axis in "XYZ"},
    **{f"r{pair.lower()}": (pair, 0.5) for pair in ("XX", "YY", "ZZ", "ZX")},
    "p": ("1", -1.0),
    "cp": ("11", -1.0),
}
FIXED = (
    *("id", "h", "x", "y", "z", "s", "sdg", "t", "tdg", "sx", "sxdg"),
    *("cx", "cy", "cz", "ch", "cs", "csdg", "csx", "swap", "iswap", "ecr", "dcx", "ccx", "ccz", "cswap"),
)
KNOWN = (*_GENERATORS, *FIXED)


def product(letters: str) -> np.ndarray:
    """Return the Kronecker product of Pauli matrices, the first letter that of the qubit with the lowest index."""
    return reduce(lambda matrix, letter: np.kron(_PAULI[letter], matrix), letters, np.eye(1)).astype(complex)


def generator(name: str) -> np.ndarray:
    """Return G of the gate exp(-i angle G), (2**k, 2**k), as Qiskit orders states: the gate's first qubit is the lowest bit."""
    letters, constant = _GENERATORS[name]
    return constant * product(letters)


def unrolled(circuit: QuantumCircuit) -> QuantumCircuit:
    """Return a circuit in gates of `KNOWN`, each parameterised one with a single angle; without barriers and global phase."""
    from qiskit import transpile

    result = circuit.copy_empty_like()
    for entry in circuit.data:
        if entry.operation.name != "barrier":
            result.append(entry)
    if any(entry.operation.name not in KNOWN for entry in result.data):
        result = transpile(result, basis_gates=list(KNOWN), optimization_level=0)
    result.global_phase = 0  # no expectation value sees it
    return result


def angle_of(gate: Any) -> Any:
    """Return the angle of a gate in `KNOWN` if it has free parameters, a `ParameterExpression`, else None.

    Qiskit's `is_parameterized` says no of a controlled rotation.
    """
    angle = next(iter(gate.params), None)
    return angle if getattr(angle, "parameters", None) else None


@dataclass(frozen=True)
class AngleMap:
    """The angles of a circuit's gates, as functions of inputs z and trained parameters.

    All are sums, but for `others`: gate, the parameters it needs (indices into z and the trained ones, one after the other), and
    its function of them.
    """

    of_z: Tensor  # (inputs, gates), float64
    of_trained: Tensor  # (trained, gates)
    offset: Tensor  # (gates)
    others: tuple[tuple[int, tuple[int, ...], Callable[..., Tensor]], ...]

    @property
    def from_z(self) -> np.ndarray:
        """For each gate whether its angle depends on z, (gates)."""
        return self._depends(self.of_z, 0)

    @property
    def from_trained(self) -> np.ndarray:
        """For each gate whether its angle depends on trained parameters, (gates)."""
        return self._depends(self.of_trained, len(self.of_z))

    def _depends(self, matrix: Tensor, first: int) -> np.ndarray:
        result: np.ndarray = (matrix != 0).any(0).numpy()
        for gate, needs, _ in self.others:
            result[gate] = any(first <= index < first + len(matrix) for index in needs)
        return result

    def angles(self, z: Tensor, trained: Tensor) -> Tensor:
        """Return the angle of every gate, (..., gates), in radians; differentiable.

        Args:
            z: inputs, (..., inputs).
            trained: (trained), or of as many axes as z.
        """
        of_z, of_trained, offset = (matrix.to(z.device, z.dtype) for matrix in (self.of_z, self.of_trained, self.offset))
        result = z @ of_z + (trained @ of_trained + offset)
        if not self.others:
            return result
        values = [*z.unbind(-1), *trained.unbind(-1)]
        columns = list(result.unbind(-1))
        for gate, needs, function in self.others:
            columns[gate] = function(*(values[index] for index in needs)).expand_as(columns[gate])
        return torch.stack(columns, dim=-1)

    def back(self, slopes: Tensor, z: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of sum(slopes * angles) for z and the trained parameters, in their shapes."""
        if not self.others:
            of_z, of_trained = self.of_z.to(slopes.device, slopes.dtype), self.of_trained.to(slopes.device, slopes.dtype)
            return slopes @ of_z.T, (slopes @ of_trained.T).sum_to_size(trained.shape)
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (z, trained)]
            grads = torch.autograd.grad(self.angles(*inputs), inputs, slopes)
        return grads[0], grads[1]


def angle_map(expressions: Sequence[Any], inputs: Sequence[Parameter], trained: Sequence[Parameter]) -> AngleMap:
    """Return how gates get their angles.

    Args:
        expressions: of each gate with an angle, a `ParameterExpression` of parameters in `inputs` and `trained`.
        inputs: those that take z.
        trained: the others.
    """
    every = [*inputs, *trained]
    index = {parameter: i for i, parameter in enumerate(every)}
    matrix, offset, others = np.zeros((len(every), len(expressions))), np.zeros(len(expressions)), []
    for gate, expression in enumerate(expressions):
        needs = sorted(expression.parameters, key=lambda parameter: index[parameter])
        slopes = _constant_slopes(expression, needs)
        if slopes is not None:
            matrix[[index[parameter] for parameter in needs], gate] = slopes
            offset[gate] = float(expression.bind(dict.fromkeys(needs, 0.0)))
        else:
            others.append((gate, tuple(index[parameter] for parameter in needs), _function(expression, needs)))
    numbers = torch.from_numpy(matrix)
    return AngleMap(numbers[: len(inputs)], numbers[len(inputs) :], torch.from_numpy(offset), tuple(others))


def _constant_slopes(expression: Any, needs: Sequence[Parameter]) -> list[float] | None:
    """Return the slopes of an expression that is a sum, else None."""
    try:
        slopes = [expression.gradient(parameter) for parameter in needs]
    except RuntimeError:  # Qiskit has no derivative of it: that of a sign
        return None
    return slopes if all(isinstance(slope, (int, float)) for slope in slopes) else None


def _function(expression: Any, needs: Sequence[Parameter]) -> Callable[..., Tensor]:
    """Return an expression as a function of tensors."""
    import sympy

    symbols = sympy.symbols([f"x{i}" for i in range(len(needs))], real=True)
    own = {parameter.sympify(): symbol for parameter, symbol in zip(needs, symbols, strict=True)}
    function: Callable[..., Tensor] = sympy.lambdify(symbols, expression.sympify().subs(own), modules="torch")
    return function
