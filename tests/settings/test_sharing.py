"""`share:` and `mpo: auto` in a YAML: the kind of checkpointing, FSDP2, and errors that name the key."""

import pytest

from axolotl_qtha.errors import PrivateSettings

from .test_args import validated

SHARE = {"rank": 8, "share": {"layers": 4}}
CHECKPOINTED = {"gradient_checkpointing": True}
FSDP2 = {"fsdp_version": 2, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}


def test_checkpointing_does_not_reenter_where_the_yaml_says_nothing():
    assert validated(qtha=SHARE, **CHECKPOINTED).gradient_checkpointing_kwargs == {"use_reentrant": False}
    kept = {"preserve_rng_state": False}
    assert validated(qtha=SHARE, **CHECKPOINTED, gradient_checkpointing_kwargs=kept).gradient_checkpointing_kwargs == {
        **kept,
        "use_reentrant": False,
    }
    assert validated(qtha=SHARE).gradient_checkpointing_kwargs is None


@pytest.mark.parametrize("keys", [{"mpo": "tt"}, {"mpo": "none"}, {"bond_dim": 4}, {"num_cores": 3}], ids=str)
def test_axolotl_own_default_stays_without_sharing(keys):
    found = validated(qtha={"rank": 8, **keys}, **CHECKPOINTED)
    assert found.gradient_checkpointing_kwargs is None  # it is set later, to reenter


@pytest.mark.parametrize("qtha", [None, {"rank": 8}, {"mpo": "auto"}], ids=str)
def test_layers_that_may_come_to_share_have_it_too(qtha):
    found = validated(qtha=qtha, **CHECKPOINTED)
    assert found.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert found.qtha is None or found.qtha["mpo"] == "auto"


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": "offload"},
        {"gradient_checkpointing": True, "activation_offloading": True},
        {"gradient_checkpointing": True, "activation_offloading": "disk"},
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [{"layers": 4}, {"inputs": True}], ids=str)
def test_other_kinds_are_refused(share, keys):
    key = list(keys)[-1]
    message = (
        rf"{key}: .* does not work with `qtha: \{{share: .*What works: `gradient_checkpointing: true` with .*use_reentrant: false"
    )
    with pytest.raises(ValueError, match=message):
        validated(qtha={"share": share}, **keys)
    assert validated(qtha={"rank": 8}, **keys).qtha["mpo"] == "tt"  # which was left open
    assert validated(qtha=None, **keys).qtha["mpo"] == "tt"


def test_fsdp2_shares_no_tensor_of_several_blocks():
    with pytest.raises(
        ValueError, match=r"qtha: \{share: \{'layers': 4\}\} does not work with FSDP2.*What works: `share: \{inputs: true\}`"
    ):
        validated(qtha=SHARE, **FSDP2)
    assert validated(qtha={"share": {"inputs": True}}, **FSDP2).adapter == "qtha"
    assert validated(qtha={"rank": 8}, **FSDP2).qtha["mpo"] == "tt"
    assert validated(qtha={"rank": 8, "mpo": "none"}, **FSDP2).qtha["mpo"] == "none"


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({"layers": 0}, r"qtha\.share\.layers: 0 is no number from 1 on"),
        ({"layer": 2}, r"qtha\.share\.layer: \(int, value not shown\) is not a key of the `share:` block. What works: `layers`"),
        ("layers", r"qtha\.share: 'layers' does not say what is shared"),
    ],
)
def test_bad_values_are_named(share, message):
    with pytest.raises((ValueError, PrivateSettings), match=message):
        validated(qtha={"share": share})


def test_zero3_and_checkpointing_do_not_go_with_it():
    zero3 = {"deepspeed": "example_configs/deepspeed/zero3.json"}
    with pytest.raises(
        ValueError, match=r"deepspeed: .*zero3\.json.*gradient_checkpointing: true.*share.*What works: ZeRO-2, DDP"
    ):
        validated(qtha=SHARE, **zero3, **CHECKPOINTED)
    assert validated(qtha=SHARE, **zero3).adapter == "qtha"
    assert validated(qtha={"rank": 8}, **zero3, **CHECKPOINTED).qtha["mpo"] == "tt"
    assert validated(qtha={"rank": 8}, **zero3).qtha["mpo"] == "auto"
