"""What a resume unpickles beside DeepSpeed's states: planted code is refused, and not run."""

import json
import pickle
import random

import numpy as np
import pytest
import torch

from axolotl_qtha.training.unpickling import refuse_unsafe

from .hostile import Planted, states, write_states

FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth")
FILES += ("pytorch_model.bin", "pytorch_model_fsdp.bin", "adapter_model.bin", "reference/adapter_model.bin")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with what transformers writes."""
    folder = tmp_path / "checkpoint-2"
    (folder / "reference").mkdir(parents=True)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimiser.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)
    torch.save(optimiser.state_dict(), folder / "optimizer.pt")
    torch.save(schedule.state_dict(), folder / "scheduler.pt")
    generators = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    torch.save(generators, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_what_transformers_writes_passes(folder):
    refuse_unsafe(folder, deepspeed=False)
    refuse_unsafe(folder, deepspeed=True)


def test_states_of_torchaos_optimisers_pass(folder):
    """They are classes that PyTorch does not know before torchao's optimisers are imported."""
    from torchao.optim import AdamW8bit

    parameter = torch.nn.Parameter(torch.randn(4096, 2))
    optimiser = AdamW8bit([parameter])
    parameter.sum().backward()
    optimiser.step()
    torch.save(optimiser.state_dict(), folder / "optimizer.pt")
    assert b"torchao.optim" in (folder / "optimizer.pt").read_bytes()
    refuse_unsafe(folder, deepspeed=False)


@pytest.mark.parametrize("name", FILES)
def test_planted_code_is_refused_and_not_run(tmp_path, folder, name):
    torch.save({"state": Planted(tmp_path / "made")}, folder / name)
    with pytest.raises(ValueError, match="resume_from_checkpoint") as error:
        refuse_unsafe(folder, deepspeed=False)
    assert not (tmp_path / "made").exists()
    for word in (repr(name), "posix.mkdir", f"lora_model_dir: {folder}"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"])
def test_states_that_fsdp_wrote_as_shards_are_refused(tmp_path, folder, name):
    """torch.distributed.checkpoint reads `.metadata` with pickle.load."""
    (folder / name).parent.mkdir()
    (folder / name).write_bytes(pickle.dumps(Planted(tmp_path / "made")))
    with pytest.raises(ValueError, match=name) as error:
        refuse_unsafe(folder, deepspeed=False)
    assert not (tmp_path / "made").exists()
    assert "lora_model_dir" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"cut off", pickle.dumps({"a": 1})])
def test_files_that_are_none_of_torchs(folder, content):
    (folder / "scheduler.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"scheduler\.pt.*lora_model_dir"):
        refuse_unsafe(folder, deepspeed=False)


def test_the_best_checkpoint_is_read_at_the_end_and_checked_before(tmp_path, folder):
    """`load_best_model_at_end` reads it wherever `trainer_state.json` says, with DeepSpeed its states as well."""
    best = write_states(tmp_path / "elsewhere")
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(best)}))
    refuse_unsafe(folder, deepspeed=True)
    name, values = next(iter(states(2).items()))
    torch.save({**values, "more": Planted(tmp_path / "made")}, best / "global_step2" / name)
    with pytest.raises(ValueError, match="elsewhere"):
        refuse_unsafe(folder, deepspeed=True)
    assert not (tmp_path / "made").exists()
    for nothing in (None, 3, str(tmp_path / "gone"), str(folder)):
        (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": nothing}))
        refuse_unsafe(folder, deepspeed=True)
