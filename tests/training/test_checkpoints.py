"""Checkpoints: what a killed run leaves behind is never taken for one, and what does not fit the run is refused."""

import json
import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

from axolotl_qtha.training import checkpoints
from axolotl_qtha.training.checkpoints import check, fault, kind, of_run, ranks_of, refuse_others, set_aside_incomplete
from axolotl_qtha.tuner.saving import guard

from ..models import FILE, adapted, llama, tokens
from .hostile import Planted


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of transformers' Trainer with checkpoints after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    model = adapted(llama())
    guard(model)
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(folder, max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    Trainer(model, arguments, train_dataset=data).train()
    return folder


@pytest.fixture
def plain(run, tmp_path):
    """A copy of that run that a test may damage."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def deepspeed(plain):
    """Its last checkpoint with the files that two DeepSpeed ranks write (ZeRO-1 or 2)."""
    folder = plain / "checkpoint-2"
    for name in ("optimizer.pt", "rng_state.pth"):
        (folder / name).unlink()
    states = folder / "global_step2"
    states.mkdir()
    for rank in range(2):
        torch.save({}, folder / f"rng_state_{rank}.pth")
        torch.save({}, states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save({}, states / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step2")
    return folder


def zero3(folder):
    """Make it a checkpoint of ZeRO-3."""
    states = folder / "global_step2"
    (states / "mp_rank_00_model_states.pt").unlink()
    for rank in range(2):
        torch.save({}, states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize("where", [".", "checkpoint-1"])
def test_another_methods_training_is_not_written_over(where, plain):
    refuse_others(plain)
    refuse_others(plain / "nothing")
    settings = plain / where / "adapter_config.json"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match=r"output_dir: .* holds the adapter of a LORA training.*What works: another folder"):
        refuse_others(plain)
    assert (plain / "checkpoint-1").is_dir()


def test_complete_checkpoints_have_no_fault(run, deepspeed):
    assert [path.name for path in of_run(run)] == ["checkpoint-1", "checkpoint-2"]
    assert [fault(path) for path in of_run(run)] == [None, None]
    assert (kind(run / "checkpoint-2"), ranks_of(run / "checkpoint-2")) == ("plain", None)
    assert fault(deepspeed) is None
    assert (kind(deepspeed), ranks_of(deepspeed)) == ("deepspeed", 2)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "adapter_config.json", FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"],
)
def test_every_file_cut_off_is_found(name, plain):
    halve(plain / "checkpoint-2" / name)
    assert name in fault(plain / "checkpoint-2")


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_config.json", FILE])
def test_every_file_missing_is_found(name, plain):
    (plain / "checkpoint-2" / name).unlink()
    assert f"{name} is missing" in fault(plain / "checkpoint-2")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rng_state_0.pth", "rng_state_0.pth is missing"),
        ("rng_state_1.pth", "rng_state_1.pth is missing"),
        ("latest", "latest is missing"),
        ("global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "the optimiser's states of rank 0 are missing"),
        ("global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "the optimiser's states of rank 1 are missing"),
    ],
)
def test_every_rank_must_have_written(name, words, deepspeed):
    (deepspeed / name).unlink()
    assert fault(deepspeed) == words


def test_a_conversion_that_was_killed_is_no_fault(deepspeed):
    (deepspeed / "global_step2_universal").mkdir()
    (deepspeed / "global_step2_universal" / "half.pt").write_bytes(b"PK")
    assert fault(deepspeed) is None


def test_a_save_that_was_killed_is_found(plain):
    (plain / "checkpoint-2" / ".saving-abc").mkdir()
    assert fault(plain / "checkpoint-2") == "its adapter was being saved"


def test_one_ranks_shard_is_a_fault(plain):
    torch.save({}, plain / "checkpoint-2" / checkpoints.ONE_RANKS_SHARD)
    assert checkpoints.ONE_RANKS_SHARD in fault(plain / "checkpoint-2")


def test_incomplete_checkpoints_are_set_aside_and_kept(plain):
    halve(plain / "checkpoint-2" / "optimizer.pt")
    ((place, why),) = set_aside_incomplete(plain)
    assert (place, why) == (plain / "incomplete-checkpoint-2", "optimizer.pt is cut off")
    assert [path.name for path in of_run(plain)] == ["checkpoint-1"]
    shutil.copytree(place, plain / "checkpoint-2")  # the next run was killed at the same step
    ((place, _),) = set_aside_incomplete(plain)
    assert place.name == "incomplete-2-checkpoint-2"
    assert (place / FILE).is_file()
    assert not set_aside_incomplete(plain)


def refused(folder, ours, stage=0):
    with pytest.raises(ValueError, match="What works") as error:
        check(folder, folder.parent, ours, stage)
    message = str(error.value)
    assert f"resume_from_checkpoint: {str(folder)!r}" in message
    return message


def test_a_checkpoint_that_fits_passes(plain):
    check(plain / "checkpoint-2", plain, "plain", 0)


def test_a_deepspeed_checkpoint_that_fits_passes(deepspeed):
    for stage in (1, 2):
        check(deepspeed, deepspeed.parent, "deepspeed", stage)
    check(zero3(deepspeed), deepspeed.parent, "deepspeed", 3)


def test_no_folder_and_no_checkpoint(plain, tmp_path):
    assert str(plain / "checkpoint-2") in refused(plain / "checkpoint-3", "plain")
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "empty", "plain")
    assert "no trainer_state.json" in message
    assert "lora_model_dir" in message


def test_an_incomplete_one_names_the_last_complete_one(plain):
    halve(plain / "checkpoint-2" / FILE)
    message = refused(plain / "checkpoint-2", "plain")
    assert "corrupt or truncated" in message
    assert str(plain / "checkpoint-1") in message
    shutil.rmtree(plain / "checkpoint-1")
    assert "start anew" in refused(plain / "checkpoint-2", "plain")


def test_another_kind_of_run(plain, deepspeed):
    assert "was written with neither `deepspeed:` nor" in refused(plain / "checkpoint-1", "deepspeed", 2)
    assert "was written with `deepspeed:`, the YAML has `fsdp_version: 2`" in refused(deepspeed, "fsdp")
    (plain / "checkpoint-1" / "optimizer.pt").rename(plain / "checkpoint-1" / "optimizer.bin")
    assert "was written with `fsdp_version: 2`" in refused(plain / "checkpoint-1", "plain")


def test_another_zero_stage(deepspeed):
    assert "was written with ZeRO-1 or 2, `deepspeed:` names stage 3" in refused(deepspeed, "deepspeed", 3)
    assert "was written with ZeRO-3, `deepspeed:` names stage 2" in refused(zero3(deepspeed), "deepspeed", 2)


def test_a_checkpoint_without_optimiser_states_is_let_through(plain):
    """`save_only_model: true` writes such; transformers says that they are missing."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (plain / "checkpoint-2" / name).unlink()
    check(plain / "checkpoint-2", plain, "deepspeed", 2)


def test_deepspeed_reads_the_converted_states():
    settings = {"zero_optimization": {"stage": 3}, "checkpoint": {"tag_validation": "Warn"}}
    again = checkpoints.for_another_number_of_ranks(settings)
    assert again["checkpoint"] == {"tag_validation": "Warn", "load_universal": True}
    assert json.dumps(settings["checkpoint"]) == '{"tag_validation": "Warn"}'


@pytest.mark.parametrize("name", ["scheduler.pt", "global_step2/mp_rank_00_model_states.pt"])
def test_no_code_in_a_checkpoint_runs(deepspeed, tmp_path, name):
    """Of two ranks, while this process is one: it would be converted."""
    torch.save(Planted(tmp_path / "made"), deepspeed / name)
    assert fault(deepspeed) is None
    with pytest.raises(ValueError, match=r"posix\.mkdir.*lora_model_dir"):
        checkpoints.prepare(deepspeed, deepspeed.parent, {"zero_optimization": {"stage": 2}}, False)
    assert not (tmp_path / "made").exists()
