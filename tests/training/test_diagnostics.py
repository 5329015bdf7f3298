"""What the diagnostics say is what dense matrices and sums by hand say, and they change nothing."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import Trainer, TrainingArguments

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.training import diagnostics
from axolotl_qtha.training.diagnostics import Diagnostics, active_adapters, effective_ranks, measure, sample

from ..circuit.reference import expectations as by_qiskit
from ..models import VOCABULARY, adapted, config, llama, train

ROWS = torch.randint(VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(1)).tolist()
SHARE, VARIANCE, WRAPPED, RANK = "qtha/quantum_share", "qtha/z_variance", "qtha/wrapped", "qtha/effective_rank"
NORMS = {f"qtha/grad_norm_{part}" for part in ("angles", "cores", "classical")}


def run(tmp_path, every=1, steps=3, rank_zero=True, **settings):
    """Train a small model, and return trainer and the log's rows of steps; `every` 0: without diagnostics."""
    arguments = {"max_steps": steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.02}
    arguments |= {"logging_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    arguments |= {"lr_scheduler_type": "constant", **settings.pop("arguments", {})}
    model = adapted(llama(), **settings)
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), **arguments), train_dataset=rows)
    if every:
        trainer.add_callback(Diagnostics(trainer, every))
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "loss" in row]


def keys(row):
    return {key for key in row if key.startswith("qtha/") and key.count("/") == 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {SHARE, VARIANCE, WRAPPED, RANK} | NORMS),
        ({"quantum": "none"}, {RANK} | NORMS - {"qtha/grad_norm_angles"}),
        ({"quantum": "silu"}, {SHARE, RANK} | NORMS),
        ({"quantum": "sine"}, {SHARE, RANK} | NORMS),
        ({"quantum": "frozen"}, {SHARE, VARIANCE, WRAPPED, RANK} | NORMS - {"qtha/grad_norm_angles"}),
        ({"quantum": "qwthn"}, {VARIANCE, WRAPPED, RANK} | NORMS),
        ({"mpo": "none"}, {SHARE, VARIANCE, WRAPPED, RANK} | NORMS - {"qtha/grad_norm_cores"}),
        ({"angle_scale": "learned"}, {SHARE, VARIANCE, WRAPPED, RANK} | NORMS),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # sets have no order of their own
)
def test_each_row_has_what_exists_and_all_of_it_is_finite(tmp_path, settings, expected):
    _, rows = run(tmp_path, **settings)
    assert len(rows) == 3
    for row in rows:
        assert keys(row) == expected
        assert all(math.isfinite(value) for value in row.values())
    layers = {key for key in rows[0] if key.startswith(f"{SHARE}/")}
    assert layers == ({f"{SHARE}/layer_0", f"{SHARE}/layer_1"} if SHARE in expected else set())


def test_only_measured_steps_have_them(tmp_path):
    _, rows = run(tmp_path, every=2, steps=4)
    assert [bool(keys(row)) for row in rows] == [True, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_training_is_the_same_bit_for_bit(tmp_path, checkpointing):
    arguments = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    plain, _ = run(tmp_path, every=0, arguments=arguments)
    watched, rows = run(tmp_path, arguments=arguments)
    for (name, a), (_, b) in zip(plain.model.state_dict().items(), watched.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert keys(rows[0])
    assert all(adapter.seen is None for _, adapter in active_adapters(watched.model))


@pytest.mark.slow
def test_recomputed_layers_show_their_tokens_once(tmp_path, monkeypatch):
    seen = []

    def watched(adapters, z, norms):
        seen.append({name: value.clone() for name, value in z.items()})
        return {}

    monkeypatch.setattr(diagnostics, "measure", watched)
    for checkpointing in (False, True):
        run(
            tmp_path,
            arguments={"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        )
    once, again = seen[:3], seen[3:]
    assert len(once[0]) == 14
    for a, b in zip(once, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert {len(value) for value in a.values()} == {2 * 9}, "the first micro-batch alone"


def test_values_are_those_of_dense_matrices_and_of_qiskit():
    model = train(adapted(llama(1), circuit_layers=1))
    torch.manual_seed(0)
    adapters = dict(active_adapters(model))
    z = {name: 2.5 * torch.randn(5, 4) for name in adapters}
    found = measure(adapters, z, {})
    shares, variances, wrapped, ranks = [], [], [], []
    for name, adapter in adapters.items():
        angles = math.pi * torch.tanh(z[name] / math.pi)
        q = torch.as_tensor(
            by_qiskit(Ansatz(4, 1), angles.double().numpy(), adapter.effective("angles").detach().double().numpy())
        )
        w_q, w_c = (adapter.effective(part).detach().double() for part in ("w_q", "w_c"))
        shares.append((q.double() @ w_q.T).norm() / (z[name].double() @ w_c.T).norm())
        variances.append(q.var(dim=0, correction=0).mean())
        wrapped.append((z[name].abs() > math.pi).double().mean())
        dense = (adapter.fold_b() @ adapter.effective("w_c") @ adapter.fold_a()).detach().double()
        ranks.append(_entropy_rank(dense))
    for key, values in ((SHARE, shares), (VARIANCE, variances), (WRAPPED, wrapped), (RANK, ranks)):
        expected = float(torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values]).mean())
        assert found[key] == pytest.approx(expected, rel=2e-5), key  # float32 against float64
    assert 0 < found[WRAPPED] < 1
    assert found[f"{SHARE}/layer_0"] == pytest.approx(found[SHARE])


def _entropy_rank(matrix):
    singular = torch.linalg.svdvals(matrix)
    shares = (singular / singular.sum()).clamp_min(1e-300)
    return torch.exp(-(shares * shares.log()).sum())


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_effective_rank_of_known_matrices(rank):
    generator = torch.Generator().manual_seed(rank)
    a = torch.linalg.qr(torch.randn(9, 3, generator=generator, dtype=torch.float64))[0].T
    b = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64))[0]
    w = torch.diag(torch.tensor([1.0] * rank + [0.0] * (3 - rank), dtype=torch.float64))
    assert float(effective_ranks(torch.stack([a @ a.T, w, b.T @ b])[None])) == pytest.approx(rank, abs=1e-6)


def test_gradient_norms_are_those_the_optimiser_gets(tmp_path):
    model = adapted(llama())
    model(input_ids=torch.tensor(ROWS[:2]), labels=torch.tensor(ROWS[:2])).loss.backward()
    expected = {"angles": 0.0, "cores": 0.0, "classical": 0.0}
    for _, adapter in active_adapters(model):
        for name, place in adapter.table.items():
            part = "angles" if name == "angles" else "cores" if name.startswith("mpo") else "classical"
            gradient = getattr(adapter, place.tensor).grad[place.start : place.start + place.size]
            expected[part] += float(gradient.double().square().sum())
    every = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.requires_grad)
    assert sum(expected.values()) == pytest.approx(every)
    found = diagnostics.gradient_norms([adapter for _, adapter in active_adapters(model)])
    assert expected["cores"] > 0
    for part, total in expected.items():
        assert float(found[f"qtha/grad_norm_{part}"]) == pytest.approx(math.sqrt(total), rel=1e-5, abs=1e-12)


def test_a_gradient_that_layers_share_counts_once():
    model = adapted(llama(2), share={"layers": 2, "inputs": True})
    model(input_ids=torch.tensor(ROWS[:2]), labels=torch.tensor(ROWS[:2])).loss.backward()
    found = diagnostics.gradient_norms([adapter for _, adapter in active_adapters(model)])
    every = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.requires_grad)
    assert sum(float(norm) ** 2 for norm in found.values()) == pytest.approx(every, rel=1e-5)


def test_tensors_that_are_not_whole_are_left_alone():
    model = train(adapted(llama(1)))
    adapters = dict(active_adapters(model))
    for adapter in adapters.values():
        adapter.cores.ds_id = 0  # ZeRO-3's mark
    found = measure(adapters, {name: torch.randn(5, 4) for name in adapters}, {})
    assert set(found) == {WRAPPED}


@pytest.mark.parametrize("quantum", ["qtha", "none"])
@pytest.mark.parametrize("broken", [1, 7], ids=["one layer", "all layers"])
def test_what_is_not_finite_is_left_out_and_raises_nothing(quantum, broken):
    model = train(adapted(llama(1), quantum=quantum))
    adapters = dict(active_adapters(model))
    torch.manual_seed(0)
    z = {name: torch.randn(5, 4) for name in adapters}
    whole = list(adapters)[broken:]
    expected = measure({name: adapters[name] for name in whole}, {name: z[name] for name in whole}, {})
    for adapter in list(adapters.values())[:broken]:
        for parameter in adapter.parameters():
            parameter.data.fill_(math.nan)
    found = measure(adapters, z, {"qtha/grad_norm_cores": torch.tensor(math.inf)})
    assert all(math.isfinite(value) for value in found.values())
    keys = {RANK} if quantum == "none" else {RANK, VARIANCE, SHARE}
    assert {key: found[key] for key in keys & set(found)} == {key: expected[key] for key in keys if whole}
    assert "qtha/grad_norm_cores" not in found


def test_tokens_that_are_all_zero_have_no_share():
    adapters = dict(active_adapters(train(adapted(llama(1)))))
    found = measure(adapters, {name: torch.zeros(5, 4) for name in adapters}, {})
    assert set(found) == {VARIANCE, WRAPPED, RANK}


def test_a_sample_is_bounded_and_its_own():
    z = torch.randn(3, 1000, 4, requires_grad=True)
    taken = sample(z)
    assert 128 <= len(taken) <= diagnostics.TOKENS
    assert not taken.requires_grad
    assert all(bool((z.detach().reshape(-1, 4) == row).all(dim=1).any()) for row in taken[:5])
    assert len(sample(torch.randn(7, 4))) == 7
    assert taken.untyped_storage().nbytes() == taken.numel() * 4, "all of z would be kept until the step's end"


def test_a_layer_without_tokens_is_not_measured(tmp_path):
    model = adapted(llama(1))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    watcher = Diagnostics(trainer, 1)
    watcher.on_step_begin(trainer.args, trainer.state, trainer.control, model=model)
    adapters = dict(active_adapters(model))
    for i, adapter in enumerate(adapters.values()):
        adapter(torch.randn(0 if i < 3 else 2, adapter.shape.in_features))
    assert list(watcher._z) == list(adapters)[3:]


def test_all_adapters_that_are_active_are_measured():
    model = adapted(llama(1))
    model.add_adapter("other", config())
    assert len(dict(active_adapters(model))) == 7
    model.base_model.set_adapter(["default", "other"])
    found = dict(active_adapters(model))
    assert len(found) == 14
    assert len({id(adapter) for adapter in found.values()}) == 14


@pytest.mark.slow
def test_a_compiled_layer_is_not_compiled_anew_and_has_an_effective_rank():
    torch.compiler.reset()
    adapters = dict(active_adapters(train(adapted(llama(1)))))
    adapter = next(iter(adapters.values()))
    counter, seen = CompileCounter(), []
    compiled, x = torch.compile(adapter, backend=counter), torch.randn(2, adapter.shape.in_features)
    compiled(x)
    before = counter.frame_count
    assert before
    adapter.seen = seen.append
    compiled(x)
    adapter.seen = lambda z: seen.append(z)
    compiled(x)
    assert counter.frame_count == before
    assert not seen
    assert set(measure(adapters, {}, {})) == {RANK}


def test_nothing_but_the_adapters_is_asked():
    assert dict(active_adapters(nn.Linear(2, 2))) == {}
    assert measure({}, {}, {}) == {}
