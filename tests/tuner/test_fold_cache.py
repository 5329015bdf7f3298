"""A kept fold is never that of other tensors than the adapter has, whoever wrote them and in whatever way; copies hold none."""

import pickle
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.testing._internal.distributed.fake_pg import FakeStore

from axolotl_qtha.tuner.adapter import QTHAAdapter
from axolotl_qtha.tuner.fold_cache import folding_each_time

from ..decoding_models import check, kept, one, trained
from ..models import adapted, adapters, config, gpt2, llama, logits, train, trainable


def step_in_eval_mode(model):
    train(model, steps=1)


def write_in_place(model):
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.mul_(1.1)


def write_in_inference_mode(model):
    with torch.inference_mode():
        for parameter in trainable(model).values():
            parameter.mul_(1.1)


def write_one_number(model):
    with torch.no_grad():
        for module in adapters(model).values():
            module.fusion[3] += 1


def load_others(model, assign=False):
    state = {name: value * 1.1 if "qtha" in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)


def load_and_assign(model):
    load_others(model, assign=True)


def write_to_data(model):
    model.train()
    for parameter in trainable(model).values():
        parameter.data.mul_(1.1)
    model.eval()


def write_to_data_and_drop(model):
    for module in adapters(model).values():
        module.fusion.data.mul_(2)
        module.drop_kept()


def replace_data(model):
    for parameter in trainable(model).values():
        parameter.data = parameter.data * 1.1


def replace_data_twice(model):  # the second takes the memory the first had
    for parameter in trainable(model).values():
        value = parameter.data * 1.1
        parameter.data = torch.empty(0)
        parameter.data = value


def replace_parameters(model):
    for module in adapters(model).values():
        module.fusion = nn.Parameter(module.fusion.detach() * 2)


def replace_parameters_on_the_same_memory(model):
    for module in adapters(model).values():
        version = module.fusion._version
        memory = module.fusion.data
        del module.fusion
        module.fusion = nn.Parameter(memory)
        with torch.no_grad():
            while module.fusion._version < version or module.fusion._version == 0:
                module.fusion.mul_(1.1)


def cast_there_and_back(model):
    model.to(torch.float64)
    for parameter in trainable(model).values():
        parameter.data.mul_(1.1)
    model.to(torch.float32)


CHANGES = [
    step_in_eval_mode,
    write_in_place,
    write_in_inference_mode,
    write_one_number,
    load_others,
    load_and_assign,
    write_to_data,
    write_to_data_and_drop,
    replace_data,
    replace_data_twice,
    replace_parameters,
    replace_parameters_on_the_same_memory,
    cast_there_and_back,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("settings", [{}, {"quantum": "none"}, {"mpo": "none", "core_gain": "none"}], ids=str)
def test_never_stale(settings, change):
    model = trained(**settings)
    for _ in range(2):
        before = logits(model)
        change(model)
        assert (logits(model) - before).abs().max() > 1e-4
        check(model)


@pytest.mark.parametrize(("settings", "name"), [({"quantum": "frozen"}, "angles"), ({"angle_scale": "learned"}, "scale")])
def test_angles_and_scale_are_watched_too(settings, name):
    model = trained(**settings)
    before = logits(model)
    with torch.no_grad():
        for module in adapters(model).values():
            getattr(module, name).mul_(1.5)
    assert (logits(model) - before).abs().max() > 1e-4
    check(model)


def test_another_dtype_of_the_input():
    module, x = one()
    with torch.no_grad():
        expected = module(x)
        assert module(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(module(x), expected)


def test_switching_adapters():
    model = trained()
    model.add_adapter("second", config(quantum="silu"))
    model.set_adapter("second")
    model = train(model).eval()
    second = logits(model)
    model.set_adapter("default")
    first = logits(model)
    assert (first - second).abs().max() > 1e-3
    for name, expected in (("second", second), ("default", first), ("second", second)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
        check(model)
    assert kept(model) == kept(model, "second") == 14
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), second)


def test_merging_and_unmerging():
    model = trained(quantum="none")
    expected = logits(model)
    model.merge_adapter()
    assert (logits(model) - expected).abs().max() <= 1e-5
    model.unmerge_adapter()
    write_in_place(model)
    check(model)
    changed = logits(model)
    assert (logits(model.merge_and_unload()) - changed).abs().max() <= 1e-5


def test_parameters_given_for_one_call():
    module, x = one()
    with torch.no_grad():
        before = module(x)
        doubled = {name: value * 2 for name, value in module.named_parameters()}
        with folding_each_time():
            expected = functional_call(module, doubled, (x,))
        assert (functional_call(module, doubled, (x,)) - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert torch.equal(module(x), before)


def test_inference_mode():
    module, x = one()
    with torch.inference_mode():
        inside = module(x)
    assert module.kept
    with torch.no_grad():
        assert torch.equal(module(x), inside)
    with torch.inference_mode():
        module.load_state_dict(module.state_dict(), assign=True)
        made = QTHAAdapter(module.config, module.shape, seed=0).eval()
        for name, value in module.state_dict().items():
            getattr(made, name).copy_(value)
        assert (made(x) - inside).abs().max() <= 1e-6
        assert not made.kept  # nothing counts what is written to parameters made here
        made.fusion.mul_(2)
        assert (made(x) - inside).abs().max() > 1e-3


def test_partitioned_parameters_are_not_kept():
    module, x = one()
    with torch.no_grad():
        module(x)
        assert module.kept
        module.eval()
        module.fusion.ds_id = 0  # ZeRO-3's mark
        module(x)
    assert not module.kept


def test_computed_parameters_are_not_kept():
    class Twice(nn.Module):
        def forward(self, value):
            return 2 * value

    module, x = one()
    with torch.no_grad():
        module(x)
        parametrize.register_parametrization(module, "fusion", Twice())
        found = module(x)
        assert not module.kept
        with folding_each_time():
            assert torch.equal(module(x), found)


def test_fsdp2_folds_each_time():
    # No gloo: now and then it ends its threads while they wait for the GIL that it holds, and a run stands still.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        model = trained()
        expected = logits(model)
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        model.eval()  # between forwards the shards can be told
        assert (logits(model) - expected).abs().max() <= 1e-6
        assert kept(model) == 0
    finally:
        dist.destroy_process_group()


# ---- copies and files ----


@pytest.fixture(params=[llama, gpt2])
def served(request):
    """Return a trained model that keeps its folds, and its logits."""
    model = train(adapted(request.param()))
    return model, logits(model)


def check_copy(copy, expected, model):
    assert kept(copy) == 0
    assert torch.equal(logits(copy), expected)
    write_in_place(copy)
    assert (logits(copy) - expected).abs().max() > 1e-4
    check(copy)
    assert torch.equal(logits(model), expected)


def test_copies_hold_no_fold(served):
    model, expected = served
    check_copy(deepcopy(model), expected, model)
    assert kept(model) == len(adapters(model))


def test_files_hold_no_fold(tmp_path):
    model = train(adapted(gpt2()))  # transformers' Llama cannot be pickled
    names = set(model.state_dict())
    torch.save(model, tmp_path / "first")
    expected = logits(model)
    assert kept(model) == 8
    torch.save(model, tmp_path / "later")
    assert (tmp_path / "later").stat().st_size == (tmp_path / "first").stat().st_size
    assert set(model.state_dict()) == names
    check_copy(torch.load(tmp_path / "later", weights_only=False), expected, model)
    check_copy(pickle.loads(pickle.dumps(model)), expected, model)
