"""One adapter by itself: its function against dense matrices and Qiskit, its initial values, its precision."""

import math

import numpy as np
import pytest
import tensorly
import torch
from tensorly.tt_matrix import TTMatrix

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.adapter import QTHAAdapter
from axolotl_qtha.tuner.sizes import adapter_shape, ansatz
from axolotl_qtha.tuner.table import table

from ..circuit.reference import expectations

INPUTS, OUTPUTS = 35, 46  # 7 * 5 and 23 * 2
ALL_MODES = [
    {"quantum": quantum, **mpo}
    for quantum in ("qtha", "none", "silu", "sine", "frozen", "product", "qwthn")
    for mpo in ({}, {"mpo": "none"})
]


def settings(**given):
    sizes = {} if given.get("mpo") == "none" else {"bond_dim": 4, "mid_dim": 8}
    return QTHAConfig(**{"rank": 3, **sizes, **given})


def adapter(inputs=INPUTS, outputs=OUTPUTS, seed=1, weight=None, **given):
    config = settings(**given)
    return QTHAAdapter(config, adapter_shape(config, inputs, outputs), seed, weight)


def zero_starts(module):
    """Return the names of the parts that are zero at first."""
    branch = {"w_q"} if module.config.quantum not in ("none", "qwthn") else set()
    return {"b" if module.config.mpo == "none" else f"mpo_b_{module.config.num_cores - 1}", *branch}


def moved(module):
    """Return the adapter with the parts that were zero filled, as training would."""
    generator = torch.Generator().manual_seed(7)
    for name in sorted(zero_starts(module)):
        torch.nn.init.normal_(module.stored(name), std=0.3, generator=generator)
    return module


def features(inputs=INPUTS, tokens=4):
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(3))


def acting(module, name):
    """Return a stored tensor times its gain, in float64."""
    return module.stored(name).detach().double().numpy() * module.table[name].gain


def dense_maps(module):
    """Return A (r, d) and B (o, r) without the scaling, through TensorLy's dense matrices."""
    if module.config.mpo == "none":
        return acting(module, "a"), acting(module, "b")
    with tensorly.backend_context("numpy", local_threadsafe=True):
        mpo_a, mpo_b = (
            TTMatrix([acting(module, f"{name}_{k}") for k in range(module.config.num_cores)]).to_matrix()
            for name in ("mpo_a", "mpo_b")
        )
    return acting(module, "w_a") @ mpo_a[:, : module.shape.in_features], mpo_b[: module.shape.out_features] @ acting(
        module, "w_b"
    )


def silu(x):
    return x / (1 + np.exp(-x))


NONLINEARITIES = {"silu": silu, "sine": np.sin}


def ring(units, z, nonlinearity):
    """Return the classical network, unit by unit: four rows of `units` per layer, each unit joined to its two neighbours."""
    n = z.shape[1]
    q = z
    for into, after, before, bias in units.reshape(-1, 4, n):
        columns = [into[i] * z[:, i] + after[i] * q[:, i - 1] + before[i] * q[:, (i + 1) % n] + bias[i] for i in range(n)]
        q = nonlinearity(np.stack(columns, axis=1))
    return q


def branch(module, z):
    """Return q (tokens, r): Qiskit's state vector of the circuit, or the classical network."""
    config = module.config
    if config.quantum in NONLINEARITIES:
        return ring(acting(module, "units"), z, NONLINEARITIES[config.quantum])
    if config.angle_scale == "learned":
        z = z * acting(module, "scale")
    elif config.angle_scale == "tanh":
        z = np.pi * np.tanh(z / np.pi)
    return expectations(ansatz(config), z, acting(module, "angles"))


def fused(module, z):
    """Return h (tokens, r): the sum, or with `qwthn` the product, of the linear path and the branch."""
    linear = z @ acting(module, "w_c").T
    if module.config.quantum == "none":
        return linear
    q = branch(module, z) @ acting(module, "w_q").T
    return linear * q if module.config.quantum == "qwthn" else linear + q


def formula(module, x):
    """Return the change of the output step by step, as in the picture of the design."""
    a, b = dense_maps(module)
    return module.config.alpha / module.config.rank * (fused(module, x @ a.T) @ b.T)


@pytest.mark.parametrize(
    "given",
    [
        *ALL_MODES,
        *[{"angle_scale": scale} for scale in ("raw", "learned", "tanh")],
        *[{"num_cores": cores} for cores in (1, 3, 4)],
        *[{"rank": rank} for rank in (1, 2, 6)],
        {"gate_order": "2025-05"},
        {"core_gain": "none"},
        {"circuit_layers": 4, "alpha": 5.0},
        {"in_factors": {35: [5, 7]}, "out_factors": {46: [2, 23]}},
    ],
    ids=str,
)
def test_output_equals_the_formula(given):
    module = moved(adapter(**given))
    if module.shape.learns_scale:
        torch.nn.init.uniform_(module.scale, 0.5, 2.0, generator=torch.Generator().manual_seed(5))
    x = features()
    expected = formula(module, x.double().numpy())
    # a few products of sums over at most 46 terms in float32: errors of some 1e-7 of the largest entry
    assert np.abs(module(x).detach().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(expected).max() > 0.05


def test_float64_equals_the_formula_to_float64():
    module = moved(adapter()).double()
    x = features().double()
    expected = formula(module, x.numpy())
    assert module(x).dtype == torch.float64
    # the engine's 1e-10 is not the limit here: few gates
    assert np.abs(module(x).detach().numpy() - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("given", [*ALL_MODES, *[{"init": "tt_svd", **mode} for mode in ALL_MODES if "mpo" not in mode]], ids=str)
def test_starts_as_an_exact_no_op(given):
    module = adapter(weight=torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)), **given)
    assert module(features()).eq(0).all()
    assert {name for name in module.table if module.stored(name).eq(0).all()} == zero_starts(module)


@pytest.mark.parametrize("core_gain", ["balanced", "none"])
@pytest.mark.parametrize("num_cores", [1, 2, 4])
@pytest.mark.parametrize("init", ["kaiming", "tt_svd"])
def test_z_starts_with_unit_variance(init, num_cores, core_gain):
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
    module = adapter(init=init, weight=weight, num_cores=num_cores, core_gain=core_gain)
    # for uncorrelated x of unit variance, the variance of z_i is the squared norm of row i of A; 1e-5 is float32 rounding
    np.testing.assert_allclose(np.linalg.norm(dense_maps(module)[0], axis=1), 1, atol=1e-5)


def test_z_of_plain_matrices_starts_with_unit_variance():
    a, _ = dense_maps(adapter(mpo="none"))
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)


def test_tt_svd_starts_in_the_leading_right_singular_directions():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(OUTPUTS, OUTPUTS, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=generator))
    weight = left[:, :INPUTS] @ torch.diag(0.7 ** torch.arange(INPUTS)) @ right.T
    module = adapter(init="tt_svd", weight=weight, bond_dim=1000)  # bonds at their caps: nothing is cut off
    leading = torch.linalg.svd(weight).Vh[:3].double().numpy()
    a, _ = dense_maps(module)
    # rows of norm 1, so their share inside the leading space is the cosine; the randomised SVD is good to about 1e-4 here
    np.testing.assert_allclose(np.linalg.norm(a @ leading.T, axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(np.abs(a @ leading.T), np.eye(3), atol=2e-2)  # and each row is one of the directions
    random, _ = dense_maps(adapter(init="kaiming", bond_dim=1000))
    assert np.linalg.norm(random @ leading.T, axis=1).max() < 0.9


def test_tt_svd_at_low_bond_is_nearer_to_the_weight_than_chance():
    def share(module):
        a, _ = dense_maps(module)
        return np.linalg.norm(a @ leading.T)

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, 3, generator=generator) @ torch.randn(3, INPUTS, generator=generator)
    leading = torch.linalg.svd(weight).Vh[:3].double().numpy()
    assert share(adapter(init="tt_svd", weight=weight, bond_dim=4)) > 1.3 * share(adapter(init="kaiming", bond_dim=4))


@pytest.mark.parametrize("given", ALL_MODES, ids=str)
def test_the_seed_alone_decides_the_initial_values(given):
    torch.manual_seed(0)
    first = adapter(seed=1, **given).state_dict()
    torch.manual_seed(1)
    second, other = adapter(seed=1, **given).state_dict(), adapter(seed=2, **given).state_dict()
    assert first.keys() == second.keys() == other.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].any())


def test_making_an_adapter_leaves_the_global_random_state_alone():
    weight = torch.randn(OUTPUTS, INPUTS)
    before = torch.get_rng_state()
    adapter(init="tt_svd", weight=weight)
    adapter()
    assert torch.equal(before, torch.get_rng_state())


def test_core_gain_changes_what_is_stored_not_what_is_computed():
    balanced, plain = adapter(2000, 3000), adapter(2000, 3000, core_gain="none")
    assert {part.gain for part in plain.table.values()} == {1.0}
    assert balanced.table["mpo_a_0"].gain > 2
    for name in ("mpo_a_0", "mpo_a_1", "mpo_b_0", "w_b", "w_c", "w_q", "angles"):
        np.testing.assert_allclose(acting(balanced, name), acting(plain, name), rtol=1e-6)  # one division in float32
    a = dense_maps(plain)[0]
    np.testing.assert_allclose(dense_maps(balanced)[0], a, atol=1e-5 * np.abs(a).max())  # float32 rounding in its scale


@pytest.mark.parametrize("rank", [4, 8, 32])
def test_gains_fall_with_the_root_of_the_rank_above_8(rank):
    ours, same = (adapter(2000, 3000, rank=rank, mid_dim=32, core_gain=gain).table for gain in ("by_rank", "balanced"))
    slower = 2 if rank == 32 else 1
    found = {name: same[name].gain / part.gain for name, part in ours.items()}
    assert found["mpo_a_0"] == found["w_c"] == found["w_q"] == pytest.approx(slower)
    assert found["angles"] == found["mpo_b_1"] == 1  # they have no gain
    assert all(1 <= ratio <= slower for ratio in found.values())  # none goes below 1


@pytest.mark.parametrize("quantum", ["qtha", "qwthn", "silu", "sine", "none"])
def test_every_parameter_gets_a_gradient(quantum):
    learned = {} if quantum in ("none", "silu", "sine") else {"angle_scale": "learned"}
    module = moved(adapter(quantum=quantum, **learned))
    module(features()).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name
    if module.config.has_circuit:
        assert module.angles.grad.abs().min() > 0


def test_only_the_last_ring_of_2025_05_gets_none():
    module = moved(adapter(gate_order="2025-05"))
    module(features()).square().sum().backward()
    gradient = module.angles.grad.view(module.table["angles"].shape)
    assert gradient[-1].eq(0).all()
    assert gradient[:-1].abs().min() > 0


def test_frozen_angles_are_a_buffer():
    module = adapter(quantum="frozen", angle_scale="learned")
    assert "angles" in dict(module.named_buffers())
    assert "angles" not in dict(module.named_parameters())
    assert "angles" in module.state_dict()
    assert module.scale.requires_grad
    assert math.pi >= module.angles.abs().max() > 1


@pytest.mark.parametrize("given", ALL_MODES, ids=str)
def test_bfloat16_inputs(given):
    module, x = moved(adapter(**given)), features().bfloat16()
    result = module(x)
    assert result.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    exact = module(x.float())
    # three roundings to 8 bits (z, h, result) and those of A and B, each 2**-9 relative, through circuits of slope about 1
    assert (result - exact).abs().max() <= 0.03 * exact.abs().max()


@pytest.mark.parametrize("quantum", ["qtha", "qwthn", "silu", "sine"])
def test_between_the_products_bfloat16_is_computed_in_float32(quantum):
    module, x = moved(adapter(quantum=quantum)), features(tokens=200).bfloat16()
    z = x @ module.fold_a().bfloat16().T
    h = torch.tensor(fused(module, z.detach().double().numpy())).bfloat16()
    expected = h @ module.fold_b().bfloat16().T
    # float32 and float64 differ after the rounding to bfloat16 only next to a rounding boundary
    assert (module(x) == expected).double().mean() > 0.99


def test_autocast_keeps_the_folding_and_the_circuit_in_float32():
    module, x = moved(adapter()), features().bfloat16()
    plain = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), plain)  # bitwise: x is bfloat16 already, and nothing else may be cast


def test_dropout_acts_on_the_input_in_training_only():
    module, x = moved(adapter(dropout=0.5)), features()
    assert torch.equal(module.eval()(x), moved(adapter())(x))
    torch.manual_seed(0)
    assert not torch.equal(module.train()(x), module.eval()(x))


def test_tensors_are_stored_flat():
    """So that FSDP2, which shards the first axis and fills it up, neither sends nor keeps a core several times over."""
    module = adapter(angle_scale="learned")
    for tensor in module.state_names().values():
        assert tensor.ndim == 1
        assert tensor.is_contiguous()
    assert set(module.state_names()) == {"cores", "fusion", "angles", "scale"}
    ends = dict.fromkeys(module.state_names(), 0)
    for name, part in module.table.items():  # one behind the other, without a gap
        tensor = module.state_names()[part.tensor]
        assert module.stored(name).shape == part.shape
        assert module.stored(name).data_ptr() == tensor.data_ptr() + ends[part.tensor] * tensor.element_size()
        ends[part.tensor] += module.stored(name).numel()
    assert ends == {name: tensor.numel() for name, tensor in module.state_names().items()}
    assert len(module.table["mpo_a_0"].shape) == 4
    assert module.table["w_a"].shape == (3, module.shape.mpo_a.outputs.padded)


def test_gains_are_part_of_the_file_format():
    # Stored cores are divided by these numbers, which no file holds: changing them would change every saved adapter.
    # A new rule needs a new name in `core_gain`. 0.3 * std * sqrt(3 * 3584), and 1 for the core that starts at zero.
    config = QTHAConfig(rank=8, bond_dim=4, mid_dim=16)
    gains = {name: part.gain for name, part in table(config, adapter_shape(config, 3584, 3584)).items()}
    unit = 0.3 * (3 * 3584) ** 0.5
    expected = {
        "mpo_a_0": unit / (64 * 2) ** 0.5,
        "mpo_a_1": unit / (56 * 2) ** 0.5,
        "mpo_b_0": unit / (4 * 2) ** 0.5,
        "mpo_b_1": 1.0,
        "w_a": unit / 4,
        "w_b": unit / 8**0.5,
        "w_c": unit / 2,
        "w_q": unit / 2,
        "angles": 1.0,
    }
    assert gains == pytest.approx(expected)
    full = {"a": 1.0, "b": 1.0, "w_c": unit / 2, "angles": 1.0}
    for quantum, gain in (("qtha", 1.0), ("frozen", 1.0), ("qwthn", unit / 2)):  # a product does not start W_Q at zero
        config = QTHAConfig(rank=8, mpo="none", share={"layers": 2, "inputs": True}, quantum=quantum)
        gains = {name: part.gain for name, part in table(config, adapter_shape(config, 3584, 3584)).items()}
        assert gains == pytest.approx(full | {"w_q": gain})
    plain = QTHAConfig(rank=8, bond_dim=4, mid_dim=16, core_gain="none")
    assert {part.gain for part in table(plain, adapter_shape(plain, 3584, 3584)).values()} == {1.0}
