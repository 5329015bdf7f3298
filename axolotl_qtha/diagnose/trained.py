"""A trained circuit on the z of data, beside the same circuit with random angles on the same z."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..circuit.ansatz import Ansatz
from ..circuit.expressibility import Expressibility, expressibility, fidelities, meyer_wallach
from ..circuit.readout import jacobians
from ..circuit.statevector import statevectors
from ..circuit.trainability import effective_dimension, fisher
from .study import DATA, DRAWS, SERIES, Fourier, fourier, generator, uniform

FEWEST = 8  # tokens that anything is said of
SAME = 1e-3  # radians: z of one word in the first layer differ by rounding, and their fidelity of 1 would be all that is seen


@dataclass(frozen=True)
class AtAngles:
    """A circuit with given angles, over the tokens."""

    gradient: (
        float  # sum_i (d<Z_i>/d theta_k)^2, mean over tokens and angles: the trace of the Fisher information by their number
    )
    expressibility: Expressibility  # of the states of pairs of tokens
    entangling: float  # mean of Meyer and Wallach's Q
    local_effective: dict[int, float]  # effective dimension at these angles alone, by the number of data points


@dataclass(frozen=True)
class TrainedCircuit:
    """One circuit of one adapted layer."""

    layer: str
    block: int
    qubits: int
    angles: int
    tokens: int
    trained: AtAngles
    random: list[AtAngles]  # the same on the same z, for random angles
    fourier: Fourier  # with the trained angles, around the tokens' z
    effective: dict[int, float]  # over the random angles, on this z


def trained_circuit(layer: str, block: int, z: Tensor, angles: Tensor, ansatz: Ansatz, pairs: int, seed: int) -> TrainedCircuit:
    """Return what is to be said of a trained circuit.

    Args:
        layer: its name.
        block: which of the layer's circuits.
        z: encoded inputs of the tokens, in radians, (tokens, n).
        angles: the trained ones, in radians, (rows, n).
        ansatz: the circuit.
        pairs: of tokens whose states' fidelity is taken.
        seed: of the pairs, and of the random angles.
    """
    random, z, angles = generator(seed, block), z.double().cpu(), angles.double().cpu()
    drawn = uniform(ansatz, DRAWS, random)
    first = torch.randint(len(z), (pairs,), generator=random)
    second = (first + torch.randint(1, len(z), (pairs,), generator=random)) % len(z)  # another token
    apart = (z[first] - z[second]).abs().amax(1) >= SAME
    if bool(apart.any()):
        first, second = first[apart], second[apart]
    found = [_at(z, each, ansatz, (first, second), seed) for each in (angles, *drawn)]
    fishers = torch.stack([information for _, information in found[1:]])
    few = z[torch.randperm(len(z), generator=random)[:SERIES]]
    return TrainedCircuit(
        layer=layer,
        block=block,
        qubits=ansatz.qubits,
        angles=angles.numel(),
        tokens=len(z),
        trained=found[0][0],
        random=[each for each, _ in found[1:]],
        fourier=fourier(few, angles.expand(len(few), -1, -1), ansatz),
        effective={data: effective_dimension(fishers, data) for data in DATA},
    )


def _at(z: Tensor, angles: Tensor, ansatz: Ansatz, pairs: tuple[Tensor, Tensor], seed: int) -> tuple[AtAngles, Tensor]:
    """Return a circuit at some angles, and its Fisher information."""
    own = angles.expand(len(z), -1, -1)
    information = fisher(jacobians(z, own, ansatz))
    with torch.no_grad():
        states = statevectors(z, own, ansatz)
    found = AtAngles(
        gradient=float(information.trace()) / len(information),
        expressibility=expressibility(fidelities(states[pairs[0]], states[pairs[1]]), ansatz.qubits, seed),
        entangling=float(meyer_wallach(states).mean()),
        local_effective={data: effective_dimension(information[None], data) for data in DATA},
    )
    return found, information
