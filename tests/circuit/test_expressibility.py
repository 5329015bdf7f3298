"""Expressibility and entanglement, against what is known of Haar-random, product and GHZ states."""

import math

import numpy as np
import pytest
import torch
from qiskit.quantum_info import partial_trace, random_statevector
from scipy.integrate import quad

from axolotl_qtha.circuit.expressibility import (
    BINS,
    expressibility,
    fidelities,
    haar_meyer_wallach,
    log_haar,
    meyer_wallach,
)


def haar(count, qubits, seed=0):
    """Return Haar-random states: normalised complex Gaussian vectors."""
    random = np.random.default_rng(seed)
    states = random.normal(size=(count, 2**qubits)) + 1j * random.normal(size=(count, 2**qubits))
    return torch.tensor(states / np.linalg.norm(states, axis=1, keepdims=True))


def kron(*parts):
    result = torch.ones(1, dtype=torch.complex128)
    for part in parts:
        result = torch.kron(result, part)
    return result


def ghz(qubits):
    state = torch.zeros(1, 2**qubits, dtype=torch.complex128)
    state[0, [0, -1]] = 2**-0.5
    return state


@pytest.mark.parametrize("qubits", [1, 2, 4])
def test_bins_are_the_integral_of_the_density(qubits):
    size = 2**qubits
    for k in (0, 1, 40, BINS - 1):
        expected, _ = quad(lambda f: (size - 1) * (1 - f) ** (size - 2), k / BINS, (k + 1) / BINS, epsabs=0)
        assert math.isclose(math.exp(log_haar(qubits)[k]), expected, rel_tol=1e-9)  # quad's own accuracy
    assert math.isclose(np.exp(log_haar(qubits)).sum(), 1, rel_tol=1e-12)
    assert np.isfinite(log_haar(12)).all()


@pytest.mark.parametrize("qubits", [1, 2, 4, 6])
def test_haar_random_states_cannot_be_told_from_haar(qubits):
    """The estimate is that of Haar-random fidelities, within 5 of its standard deviations, and so is the known bias."""
    states = haar(8000, qubits)
    found = expressibility(fidelities(states[::2], states[1::2]), qubits)
    assert abs(found.kl - found.haar) < 5 * found.haar_std
    expected = 4000 * np.exp(log_haar(qubits))
    often = (expected > 5).sum()  # 2 M KL has about a chi-squared law, with a degree of freedom for each bin but one
    assert 0.8 * (often - 1) / 8000 < found.haar < (often + 15) / 8000
    assert found.pairs == 4000
    assert math.isclose(sum(found.histogram), 1)


def test_one_state_alone_is_as_far_from_haar_as_it_gets():
    """All fidelities are 1, in the last bin: KL = -log of its Haar share, 15 log 75 for 4 qubits."""
    state = haar(1, 4).expand(100, -1)
    assert math.isclose(expressibility(fidelities(state, state), 4).kl, 15 * math.log(75), rel_tol=1e-9)


def test_a_rotation_about_one_axis():
    """RY(t)|0>, t uniform: F = cos^2 of a uniform angle, whose law is the arcsine's; KL to 1 qubit's uniform law is log(pi) - 2
    log 2 + ..., here by the exact bin shares. The standard deviation of the estimate of 50,000 pairs is about 0.003.
    """
    angle = torch.rand(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * math.pi
    share = np.diff(2 / math.pi * np.arcsin(np.sqrt(np.linspace(0, 1, BINS + 1))))
    exact = (share * np.log(share * BINS)).sum()
    assert abs(expressibility(torch.cos(angle).square(), 1).kl - exact) < 0.015


def test_bad_fidelities():
    for bad in ([], [0.5, math.nan], [1.5]):
        with pytest.raises(ValueError, match="normalised states"):
            expressibility(torch.tensor(bad), 2)


def test_product_states_have_no_entanglement():
    product = kron(*(haar(1, 1, seed)[0] for seed in range(5)))[None]
    assert abs(float(meyer_wallach(product))) < 1e-14  # rounding of float64


@pytest.mark.parametrize("qubits", [2, 3, 6])
def test_ghz_states_have_all_of_it(qubits):
    assert math.isclose(float(meyer_wallach(ghz(qubits))), 1, abs_tol=1e-14)


def test_a_bell_pair_beside_a_product():
    state = kron(ghz(2)[0], *(haar(1, 1, seed)[0] for seed in range(2)))[None]
    assert math.isclose(float(meyer_wallach(state)), 0.5, abs_tol=1e-14)  # two of four qubits are maximally mixed


def test_against_qiskits_partial_trace():
    state = random_statevector(16, seed=3)
    purities = [partial_trace(state, [k for k in range(4) if k != i]).purity().real for i in range(4)]
    assert math.isclose(float(meyer_wallach(torch.tensor(state.data)[None])), 2 * (1 - np.mean(purities)), abs_tol=1e-13)


@pytest.mark.parametrize("qubits", [2, 4, 6])
def test_the_mean_of_haar_random_states(qubits):
    q = meyer_wallach(haar(4000, qubits))
    assert abs(float(q.mean()) - haar_meyer_wallach(qubits)) < 5 * float(q.std()) / 4000**0.5  # standard errors
