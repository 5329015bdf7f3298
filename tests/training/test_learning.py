"""A training that leaves a part of the adapter as it was, or whose loss is no number, stops and says so."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from axolotl_qtha.errors import Diverged
from axolotl_qtha.training.learning import NotTrained, watch

from ..models import VOCABULARY, adapted, llama

ROWS = torch.randint(VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(1)).tolist()


class Skips(torch.optim.Adam):
    """Updates no tensor of `few` entries."""

    few = 0

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.numel() <= self.few:
                    parameter.grad = None
        return super().step(closure)


def trainer_of(tmp_path, optimizer=None, circuit_lr=None, scheduler="constant", compute_loss=None, settings=None, **arguments):
    model = adapted(llama(1), **(settings or {}))
    arguments = {"max_steps": 4, "logging_steps": 1, "learning_rate": 0.02, "save_strategy": "no", "use_cpu": True, **arguments}
    arguments |= {"report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2}
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    options = {} if optimizer is None else {"optimizer_cls_and_kwargs": (optimizer, {"lr": arguments["learning_rate"]})}
    args = TrainingArguments(str(tmp_path / "out"), lr_scheduler_type=scheduler, **arguments)
    trainer = Trainer(model, args, train_dataset=rows, **options)
    if compute_loss:
        plain = trainer.compute_loss
        trainer.compute_loss = lambda *given, **more: compute_loss(plain(*given, **more), trainer.state.global_step)
    callback = watch(trainer, "its_name", circuit_lr)
    trainer.add_callback(callback)
    return trainer, callback


def test_an_ordinary_training_is_let_through_and_then_left_alone(tmp_path):
    trainer, callback = trainer_of(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    assert callback._pending == {}  # all seen to move: nothing is copied any more
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_steps_of_a_warm_up_that_cannot_move_anything_are_let_through(tmp_path, scheduler):
    trainer, callback = trainer_of(
        tmp_path, scheduler=scheduler, warmup_steps=3, save_strategy="steps", save_steps=1, max_steps=6
    )
    trainer.train()
    assert callback._pending == {}


def test_tensors_that_the_optimiser_does_not_have(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    create = type(trainer).create_optimizer

    def without_cores(self, model=None):
        create(self)
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.numel() < 100]
        return self.optimizer

    trainer.create_optimizer = without_cores.__get__(trainer)
    watch(trainer, "its_name", None)
    with pytest.raises(NotTrained, match=r"'its_name': 7 of 21 tensors .* not among .*cores, .*`optimizer: adamw_torch`"):
        trainer.train()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_learning_rate_of_nothing(tmp_path):
    trainer, _ = trainer_of(tmp_path, learning_rate=0.0)
    with pytest.raises(NotTrained, match=r"21 of 21 tensors .* learning rate of 0 .*`learning_rate:`"):
        trainer.train()


def test_a_circuit_lr_that_does_not_arrive(tmp_path):
    trainer, _ = trainer_of(tmp_path, circuit_lr=0.5)
    with pytest.raises(NotTrained, match=r"qtha.circuit_lr: 0.5 does not reach .*\.angles, which would train at 0.02"):
        trainer.train()


def test_tensors_that_are_in_the_optimiser_and_do_not_move(tmp_path):
    class SkipsSmall(Skips):
        few = 32  # the circuit's angles, W_C and W_Q

    kaiming = {"branch_init": "kaiming"}  # else W_Q, which did not move, would keep the angles' gradient at zero
    trainer, _ = trainer_of(tmp_path, SkipsSmall, settings=kaiming, save_strategy="steps", save_steps=12, max_steps=12)
    with pytest.raises(NotTrained, match=r"14 of 21 tensors .* did not change in 8 steps that had a gradient .*angles"):
        trainer.train()
    assert trainer.state.global_step == 9  # in the first B is zero, and the others have no gradient
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_an_adapter_that_is_still_nothing_is_not_saved(tmp_path):
    trainer, _ = trainer_of(tmp_path, compute_loss=lambda loss, step: loss * 0, save_strategy="steps", save_steps=3)
    with pytest.raises(NotTrained, match=r"after 3 steps the adapter is as it started.*labels"):
        trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("every", [1, 2])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path, bad, every):
    """Of the third step on; transformers would log the mean of the losses before."""
    trainer, _ = trainer_of(
        tmp_path,
        settings={"quantum": "none"},  # the engine for CPUs refuses angles that are NaN by itself
        compute_loss=lambda loss, step: loss * bad if step >= 2 else loss,
        logging_steps=every,
        save_strategy="steps",
        save_steps=2,
        max_steps=8,
    )
    with pytest.raises(Diverged, match=r"not a finite number at step \d.*the last is checkpoint-2.*learning_rate:` \(now 0.02\)"):
        trainer.train()
    assert trainer.state.global_step == (3 if every == 1 else 4)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_gradients_that_are_no_numbers(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    tensor = next(p for p in trainer.model.parameters() if p.requires_grad)
    tensor.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match=r"grad_norm: not a finite number at step 1.*No checkpoint was written"):
        trainer.train()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_waits_for_no_gpu(tmp_path):
    trainer, callback = trainer_of(tmp_path, use_cpu=False)
    model = trainer.model.cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    given = {"model": model, "optimizer": optimizer}
    before, after = ("on_step_begin", "on_pre_optimizer_step"), ("on_optimizer_step", "on_step_end")

    def without_waiting(events):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for event in events:
                getattr(callback, event)(trainer.args, trainer.state, trainer.control, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for _ in range(3):
        ids = torch.tensor(ROWS[:2], device="cuda")
        model(input_ids=ids, labels=ids).loss.backward()
        without_waiting(before)
        optimizer.step()
        without_waiting(after)
        optimizer.zero_grad()
    callback._check_seen()
    assert callback._pending == {}
