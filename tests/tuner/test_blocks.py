"""Ranks that circuits share: which qubits are chosen, and the adapter itself at rank 12 to 64."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, get_peft_model

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.adapter import QTHAAdapter
from axolotl_qtha.tuner.blocks import usual_qubits
from axolotl_qtha.tuner.described import branch
from axolotl_qtha.tuner.sizes import adapter_shape, ansatz, count_parameters

from ..circuit.reference import expectations
from ..models import adapted, config, llama, logits

RANKS = [(rank, qubits) for rank in (16, 32, 64) for qubits in (4, 8)]
CHOSEN = {9: 3, 10: 5, 12: 4, 14: 7, 15: 3, 16: 4, 18: 3, 20: 4, 21: 3, 24: 4, 25: 5, 32: 4, 49: 7, 64: 4, 256: 4, 11: 11}


def test_the_qubits_that_are_chosen():
    """The rule in other words: all of a small rank, else the divisor from 3 to 8 nearest to 4, else one circuit of up to 12."""
    assert {rank: usual_qubits(rank) for rank in CHOSEN} == CHOSEN
    for rank in range(1, 300):
        first = next((n for n in (4, 3, 5, 6, 7, 8) if rank % n == 0), None)  # 3 and 5 are as near: the smaller
        alone = rank if rank <= 12 else None
        assert usual_qubits(rank) == (rank if rank <= 8 else first or alone)


def random_adapter(rank, qubits, seed=0, **settings):
    """Return an adapter of a 24 x 40 layer with random numbers in all its tensors."""
    made = QTHAConfig(**{"rank": rank, "qubits": qubits, "bond_dim": 3, "mid_dim": rank, **settings})
    adapter = QTHAAdapter(made, adapter_shape(made, 24, 40), seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.state_names().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)
    return adapter


def by_hand(adapter, x):
    """Return the change of the output from dense matrices and, block by block, Qiskit's state vector."""
    z = x @ adapter.fold_a().detach().T
    scale = adapter.effective("scale").detach() if adapter.config.angle_scale == "learned" else 1
    angles = z * scale if adapter.config.angle_scale != "tanh" else torch.pi * torch.tanh(z / torch.pi)
    theta = adapter.effective("angles").detach().numpy()
    q = torch.tensor(expectations(ansatz(adapter.config), angles.numpy(), theta))
    linear, quantum = z @ adapter.effective("w_c").detach().T, q @ adapter.effective("w_q").detach().T
    h = linear * quantum if adapter.config.quantum == "qwthn" else linear + quantum
    return h @ adapter.fold_b().detach().T


@pytest.mark.parametrize(
    "settings", [{}, {"quantum": "qwthn"}, {"quantum": "frozen", "angle_scale": "learned"}, {"mpo": "none"}], ids=str
)
@pytest.mark.parametrize(("rank", "qubits"), RANKS)
def test_the_change_of_the_output(rank, qubits, settings):
    sizes = {"bond_dim": None, "mid_dim": None} if settings.get("mpo") == "none" else {}
    adapter = random_adapter(rank, qubits, **sizes, **settings)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = by_hand(adapter, x)
    scale = expected.abs().max()
    assert (adapter(x) - expected).abs().max() <= 1e-10 * scale  # float64 rounding
    adapter.eval()
    with torch.no_grad():  # the path of `generate()`: one token in one call of the compiled engine, then many
        assert (adapter(x[:1]) - expected[:1]).abs().max() <= 1e-10 * scale
        many = adapter(x.repeat(40, 1))
    assert (many - expected.repeat(40, 1)).abs().max() <= 1e-10 * scale


@pytest.mark.parametrize("quantum", ["qtha", "silu", "sine", "qwthn"])
def test_gradients_match_finite_differences(quantum):
    adapter = random_adapter(12, 4, quantum=quantum)
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    names = [name for name in ("angles", "units", "fusion") if name in adapter.state_names()]

    def run(x, *values):
        return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,))

    values = [getattr(adapter, name).detach().requires_grad_() for name in names]
    # central differences of 1e-6 in float64: off by 1e-10 or so of numbers of size 1 to 10
    assert torch.autograd.gradcheck(run, (x, *values), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("quantum", "nonlinearity"), [("silu", F.silu), ("sine", torch.sin)])
def test_a_classical_network_has_a_ring_in_each_block(quantum, nonlinearity):
    adapter = random_adapter(12, 4, quantum=quantum)
    branch_of = adapter.bottleneck().branch
    z = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = z.clone()
    moved[:, :4] += 1
    q, other = branch_of(z), branch_of(moved)
    assert torch.equal(q[:, 4:], other[:, 4:])
    assert (q[:, :4] - other[:, :4]).abs().min() > 0
    expected, units = [], adapter.effective("units").detach().unflatten(0, (-1, 4))
    for first in (0, 4, 8):
        own, state = slice(first, first + 4), z[:, first : first + 4]
        for into, after, before, bias in units[..., own]:
            left, right = state[:, [3, 0, 1, 2]], state[:, [1, 2, 3, 0]]
            state = nonlinearity(into * z[:, own] + after * left + before * right + bias)
        expected.append(state)
    assert (q - torch.cat(expected, dim=1)).abs().max() <= 1e-13


def test_as_many_parameters_however_the_rank_is_cut():
    sizes = [(64, 64), (64, 192)]
    counts = {qubits: count_parameters(config(rank=16, mid_dim=16, qubits=qubits), sizes) for qubits in (2, 4, 8)}
    assert len(set(counts.values())) == 1
    for qubits, per_rank in ((4, 8), (1, 4)):  # 4 L or, without a neighbour, 2 L angles a qubit
        made = config(rank=16, mid_dim=16, qubits=qubits, circuit_layers=2)
        assert adapter_shape(made, 64, 64).parts["branch"] == 16 * per_rank


def test_a_small_rank_starts_as_it_did():
    """One circuit has the whole of it, and the same numbers are drawn whatever `qubits` says."""
    made = {qubits: random_adapter(8, qubits) for qubits in (None, 8, 4)}
    assert made[None].config.blocks == 1
    for other in (8, 4):
        for name, tensor in made[None].state_names().items():
            assert torch.equal(tensor, made[other].state_names()[name])
    x = torch.randn(3, 24, dtype=torch.float64)
    assert torch.equal(made[None](x), made[8](x))
    assert not torch.allclose(made[None](x), made[4](x))


def saved(tmp_path, **settings):
    model = adapted(llama(), **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "qtha_adapter" in name:
                tensor.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    return logits(model)


@pytest.mark.parametrize(
    ("settings", "qubits"),
    [
        ({"rank": 16}, 4),
        ({"rank": 32, "qubits": 8}, 8),
        ({"rank": 64, "quantum": "silu"}, 4),
        ({"rank": 16, "quantum": "none"}, None),
    ],
    ids=str,
)
def test_a_saved_adapter_says_its_qubits(tmp_path, settings, qubits):
    before = saved(tmp_path, mid_dim=settings["rank"], **settings)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["qubits"] == qubits
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 12},
        {"rank": 9},
        {"rank": 4},
        {"rank": 16, "quantum": "silu"},
        {"rank": 13, "quantum": "silu"},
        {"rank": 13, "quantum": "sine"},
    ],
    ids=str,
)
def test_an_adapter_saved_before_the_key_existed(tmp_path, settings):
    before = saved(tmp_path, mid_dim=settings["rank"], qubits=settings["rank"], **settings)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    del content["qubits"]
    path.write_text(json.dumps(content))
    for load in (PeftConfig, QTHAConfig):
        assert load.from_pretrained(tmp_path).circuit_qubits == settings["rank"]
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), before)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["qubits"] == settings["rank"]


def test_another_rank_of_the_same_settings_chooses_anew():
    assert dataclasses.replace(QTHAConfig(rank=8), rank=32).circuit_qubits == 4
    assert dataclasses.replace(QTHAConfig(rank=32), rank=12).circuit_qubits == 4


@pytest.mark.parametrize("rank", [13, 17, 22])
def test_ranks_that_cannot_be_cut(rank):
    with pytest.raises(ValueError, match=rf"qtha.rank: {rank} .*What works: `rank: \d+` or `rank: \d+`"):
        QTHAConfig(rank=rank)
    assert QTHAConfig(rank=rank, qubits=1).blocks == rank
    assert QTHAConfig(rank=rank, quantum="silu").blocks == 1
    assert branch(QTHAConfig(rank=rank, quantum="none")) == "quantum: none"


def test_a_rank_of_256_trains():
    model = get_peft_model(llama(), config(rank=256, mid_dim=256, bond_dim=2))
    from ..models import tokens

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
