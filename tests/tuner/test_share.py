"""Tensors that layers share: the function, the gradients, the counts, saving, and what PEFT does with several adapters."""

import copy
import json
import math

import pytest
import torch
from peft import PeftModel, get_layer_status, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from axolotl_qtha.tuner import adapter as adapter_module
from axolotl_qtha.tuner.layer import adapted_sizes
from axolotl_qtha.tuner.share import Owned, Share, owners
from axolotl_qtha.tuner.sizes import count_parameters

from ..models import adapted, adapters, config, llama, logits, tokens, train, trainable

FILE = "adapter_model.safetensors"
SHARES = [{"layers": 2}, {"inputs": True}, {"layers": 2, "inputs": True}, {"layers": 8}]
BRANCHES = ["qtha", "none", "silu", "frozen", "product", "qwthn"]


def shared(share, layers=3, **settings):
    """Return a Llama with adapters that share tensors and change its output."""
    return train(adapted(llama(layers), share=share, **settings))


def unshared_twin(model, layers=3, **settings):
    """Return a model whose adapters share nothing and have the values of the given model's."""
    twin = adapted(llama(layers), **settings)
    for name, other in adapters(twin).items():
        own = adapters(model)[name]
        with torch.no_grad():
            for part in other.table:
                other.stored(part).copy_(own.stored(part))
    return twin


def gradients(model):
    model.train()
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: parameter.grad for name, parameter in trainable(model).items()}


def by_part(model):
    """Return the gradient of each part of each layer."""
    found = {}
    for name, own in adapters(model).items():
        for part, place in own.table.items():
            if (gradient := getattr(own, place.tensor).grad) is not None:
                found[name, part] = gradient[place.start : place.start + place.size]
    return found


@pytest.mark.parametrize("mpo", ["tt", "none"])
@pytest.mark.parametrize("quantum", BRANCHES)
@pytest.mark.parametrize("share", SHARES, ids=str)
def test_it_computes_what_layers_of_their_own_compute_with_these_values(share, quantum, mpo):
    settings = {"quantum": quantum, "mpo": mpo, "angle_scale": "learned" if quantum == "qtha" else "tanh"}
    model = shared(share, **settings)
    twin = unshared_twin(model, **settings)
    ours, theirs = logits(model), logits(twin)
    assert (ours - theirs).norm() <= 5e-6 * theirs.norm()  # float32, with the products of three layers in another order
    assert (theirs - logits(llama(3))).abs().max() > 1e-3
    gradients(model), gradients(twin)
    own, other = by_part(model), by_part(twin)
    assert own.keys() == other.keys()
    sums = {}
    for (name, part), gradient in other.items():
        place = adapters(model)[name].table[part]
        tensor = getattr(adapters(model)[name], place.tensor)
        key = id(tensor), part
        sums[key] = sums.get(key, 0) + gradient
    for (name, part), gradient in own.items():
        expected = sums[id(getattr(adapters(model)[name], adapters(model)[name].table[part].tensor)), part]
        assert (gradient - expected).norm() <= 4e-5 * expected.norm() + 1e-9, (name, part)  # float32 sums of several layers


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_it_starts_as_the_base(share):
    model = adapted(llama(3), share=share)
    assert torch.equal(logits(model), logits(llama(3)))


def test_which_tensors_are_one():
    model = adapted(llama(5), share={"layers": 2})
    layers = [adapters(model)[f"model.layers.{k}.mlp.up_proj"] for k in range(5)]
    assert [layers.index(next(o for o in layers if o.cores is a.cores)) for a in layers] == [0, 0, 2, 2, 4]
    assert [layers.index(next(o for o in layers if o.angles is a.angles)) for a in layers] == [0, 0, 2, 2, 4]
    assert len({id(a.fusion) for a in layers}) == 5
    assert all((a.w_q is b.w_q) == (a.angles is b.angles) for a in layers for b in layers)
    model = adapted(llama(5), share={"layers": 2, "inputs": True}, angle_scale="learned")
    q, k, v, o = (adapters(model)[f"model.layers.1.self_attn.{name}_proj"] for name in "qkvo")
    before = adapters(model)["model.layers.0.self_attn.k_proj"]
    assert q.cores_a is k.cores_a is v.cores_a is before.cores_a is not o.cores_a
    assert k.cores_b is before.cores_b
    assert len({id(x.cores_b) for x in (q, k, v, o)}) == len({id(x.fusion) for x in (q, k, v, o)}) == 4
    assert q.angles is k.angles is v.angles is before.angles is not o.angles
    assert q.w_q is v.w_q is before.w_q is not o.w_q
    assert q.scale is k.scale is not o.scale


def test_of_cross_attention_the_query_reads_another_input():
    sizes = {f"layers.0.encoder_attn.{name}_proj": (8, 8) for name in "qkv"}
    found = owners(Share(inputs=True), sizes)
    q, k, v = sizes
    assert (found[q].a, found[k].a, found[v].a) == (q, k, k)
    assert found[v].owned(v) == Owned(a=False, b=True, branch=False, runs=False)


@pytest.mark.parametrize("share", SHARES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"mpo": "none"}, {"quantum": "none"}, {"angle_scale": "learned"}], ids=str)
def test_parameters_are_counted_once(share, settings):
    model = adapted(llama(3), share=share, **settings)
    assert count_parameters(model.active_peft_config, adapted_sizes(model)) == sum(p.numel() for p in trainable(model).values())


def test_the_budget_counts_them_once_too():
    budget = {"param_budget": 0.6, "bond_dim": None, "mid_dim": None, "rank": 4, "target_modules": ["up_proj", "down_proj"]}
    alone, together = (adapted(llama(4), share=share, **budget) for share in (None, {"layers": 4}))
    assert together.active_peft_config.bond_dim > alone.active_peft_config.bond_dim
    lora = 4 * 2 * 4 * (48 + 89)
    assert sum(p.numel() for p in trainable(together).values()) <= 0.6 * lora


def count_circuits(monkeypatch, model, run):
    """Return how often z passes through a circuit."""
    calls = []
    for name in ("join", "branch"):
        right = getattr(adapter_module, name)
        monkeypatch.setattr(adapter_module, name, lambda z, *args, right=right: (calls.append(1), right(z, *args))[1])
    run(model)
    return len(calls)


def test_the_circuit_runs_once_for_all_that_read_an_input(monkeypatch):
    step = lambda model: model(input_ids=tokens(), labels=tokens()).loss.backward()  # noqa: E731
    assert count_circuits(monkeypatch, adapted(llama(2)).train(), step) == 14
    monkeypatch.undo()
    model = shared({"inputs": True}, 2).train()
    assert count_circuits(monkeypatch, model, step) == 8
    assert all(own.shared.reading is None or own.shared.reading._found is None for own in adapters(model).values())


def test_one_dropout_mask_for_all_that_read_an_input():
    model = shared({"inputs": True}, 1, dropout=0.5).train()
    seen = {}
    for name, own in adapters(model).items():
        own.seen = lambda z, name=name: seen.setdefault(name.rsplit(".", 1)[-1], z.detach())
    model(input_ids=tokens())
    assert torch.equal(seen["q_proj"], seen["v_proj"])
    assert torch.equal(seen["gate_proj"], seen["up_proj"])


CHECKPOINTING = [None, {"use_reentrant": False}]


@pytest.mark.parametrize("share", [{"layers": 2, "inputs": True}, {"layers": 3}], ids=str)
def test_gradients_are_the_same_with_checkpointing_and_several_forwards(share):
    model = shared(share).train()
    found = []
    for kwargs in CHECKPOINTING:
        model.zero_grad()
        model.gradient_checkpointing_disable()
        if kwargs:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        loss = 0
        for seed in (1, 2):  # two forwards before a backward, a pass without gradients in between
            loss = loss + model(input_ids=tokens(seed), labels=tokens(seed)).loss
            with torch.no_grad():
                model(input_ids=tokens(3))
        loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in trainable(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("share", SHARES, ids=str)
@pytest.mark.parametrize("quantum", ["qtha", "none", "silu", "frozen"])
def test_one_copy_is_saved_and_all_come_back(share, quantum, tmp_path):
    model = shared(share, quantum=quantum)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / FILE)
    own = [tensor for own in adapters(model).values() for tensor in own.state_names().values()]
    assert len(saved) == len(own) == len({id(tensor) for tensor in own})
    assert sum(tensor.numel() for tensor in saved.values()) == sum(tensor.numel() for tensor in own)
    for assign in (False, True):
        loaded = PeftModel.from_pretrained(llama(3), tmp_path, low_cpu_mem_usage=assign, is_trainable=True).eval()
        assert torch.equal(logits(loaded), logits(model))
        assert trainable(loaded).keys() == trainable(model).keys()
        assert torch.equal(logits(train(loaded)), logits(train(copy.deepcopy(model))))  # they still share


def test_a_whole_state_dict_goes_there_and_back():
    model, other = shared({"layers": 2, "inputs": True}), adapted(llama(3), share={"layers": 2, "inputs": True}, seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert trainable(other).keys() == trainable(model).keys()


def test_a_tensor_that_is_missing_is_named(tmp_path):
    model = shared({"layers": 2})
    state = model.state_dict()
    del state[next(name for name in state if name.endswith("cores"))]
    with pytest.raises(ValueError, match=r"1 tensors are missing.*layers\.0.*cores"):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("less", [None, {"layers": 2}, {"inputs": True}], ids=str)
def test_weights_of_layers_that_share_less_are_refused(less, tmp_path):
    train(adapted(llama(4), share=less)).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    more = {"layers": 4, "inputs": False} if less != {"inputs": True} else {"layers": 4, "inputs": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"share": more}))
    with pytest.raises(ValueError, match=r"are one tensor in this model .*share.*, and two in these weights"):
        PeftModel.from_pretrained(llama(4), tmp_path)


def test_layers_share_again_after_the_meta_device():
    model = adapted(llama(4), share={"layers": 2, "inputs": True})
    count = len(list(model.parameters()))
    assert len(list(model.to("meta").parameters())) == count
    assert len(list(model.to_empty(device="cpu").parameters())) == count


def test_a_share_that_shares_nothing_is_refused():
    settings = [
        ({"inputs": True}, {"target_modules": ["q_proj", "o_proj"]}),
        ({"layers": 2}, {"layers_to_transform": [2]}),
    ]
    for share, others in settings:
        with pytest.raises(ValueError, match=r"qtha.share: .* finds no layers that could share.*What works: .*or no `share:`"):
            adapted(llama(3), share=share, **others)
    for share in ({}, {"layers": 1}, {"layers": 1, "inputs": False}):
        with pytest.raises(ValueError, match=r"qtha.share: .* shares nothing. What works: `share: \{layers: 4\}`"):
            config(share=share)


def test_copies_share_among_themselves():
    model = shared({"layers": 2, "inputs": True})
    twin = copy.deepcopy(model)
    ours, theirs = adapters(model), adapters(twin)
    assert trainable(twin).keys() == trainable(model).keys()
    before = logits(model)
    train(twin)
    assert torch.equal(logits(model), before)
    for name in ours:
        for tensor, owner in theirs[name].shared.owners.items():
            assert getattr(theirs[name], tensor) is getattr(owner, tensor)
            assert owner in set(theirs.values())
            assert owner not in set(ours.values())


def test_several_adapters():
    model = shared({"layers": 2, "inputs": True})
    first = logits(model)
    model.add_adapter("other", config(share={"layers": 3}, rank=2))
    model.add_adapter("plain", config())
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(llama(3)))
    train(model)
    assert not torch.equal(logits(model), logits(llama(3)))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(3)))
    assert len(get_layer_status(model)) == 21


def test_injection_moving_and_casting():
    base = llama(3)
    model = inject_adapter_in_model(config(share={"layers": 2, "inputs": True}), base)
    assert model is base
    model.to(torch.float64)
    cores = {id(p) for name, p in model.named_parameters() if name.endswith("cores_a")}
    assert len(cores) == 2 * 4
    up, gate = (model.get_submodule(f"model.layers.1.mlp.{name}_proj").qtha_adapter["default"] for name in ("up", "gate"))
    assert up.cores_a is gate.cores_a
    assert up.cores_a.dtype == torch.float64
    assert up(torch.randn(2, 48, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("share", [{"layers": 2, "inputs": True}, {"layers": 2}], ids=str)
def test_decoding_keeps_folds_and_gives_the_same(share):
    model = shared(share)
    with torch.no_grad():
        kept = [model(input_ids=tokens()).logits for _ in range(2)]
    assert all(own.kept for own in adapters(model).values())
    with torch.enable_grad():
        afresh = model(input_ids=tokens()).logits.detach()
    assert torch.equal(kept[0], kept[1])
    assert (kept[0] - afresh).norm() <= 1e-6 * afresh.norm()
    with torch.no_grad():
        next(iter(trainable(model).values())).mul_(1.5)  # that of several layers
        assert not torch.equal(model(input_ids=tokens()).logits, kept[0])


def test_merging_without_a_branch():
    model = shared({"layers": 2, "inputs": True}, quantum="none")
    expected = logits(model)
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).norm() <= 1e-5 * expected.norm()


class Uneven(nn.Module):
    """Two layers of different sizes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(8, size)}) for size in (8, 12)])


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({"layers": 0}, r"qtha\.share\.layers: 0 is no number from 1 on, nor `auto`.*What works: `share: \{layers: 4\}`"),
        ({"layers": True}, r"qtha\.share\.layers: True"),
        ({"layers": 0.5}, r"qtha\.share\.layers: 0\.5"),
        ({"layers": math.inf}, r"qtha\.share\.layers: inf"),
        ({"layers": math.nan}, r"qtha\.share\.layers: nan"),
        ({"layers": "4"}, r"qtha\.share\.layers: '4'"),
        ({"inputs": "yes"}, r"qtha\.share\.inputs: 'yes' is neither true nor false"),
        ({"layer": 2}, r"qtha\.share\.layer: \(int, value not shown\) is not a key of the `share:` block. What works: `layers`"),
        (4, r"qtha\.share: 4 does not say what is shared.*layers: 4"),
    ],
)
def test_bad_values_are_named(share, message):
    with pytest.raises(ValueError, match=message):
        config(share=share)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"qtha\.init: 'tt_svd' starts from the weight of one layer.*init: kaiming"):
        config(share={"layers": 2}, init="tt_svd")
    with pytest.raises(ValueError, match=r"layers\.0\.proj and layers\.1\.proj, whose sizes are \(8, 8\) and \(8, 12\)"):
        inject_adapter_in_model(config(share={"layers": 2}, target_modules=["proj"]), Uneven())


def test_groups_that_differ_by_a_layer():
    model = adapted(llama(5), share={"layers": 2.5})
    layers = [adapters(model)[f"model.layers.{k}.mlp.up_proj"] for k in range(5)]
    assert [layers.index(next(o for o in layers if o.cores is a.cores)) for a in layers] == [0, 0, 0, 3, 3]
    assert Share(layers=2.0) == Share(layers=2)
    for count in range(1, 81):  # whatever the rounding of the quotient
        sizes = {f"layers.{k}.up_proj": (8, 8) for k in range(80)}
        firsts = [own.a for own in owners(Share.in_groups(count, 80, inputs=True), sizes).values()] if count < 80 else list(sizes)
        members = [firsts.count(first) for first in dict.fromkeys(firsts)]
        assert len(members) == count
        assert max(members) - min(members) <= 1
        assert firsts == sorted(firsts, key=lambda name: int(name.split(".")[1]))


def test_modules_of_some_layers_only():
    """A module whose group begins in a layer where another reads first."""
    names = ["layers.0.q_proj", "layers.0.k_proj", "layers.1.k_proj", "layers.2.q_proj", "layers.2.k_proj"]
    found = owners(Share(layers=3, inputs=True), dict.fromkeys(names, (8, 8)))
    assert {own.a for own in found.values()} == {own.branch for own in found.values()} == {"layers.0.q_proj"}
    assert [own.together for own in found.values()] == [names[0], names[0], names[2], names[3], names[3]]
    assert [own.b for own in found.values()] == [names[0], names[1], names[1], names[0], names[1]]


def test_a_group_that_is_not_full_and_layers_that_are_left_out():
    model = adapted(llama(5), share={"layers": 2}, layers_to_transform=[0, 2, 3])
    zero, two, three = (adapters(model)[f"model.layers.{k}.mlp.up_proj"] for k in (0, 2, 3))
    assert zero.cores is two.cores is not three.cores
    assert math.isfinite(float(logits(train(model)).sum()))
