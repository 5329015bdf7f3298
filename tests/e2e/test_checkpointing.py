"""`axolotl train` checkpointed or compiled does what it does without; checkpoints of earlier versions."""

import os
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from axolotl_qtha.training.manifest import MANIFEST
from axolotl_qtha.tuner.layer import adapted_layers

from .commands import losses, train_here, write_config

pytestmark = pytest.mark.e2e

STEPS = {"max_steps": 4, "save_steps": 2, "warmup_steps": 0, "eval_steps": 4}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    model, _, trainer = train_here(write_config(folder, **STEPS))
    return folder, model, losses(trainer)


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=str,
)
def test_losses_are_the_same(keys, plain, tmp_path):
    _, _, trainer = train_here(write_config(tmp_path, **STEPS, **keys))
    assert losses(trainer) == pytest.approx(plain[2], rel=1e-6)  # the log rounds


def test_compiled_as_lora_is(tmp_path):
    """`torch_compile: true`: all of it is compiled, in as many graphs as with LoRA; the host hides what cannot be."""
    keys = {"max_steps": 2, "save_steps": 2, "warmup_steps": 0, "eval_steps": None, "test_datasets": None}
    keys["overrides_of_model_config"] = {"num_hidden_layers": 1}  # Dynamo follows the model 13 times, whatever the adapter
    expected = losses(train_here(write_config(tmp_path, **keys))[2])
    # traced by Dynamo as for the default backend, whose C++ takes a minute for each graph
    keys |= {"torch_compile": True, "torch_compile_backend": "eager"}
    found = {}
    for source in ("qtha.yml", "lora.yml"):
        torch._dynamo.reset()
        counters.clear()
        with patch.dict(os.environ):  # by which transformers has Accelerate compile, and would in the tests that follow
            _, _, trainer = train_here(write_config(tmp_path, source, **keys))
        graphs = counters["stats"]["unique_graphs"], counters["frames"]["ok"], counters["frames"]["total"]
        found[source] = *graphs, sum(counters["graph_break"].values())
        if source == "qtha.yml":
            assert losses(trainer) == pytest.approx(expected, rel=1e-4)  # float32, summed in another order
    assert found["qtha.yml"] == found["lora.yml"]
    assert found["qtha.yml"][0] > 1


def test_a_checkpoint_of_an_earlier_version_is_not_resumed_but_trained_on(tmp_path):
    keys = {**STEPS, "max_steps": 2, "qtha": {"mpo": "tt"}}  # that version knew no other form
    model, _, _ = train_here(write_config(tmp_path, **keys))
    checkpoint = next(path for path in sorted(tmp_path.rglob("checkpoint-2")))
    (checkpoint / MANIFEST).unlink()  # which that version did not write
    path = checkpoint / "adapter_model.safetensors"
    now, tensors = load_file(path), {}
    for name, layer in adapted_layers(model).items():
        adapter = layer.qtha_adapter["default"]
        for key, part in adapter.table.items():
            flat = now[f"base_model.model.{name}.qtha_adapter.{part.tensor}"]
            tensors[f"base_model.model.{name}.qtha_adapter.{key}"] = flat[part.start : part.start + part.size].clone()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*earlier version.*What works: `lora_model_dir: "):
        train_here(write_config(tmp_path, **keys, resume_from_checkpoint=str(checkpoint)))
    _, _, trainer = train_here(write_config(tmp_path, **{**keys, "max_steps": 1}, lora_model_dir=str(checkpoint)))
    assert len(losses(trainer)) == 1
