"""A resumed run has the checkpoint's adapters: the trained one beside another, too; what differs stops it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from axolotl_qtha.training.resuming import CompareWithCheckpoint, first_difference, load_the_trained
from axolotl_qtha.tuner.saving import guard, saved_tensors

from ..models import FILE, adapted, config, llama, tokens, train


def fresh(**settings):
    """Return a model with a trained adapter and, as GRPO has it, a frozen copy that is the reference."""
    model = train(adapted(llama(), modules_to_save=["lm_head"], **settings), steps=1)
    model.add_adapter("ref", config(modules_to_save=["lm_head"], **settings))
    with torch.no_grad():
        theirs = saved_tensors(model, "ref")
        for name, tensor in saved_tensors(model, "default").items():
            theirs[name].copy_(tensor)
    guard(model)
    return model


def trainer_of(model, folder, steps):
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    return Trainer(model, TrainingArguments(folder, max_steps=steps, save_steps=2, **options), train_dataset=data)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The second step of a run with both adapters."""
    folder = tmp_path_factory.mktemp("run")
    trainer_of(fresh(), folder, 2).train()
    return folder / "checkpoint-2"


def copied(model, adapter="default"):
    return {name: tensor.detach().clone() for name, tensor in saved_tensors(model, adapter).items()}


def test_transformers_alone_leaves_the_trained_adapter_out_and_is_stopped(checkpoint, tmp_path):
    model = fresh()
    trainer = trainer_of(model, tmp_path, 3)
    trainer.add_callback(CompareWithCheckpoint(checkpoint))
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint: '.*checkpoint-2': .* tensor base_model\.\S+ is not the one .*What w"
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step <= 2


def test_both_adapters_are_loaded_and_one_is_trained(checkpoint, tmp_path):
    model = fresh()
    reference, start = copied(model, "ref"), copied(model)
    trainer = trainer_of(model, tmp_path, 3)
    load_the_trained(trainer)
    trainer.add_callback(CompareWithCheckpoint(checkpoint))
    seen = {}
    trainer.add_callback(
        type("See", (CompareWithCheckpoint,), {"on_train_begin": lambda *_, **__: seen.update(copied(model))})(checkpoint)
    )
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer.train(resume_from_checkpoint=str(checkpoint))
    saved = load_file(checkpoint / FILE)
    assert all(torch.equal(seen[name], value) for name, value in saved.items())
    assert any(not torch.equal(seen[name], value) for name, value in start.items())
    assert any(not torch.equal(value, seen[name]) for name, value in copied(model).items())  # the third step trained it
    assert all(torch.equal(value, reference[name]) for name, value in copied(model, "ref").items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == frozen
    assert model.active_adapter == "default"


@pytest.mark.parametrize("part", [".angles", ".cores", "lm_head.weight"])
@pytest.mark.parametrize("adapter", ["default", "ref"])
def test_the_first_tensor_that_differs_is_named(checkpoint, tmp_path, adapter, part):
    model = fresh()
    model.load_adapter(str(checkpoint), "default", is_trainable=True)
    assert first_difference(model, checkpoint) is None
    tensors = saved_tensors(model, adapter)
    name = next(name for name in tensors if name.endswith(part))
    with torch.no_grad():
        tensors[name].view(-1)[-1] += 1e-3
    assert first_difference(model, checkpoint) == name


def test_a_tensor_that_the_checkpoint_lacks_is_named(checkpoint, tmp_path):
    model = fresh()
    model.load_adapter(str(checkpoint), "default", is_trainable=True)
    saved = load_file(checkpoint / FILE)
    name = next(iter(saved))
    (tmp_path / "adapter_config.json").write_text((checkpoint / "adapter_config.json").read_text())
    save_file({key: value for key, value in saved.items() if key != name}, tmp_path / FILE)
    assert first_difference(model, tmp_path) == name


def test_saved_in_fewer_bits_than_trained_in_is_the_same(checkpoint, tmp_path):
    model = fresh()
    save_file({name: value.bfloat16() for name, value in load_file(checkpoint / FILE).items()}, tmp_path / FILE)
    with torch.no_grad():
        for name, value in load_file(tmp_path / FILE).items():
            saved_tensors(model, "default")[name].copy_(value)
    assert first_difference(model, tmp_path) is None


def test_what_this_rank_holds_in_part_is_not_compared(checkpoint):
    model = fresh()
    assert first_difference(model, checkpoint) is not None
    for tensor in saved_tensors(model, "default").values():
        tensor.ds_id = 0  # as ZeRO-3 marks what it has partitioned
    assert first_difference(model, checkpoint) is None


def test_shared_tensors_are_compared_once(tmp_path):
    model = train(adapted(llama(), share={"layers": 2}))
    guard(model)
    model.save_pretrained(tmp_path)
    assert first_difference(model, Path(tmp_path)) is None
