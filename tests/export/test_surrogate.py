"""The least squares behind an export, against NumPy's, which solves them in another way (SVD of the tokens themselves)."""

import numpy as np
import pytest
import torch

from axolotl_qtha.export.surrogate import Moments, solve, solve_wide

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def data(tokens=400, features=5, targets=3, noise=0.1):
    """Return features off centre, and targets that are linear in them but for the noise and a constant."""
    f = normal(tokens, features) @ normal(features, features) + normal(features)
    return f, f @ normal(features, targets) + normal(targets) + noise * normal(tokens, targets)


def test_moments_are_sums_over_tokens():
    f, t = data()
    parts = Moments.of(f[:100], t[:100]) + Moments.of(f[100:], t[100:])
    whole = Moments.of(f, t)
    assert parts.tokens == whole.tokens == 400
    for part, full in zip((parts.ff, parts.ft, parts.tt), (whole.ff, whole.ft, whole.tt), strict=True):
        torch.testing.assert_close(part, full, rtol=1e-12, atol=1e-9)
    assert torch.equal(whole.ff, Moments.of(f.flip(0), t.flip(0)).ff.new_tensor(whole.ff.tolist()))


@pytest.mark.parametrize("constant", [True, False])
def test_linear_fit_is_least_squares(constant):
    f, t = data()
    got = solve(Moments.of(f, t), constant)
    columns = np.hstack([f.numpy(), np.ones((len(f), 1))]) if constant else f.numpy()
    expected = np.linalg.lstsq(columns, t.numpy(), rcond=None)[0]
    # the ridge of 1e-8 moves the solution by about that times the condition number, some 1e3 here
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("constant", [True, False])
def test_a_direction_that_is_never_used_gets_no_weight(constant):
    f, t = data()
    f[:, 2] = 0
    got = solve(Moments.of(f, t), constant)
    assert bool(got.isfinite().all())
    assert got[2].abs().max() < 1e-6


def test_all_zero_features_are_no_error():
    got = solve(Moments.of(torch.zeros(50, 3), torch.ones(50, 2)), constant=True)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("constant", [True, False])
def test_wide_fit_is_least_squares_where_tokens_abound(constant):
    f, t = data(tokens=4000, noise=1e-3)
    got = solve_wide(Moments.of(f, t), constant)
    columns = np.hstack([f.numpy(), np.ones((len(f), 1))]) if constant else f.numpy()
    expected = np.linalg.lstsq(columns, t.numpy(), rcond=None)[0]
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-3)  # the smallest ridge of the grid is 1e-6


def test_wide_fit_with_few_tokens_does_not_learn_them_by_heart():
    f, noise = normal(60, 50), normal(60, 2)
    truth = torch.zeros(50, 2, dtype=torch.float64)
    truth[:3] = 1
    seen = f @ truth + noise
    got = solve_wide(Moments.of(f, seen), constant=False)
    plain = torch.linalg.lstsq(f, seen).solution
    new = normal(2000, 50)
    error = [float((new @ (weights - truth)).square().mean()) for weights in (got, plain, torch.zeros_like(truth))]
    assert error[0] < 0.5 * error[1]
    assert error[0] < error[2]  # better than nothing, too


def test_wide_fit_takes_fewer_tokens_than_features():
    f, t = data(tokens=20, features=50)
    assert bool(solve_wide(Moments.of(f, t), constant=False).isfinite().all())
