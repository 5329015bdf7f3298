"""Tensors that layers share: the function, the gradients, the counts, saving, and what PEFT does with several adapters."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_layer_status, inject_adapter_in_model
from safetensors.torch import load_file

from axolotl_qtha.tuner import adapter as adapter_module
from axolotl_qtha.tuner.layer import adapted_sizes
from axolotl_qtha.tuner.share import Share
from axolotl_qtha.tuner.sizes import count_parameters

from ..models import adapted, adapters, config, llama, logits, tokens, train, trainable

FILE = "adapter_model.safetensors"
SHARES = [{"layers": 2}, {"inputs": True}, {"layers": 2, "inputs": True}, {"layers": 8}]
BRANCHES = ["qtha", "none", "silu", "frozen", "product", "qwthn"]


def shared(share, layers=3, **settings):
    """Return a Llama with adapters that share tensors and change its output."""
    return train(adapted(llama(layers), share=share, **settings))


def unshared_twin(model, layers=3, **settings):
    """Return a model whose adapters share nothing and act as the given model's."""
    twin = adapted(llama(layers), **settings)
    for name, other in adapters(twin).items():
        own = adapters(model)[name]
        with torch.no_grad():
            for part, place in other.table.items():
                other.stored(part).copy_(own.effective(part) / place.gain)
    return twin


def gradients(model):
    model.train()
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: parameter.grad for name, parameter in trainable(model).items()}


def by_part(model):
    """Return the gradient of each part of each layer, as it acts."""
    found = {}
    for name, own in adapters(model).items():
        for part, place in own.table.items():
            if (gradient := getattr(own, place.tensor).grad) is not None:
                found[name, part] = gradient[place.start : place.start + place.size] / place.gain
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
    assert all((a.fusion_q is b.fusion_q) == (a.angles is b.angles) for a in layers for b in layers)
    model = adapted(llama(5), share={"layers": 2, "inputs": True}, angle_scale="learned")
    q, k, v, o = (adapters(model)[f"model.layers.1.self_attn.{name}_proj"] for name in "qkvo")
    before = adapters(model)["model.layers.0.self_attn.k_proj"]
    assert q.cores_a is k.cores_a is v.cores_a is before.cores_a is not o.cores_a
    assert k.cores_b is before.cores_b
    assert len({id(x.cores_b) for x in (q, k, v, o)}) == len({id(x.fusion) for x in (q, k, v, o)}) == 4
    assert q.angles is k.angles is v.angles is before.angles is not o.angles
    assert q.fusion_q is v.fusion_q is before.fusion_q is not o.fusion_q
    assert q.scale is k.scale is not o.scale


@pytest.mark.filterwarnings("error")  # pydantic's, where a value is of none of the field's types
@pytest.mark.parametrize(("layers", "kept"), [(4, "4"), (4.0, "4"), (3.75, "3.75"), ("auto", '"auto"')])
def test_how_many_layers_is_written_as_it_was_said(layers, kept):
    assert Share(layers=layers).model_dump_json() == f'{{"layers":{kept},"inputs":false}}'


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
