"""Tensors that layers share, under `axolotl train`: on one process and on two, with checkpointing, saved, loaded and resumed."""

import pytest
import torch
from safetensors.torch import load_file

from .commands import train_here
from .ranks import assert_follows, config_for, history, logits_in_memory, logits_of, output

pytestmark = pytest.mark.e2e

BOTH = {"layers": 2, "inputs": True}
KEYS = {"gradient_checkpointing": True}


def keys(share, **changes):
    """Return the quickstart's keys with `share`, in a quarter of LoRA's parameters."""
    return {"qtha": {"rank": 8, "param_budget": 0.24, "share": share}, **KEYS, **changes}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Output folders of runs on one process, each of which runs once."""
    done = {}

    def get(name, share):
        if name not in done:
            config = config_for(tmp_path_factory.mktemp("share") / name, None, **keys(share))
            train_here(config)
            done[name] = output(config)
        return done[name]

    return get


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_ranks_do_what_one_does(strategy, tmp_path, servers, single):
    config = config_for(tmp_path / strategy, strategy, **keys(BOTH, gradient_checkpointing=strategy != "zero3"))
    servers.train(config, strategy)
    alone = single("both", BOTH)
    assert_follows(history(output(config)), history(alone))
    assert torch.equal(logits_in_memory(output(config))[0], logits_of(output(config)))
    saved, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (output(config), alone))
    assert saved.keys() == wanted.keys()
    assert len([name for name in saved if name.endswith("cores_b")]) == 7 * 2  # of four layers, in groups of two


def test_fsdp2_with_inputs_alone(tmp_path, servers, single):
    share = {"inputs": True}
    config = config_for(tmp_path / "fsdp2", "fsdp2", **keys(share, gradient_checkpointing=False))
    servers.train(config, "fsdp2")
    assert_follows(history(output(config)), history(single("inputs", share)))
    assert torch.equal(logits_in_memory(output(config))[0], logits_of(output(config)))


def test_a_resumed_run_ends_as_if_never_stopped(tmp_path, single):
    alone = single("both", BOTH)
    config = config_for(tmp_path / "again", None, **keys(BOTH), resume_from_checkpoint=str(alone / "checkpoint-3"))
    train_here(config)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (output(config), alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
