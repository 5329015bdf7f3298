"""The classical networks in the circuits' place, against their formula and PyTorch's own gradients."""

import pytest
import torch
import torch.nn.functional as F
from scipy.special import jv

from axolotl_qtha.tuner import rings

FUNCTIONS = {"silu": F.silu, "sine": torch.sin}


def formula(z, units, size, function):
    """Return q (tokens, r), unit by unit."""
    q = z
    for into, after, before, bias in units.unflatten(0, (-1, 4)):
        columns = []
        for i in range(z.shape[1]):
            first, place = i - i % size, i % size
            left, right = first + (place - 1) % size, first + (place + 1) % size
            columns.append(function(into[i] * z[:, i] + after[i] * q[:, left] + before[i] * q[:, right] + bias[i]))
        q = torch.stack(columns, 1)
    return q


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("name", rings.CLASSICAL)
def test_values_and_gradients_are_those_of_the_formula(name, size):
    generator = torch.Generator().manual_seed(size)
    draw = {"generator": generator, "dtype": torch.float64}
    z, units, grad = torch.randn(5, 6, **draw), torch.randn(12, 6, **draw), torch.randn(5, 6, **draw)
    z.requires_grad_()
    units.requires_grad_()
    expected = formula(z, units, size, FUNCTIONS[name])
    of_z, of_units = torch.autograd.grad((grad * expected).sum(), [z, units])
    with torch.no_grad():
        q, *found = rings.gradients(grad, z, units, size, name)
        assert torch.equal(q, rings.values(z, units, size, name))
    # float64 rounding of three layers' sums, of numbers up to 100
    for ours, theirs in ((q, expected), (found[0], of_z), (found[1], of_units)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_two_layers_of_sines_have_the_spectrum_of_a_phase_modulation():
    """By Jacobi and Anger, sin(z + sin z) is the sum over all whole k of J_k(1) sin((k + 1) z). SciPy's Bessel functions and the
    transform are both exact to 1e-15 or so.
    """
    points = 64
    z = (torch.arange(points, dtype=torch.float64) * 2 * torch.pi / points)[:, None]
    units = torch.tensor([[1.0], [0.0], [0.0], [0.0], [1.0], [1.0], [0.0], [0.0]], dtype=torch.float64)
    found = -2 * torch.fft.rfft(rings.values(z, units, 1, "sine")[:, 0]).imag / points
    for n in range(1, 8):  # sin((k + 1) z) with k = n - 1, and with k = -n - 1, which is -sin(n z)
        assert abs(float(found[n]) - (jv(n - 1, 1) - jv(-n - 1, 1))) <= 1e-13
