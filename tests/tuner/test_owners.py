"""Which layers share: the groups, whose tensors a layer uses, and what is refused."""

import math

import pytest
from peft import inject_adapter_in_model
from torch import nn

from axolotl_qtha.tuner.share import Owned, Share, owners

from ..models import adapted, adapters, config, llama, logits, train


def test_of_cross_attention_the_query_reads_another_input():
    sizes = {f"layers.0.encoder_attn.{name}_proj": (8, 8) for name in "qkv"}
    found = owners(Share(inputs=True), sizes)
    q, k, v = sizes
    assert (found[q].a, found[k].a, found[v].a) == (q, k, k)
    assert found[v].owned(v) == Owned(a=False, b=True, branch=False, runs=False)


def test_a_share_that_shares_nothing_is_refused():
    settings = [
        ({"inputs": True}, {"target_modules": ["q_proj", "o_proj"]}),
        ({"layers": 2}, {"layers_to_transform": [2]}),
        ({"layers": "auto"}, {"layers_to_transform": [2], "mpo": "none", "bond_dim": None, "mid_dim": None}),
    ]
    for share, others in settings:
        with pytest.raises(ValueError, match=r"qtha.share: .* finds no layers that could share.*What works: .*or no `share:`"):
            adapted(llama(3), share=share, **others)
    for share in ({}, {"layers": 1}, {"layers": 1, "inputs": False}):
        with pytest.raises(ValueError, match=r"qtha.share: .* shares nothing. What works: `share: \{layers: 4\}`"):
            config(share=share)


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
