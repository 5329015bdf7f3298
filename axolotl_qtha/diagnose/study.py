"""A circuit at initialisation, over numbers of qubits and layers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import linregress
from torch import Tensor

from ..circuit.ansatz import GATE_ORDERS, Ansatz
from ..circuit.expressibility import Expressibility, expressibility, fidelities, haar_meyer_wallach, meyer_wallach
from ..circuit.readout import jacobians
from ..circuit.spectrum import accessible, spectrum
from ..circuit.statevector import statevectors
from ..circuit.trainability import GradientVariance, Spread, effective_dimension, fisher, gradient_variance
from ..tuner.config import QTHAConfig
from ..tuner.sizes import ansatz

DATA = (1_000, 10_000, 100_000, 1_000_000)  # numbers of data points that effective dimensions are for
DRAWS, INPUTS = 20, 25  # of the angles, and of z for each, that the Fisher information is taken at
SERIES = 20  # draws that spectra are taken of
AMPLITUDES = 2**21  # of states at one time: 32 MiB

Encode = Callable[[Tensor], Tensor]  # from z to the encoding angles in radians


@dataclass(frozen=True)
class Fourier:
    """What is read out as a Fourier series in one input: |c_w| as root mean square over draws, inputs and outputs."""

    frequencies: list[float]
    amplitudes: list[float]
    accessible: list[float]  # those that any draw, input and output has


@dataclass(frozen=True)
class Study:
    """A circuit at initialisation."""

    qubits: int
    layers: int
    angles: int
    variance: GradientVariance
    expressibility: Expressibility
    entangling: Spread  # Meyer and Wallach's Q: mean over states, and its standard error
    entangling_haar: float
    fourier: Fourier
    effective: dict[int, float]  # effective dimension, by the number of data points
    seconds: float


@dataclass(frozen=True)
class Slope:
    """log2 of a variance of gradients as a straight line in the qubits."""

    cost: str
    layers: int
    qubits: list[int]
    slope: float  # bits a qubit
    error: float  # standard error of the fit


def draws(ansatz: Ansatz, count: int, encode: Encode, generator: torch.Generator, most: float = math.pi) -> tuple[Tensor, Tensor]:
    """Return encoded inputs (count, n) of a standard normal z, and angles (count, rows, n) as an adapter's start: uniform.

    Args:
        ansatz: the circuit.
        count: of draws.
        encode: from z to the encoding angles.
        generator: of the random numbers.
        most: the largest trained angle in radians, `init_angles`.
    """
    here = {"dtype": torch.float64, "device": "cpu"}
    z = torch.randn(count, ansatz.width, generator=generator, **here)  # type: ignore[call-overload]
    return encode(z), uniform(ansatz, count, generator, most)


def uniform(ansatz: Ansatz, count: int, generator: torch.Generator, most: float = math.pi) -> Tensor:
    """Return angles (count, rows, n), uniform in [-most, most], in radians: by default over a turn."""
    shape = (count, *ansatz.angle_shape)
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") - 1) * most


def generator(seed: int, *what: int) -> torch.Generator:
    """Return random numbers of their own for each `what`, so that no study depends on which others are made."""
    state = int(np.random.SeedSequence([seed, *what]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator("cpu").manual_seed(state)


def study(
    circuit: Ansatz,
    encode: Encode,
    initialisations: int,
    pairs: int,
    seed: int,
    layers: int | None = None,
    most: float = math.pi,
) -> Study:
    """Return what is to be said of a circuit at initialisation.

    Args:
        circuit: the circuit.
        encode: from z to the encoding angles.
        initialisations: draws that the variance of gradients is taken over.
        pairs: of states whose fidelities are taken; entanglement is taken of the same states.
        seed: of the random numbers.
        layers: that it has, where the ansatz does not say it: one of the user's own.
        most: the largest trained angle in radians, `init_angles`.
    """
    layers = layers or circuit.layers
    start, random = time.perf_counter(), generator(seed, circuit.qubits, layers)
    variance = gradient_variance(*draws(circuit, initialisations, encode, random, most), circuit)
    overlaps, entangled = _states(circuit, encode, pairs, random, most)
    z, angles = draws(circuit, SERIES, encode, random, most)
    series = fourier(z, angles, circuit)
    many = uniform(circuit, DRAWS, random, most)
    each = [draws(circuit, INPUTS, encode, random)[0] for _ in range(DRAWS)]
    fishers = torch.stack([fisher(jacobians(z, own.expand(INPUTS, -1, -1), circuit)) for z, own in zip(each, many, strict=True)])
    return Study(
        qubits=circuit.qubits,
        layers=layers,
        angles=math.prod(circuit.angle_shape),
        variance=variance,
        expressibility=expressibility(overlaps, circuit.qubits, seed),
        entangling=Spread(float(entangled.mean()), float(entangled.std()) / math.sqrt(len(entangled))),
        entangling_haar=haar_meyer_wallach(circuit.qubits),
        fourier=series,
        effective={data: effective_dimension(fishers, data) for data in DATA},
        seconds=time.perf_counter() - start,
    )


def _states(ansatz: Ansatz, encode: Encode, pairs: int, random: torch.Generator, most: float) -> tuple[Tensor, Tensor]:
    """Return the fidelities of pairs of random states (pairs), and Q of each state (2 pairs)."""
    overlaps, entangled, left = [], [], pairs
    while left:
        many = min(left, max(1, AMPLITUDES >> (ansatz.qubits + 1)))
        with torch.no_grad():
            states = statevectors(*draws(ansatz, 2 * many, encode, random, most), ansatz)
        overlaps.append(fidelities(states[::2], states[1::2]))
        entangled.append(meyer_wallach(states))
        left -= many
    return torch.cat(overlaps), torch.cat(entangled)


def fourier(z: Tensor, angles: Tensor, ansatz: Ansatz) -> Fourier:
    """Return the series of what is read out, of draws z (draws, n) and angles (draws, rows, n)."""
    frequencies, amplitudes = spectrum(z, angles, ansatz)
    there = accessible(frequencies, amplitudes)
    kept = frequencies <= max(there)
    means = amplitudes.square().flatten(0, -2).mean(0).sqrt()
    return Fourier(frequencies[kept].tolist(), means[kept].tolist(), there)


def sized(config: QTHAConfig, qubits: int, layers: int) -> Ansatz:
    """Return an adapter's circuit for so many numbers (of the built-in one: on so many qubits), with so many layers.

    Raises:
        ValueError: naming `circuit`, if one of the user's own cannot be had.
    """
    if config.circuit is not None:
        alone = {"rank_pattern": None, "bond_dim": None, "mid_dim": None}
        return ansatz(config.changed(rank=qubits, qubits=qubits, circuit_layers=layers, **alone))
    order: str = config.gate_order
    if config.quantum == "product":
        order = " ".join(kind for kind in GATE_ORDERS[order] if kind in ("encode", "rotate"))
    return Ansatz(qubits, layers, order)


def slopes(studies: list[Study], qubits: list[int]) -> list[Slope]:
    """Return how the variances fall with these qubits, for each number of layers; of fewer than three sizes there is no line."""
    found = []
    for layers in sorted({each.layers for each in studies}):
        line = [each for each in studies if each.layers == layers and each.qubits in qubits]
        for cost in ("readouts", "local", "global_"):
            points = [(each.qubits, getattr(each.variance, cost).value) for each in line]
            points = [(n, math.log2(value)) for n, value in points if value > 0]
            if len(points) > 2:
                fit = linregress([n for n, _ in points], [value for _, value in points])
                found.append(Slope(cost.rstrip("_"), layers, [n for n, _ in points], float(fit.slope), float(fit.stderr)))
    return found
