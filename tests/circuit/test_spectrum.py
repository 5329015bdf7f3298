"""Fourier spectra, against circuits whose series is known."""

import math

import numpy as np
import pytest
import torch
from qiskit.quantum_info import Pauli, Statevector

from axolotl_qtha.circuit import spectrum as module
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.own import called
from axolotl_qtha.circuit.recognised import ansatz_of
from axolotl_qtha.circuit.spectrum import accessible, spectrum

from .test_trainability import uniform

EXACT = 1e-12  # sums of float64 values of at most 1


@pytest.mark.parametrize("layers", [1, 2, 5, 9])
def test_one_qubit(layers):
    """Rotations about one axis add up: <Z> = cos(L z + sum of the angles), so frequency L alone, with |c| = 1/2."""
    ansatz = Ansatz(1, layers)
    frequencies, found = spectrum(uniform(3, 1), uniform(3, ansatz.rows, 1), ansatz)
    assert found.shape == (3, 1, 1, len(frequencies))
    assert accessible(frequencies, found) == [layers]
    assert float((found[..., layers] - 0.5).abs().max()) < EXACT


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_several_qubits_have_up_to_as_many_frequencies_as_uploads(layers):
    ansatz = Ansatz(3, layers)
    frequencies, found = spectrum(uniform(4, 3), uniform(4, ansatz.rows, 3), ansatz)
    assert accessible(frequencies, found) == list(range(layers + 1))


@pytest.mark.parametrize(("qubits", "layers", "expected"), [(1, 2, [4]), (2, 2, range(5)), (2, 3, range(14)), (3, 2, range(5))])
def test_exponential_scales_reach_exponential_frequencies(qubits, layers, expected):
    """`circuit: reuploading`: all whole numbers up to (3^L - 1) / 2, on one qubit, whose rotations add up, the last alone. The
    amplitudes are those of Qiskit's state vectors on a grid of 32 points, which is exact up to frequency 15.
    """
    circuit = ansatz_of(called("reuploading", qubits, layers))
    z, angles = uniform(1, qubits), uniform(1, circuit.rows, 1)
    frequencies, found = spectrum(z, angles, circuit)
    assert accessible(frequencies, found) == list(expected)
    grid = np.arange(32) * 2 * np.pi / 32
    states = [Statevector(circuit.bound([x, *z[0, 1:]], angles[0])) for x in grid]
    for output in range(qubits):
        values = [state.expectation_value(Pauli("Z"), [output]).real for state in states]
        series = np.abs(np.fft.rfft(values))[: len(frequencies)] / 32
        assert np.abs(found[0, 0, output, : len(series)].numpy() - series).max() < EXACT


def test_a_product_of_two_cosines():
    """One ring gate of angle pi on two qubits, worked out by hand: with the controls' rotation z_0 = x and all else 0 but that
    gate, the target stays at |0>, and <Z_0> = cos x.
    """
    ansatz = Ansatz(2, 1)
    angles = torch.zeros(1, 4, 2, dtype=torch.float64)
    angles[0, 0, 0] = math.pi
    _, found = spectrum(torch.zeros(1, 2, dtype=torch.float64), angles, ansatz)
    assert math.isclose(float(found[0, 0, 0, 1]), 0.5, abs_tol=EXACT)  # cos x = (e^ix + e^-ix) / 2
    assert math.isclose(float(found[0, 0, 1, 0]), 1, abs_tol=EXACT)  # the other qubit is at |0>
    assert float(found[0, 0, 0, [0, 2, 3]].abs().max()) < EXACT


def test_parseval():
    """The mean of f^2 over a period is sum |c_w|^2 over positive and negative w: against 1,000 points not on the transform's
    grid.
    """
    ansatz = Ansatz(3, 2)
    z, angles = uniform(1, 3), uniform(1, ansatz.rows, 3)
    _, found = spectrum(z, angles, ansatz)
    moved = z.repeat(1, 1000, 1)
    moved[0, :, 1] = 0.1 + torch.arange(1000) * (2 * math.pi / 1000)
    mean = module.expectations(moved, angles, ansatz).square().mean(1)[0]
    powers = found[0, 1].square()
    assert torch.allclose(powers[:, 0] + 2 * powers[:, 1:].sum(1), mean, atol=EXACT)


def of_function(monkeypatch, function):
    monkeypatch.setattr(module, "expectations", lambda z, angles, ansatz: function(z))
    return spectrum(uniform(1, 1), torch.zeros(1, 2, 1), Ansatz(1, 1))


def test_half_frequencies(monkeypatch):
    """An input of a controlled rotation comes with half frequencies: the period is 4 pi."""
    frequencies, found = of_function(monkeypatch, lambda z: torch.cos(z / 2) + 0.2 * torch.cos(2 * z))
    assert accessible(frequencies, found) == [0.5, 2]


def test_neither_a_period_nor_an_end(monkeypatch):
    with pytest.raises(ValueError, match="no period"):
        of_function(monkeypatch, lambda z: torch.cos(0.3 * z))
    with pytest.raises(ValueError, match="frequencies above 256"):
        of_function(monkeypatch, lambda z: torch.cos(300 * z))
