"""Checkpoints and the final save of a training, killed or out of disk at every place where files change."""

import shutil
import subprocess
from contextlib import suppress
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from axolotl_qtha.training import manifest
from axolotl_qtha.training.checkpoints import fault, of_run, set_aside_incomplete
from axolotl_qtha.training.resuming import CompareWithCheckpoint
from axolotl_qtha.training.saves import guard_checkpoints, tidy
from axolotl_qtha.tuner.saving import guard

from ..models import adapted, llama, tokens
from .interposer import Interposer

HOWS = ["before", "half", "full"]
STATE = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt", "rng_state.pth")
LIMIT = 2  # save_total_limit


def trainer_in(folder, steps=2):
    torch.set_num_threads(1)
    model = adapted(llama(1), target_modules=["q_proj", "down_proj"])
    guard(model)
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    settings = {"save_steps": 1, "save_total_limit": LIMIT, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(folder, max_steps=steps, logging_steps=1, **settings), train_dataset=data)
    guard_checkpoints(trainer)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer after two steps, its folder with checkpoints 1 and 2, and a copy of it."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_in(folder / "out")
    trainer.train()
    shutil.copytree(folder / "out", folder / "kept")
    return trainer, folder / "out", folder / "kept"


def digests(folder):
    return {name: sha256((folder / name).read_bytes()).hexdigest() for name in STATE if name != "trainer_state.json"}


def save(trainer, step):
    """Save as after that step, with weights and moments that no earlier step had."""
    trainer.state.global_step = step
    with torch.no_grad():
        for tensor in trainer.model.parameters():
            if tensor.requires_grad:
                tensor.fill_(step / 8)
    for state in trainer.optimizer.state.values():
        state["exp_avg"].fill_(step / 8)
    trainer._save_checkpoint(trainer.model, None)


def restore(out, kept):
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(kept, out)


def places(out, work):
    watch = Interposer(out)
    with watch.watching():
        work()
    return watch.places


def left_over(out):
    return [path.name for path in out.iterdir() if path.name.startswith((".", "incomplete"))]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("step", [3, 2], ids=["new", "in the place of an older one"])
def test_a_checkpoint_is_the_old_one_or_the_new_one(step, how, trained, crash_count):
    trainer, out, kept = trained
    trainer.args.output_dir = str(out)
    old = digests(kept / "checkpoint-2")
    restore(out, kept)
    found = places(out, lambda: save(trainer, step))
    new = digests(out / f"checkpoint-{step}")
    assert fault(out / f"checkpoint-{step}", whole=True) is None
    names = [path.name for path in of_run(out)]
    assert names == (["checkpoint-2", "checkpoint-3"] if step == 3 else ["checkpoint-1", "checkpoint-2"])
    outcomes = set()
    for at in range(len(found)):
        restore(out, kept)
        Interposer(out, at, how).interrupt(lambda: save(trainer, step))
        if how == "full":  # the process lives, and has put back what it took away
            assert fault(out / "checkpoint-2", whole=True) is None, found[at]
        tidy(out, LIMIT)
        set_aside_incomplete(out)
        latest = of_run(out)[-1]
        assert fault(latest, whole=True) is None, found[at]
        assert digests(latest) == (new if latest.name == f"checkpoint-{step}" and digests(latest) != old else old), found[at]
        assert len(of_run(out)) <= LIMIT + 1, found[at]
        tidy(out, LIMIT)
        assert not [name for name in left_over(out) if name.startswith(".")], found[at]
        outcomes.add(digests(latest) == new)
    assert outcomes == {True, False}  # so the kills were on both sides of the moment
    crash_count("checkpoint", how, found)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in memory, where the machine lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here; the tests with an interposer are run")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("step", [3, 2], ids=["new", "in the place of an older one"])
def test_a_disk_that_is_full_at_any_size(step, trained, small_disk, crash_count):
    trainer, _, kept = trained
    old, out, filler = digests(kept / "checkpoint-2"), small_disk / "out", small_disk / "filler"
    trainer.args.output_dir = str(out)
    restore(out, kept)
    before = shutil.disk_usage(small_disk).free
    save(trainer, step)
    new = digests(out / f"checkpoint-{step}")
    needed = 3 * before // 8  # more than a checkpoint of this model
    outcomes = []
    for left in range(0, needed, needed // 40):
        filler.unlink(missing_ok=True)
        restore(out, kept)
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
        with suppress(Exception):
            save(trainer, step)
        filler.unlink()
        assert fault(out / "checkpoint-2", whole=True) is None, left
        tidy(out, LIMIT)
        latest = of_run(out)[-1]
        assert fault(latest, whole=True) is None, left
        assert digests(latest) in (old, new), left
        assert not left_over(out), left
        outcomes.append(digests(latest) == new)
    assert outcomes[0] is False
    assert outcomes[-1] is True
    crash_count("checkpoint", "a real disk, full at any size", outcomes)


@pytest.mark.parametrize("how", HOWS)
def test_a_finished_adapter_is_the_old_one_or_the_new_one(how, tmp_path, crash_count):
    out = tmp_path / "out"
    models = {rank: adapted(llama(1), target_modules=["q_proj"], rank=rank, bond_dim=2, mid_dim=4) for rank in (2, 4)}
    for model in models.values():
        guard(model)

    def start():
        shutil.rmtree(out, ignore_errors=True)
        models[2].save_pretrained(out)

    start()
    found = places(out, lambda: models[4].save_pretrained(out))
    outcomes = set()
    for at in range(len(found)):
        start()
        Interposer(out, at, how).interrupt(lambda: models[4].save_pretrained(out))
        tidy(out, None)
        config = type(models[2].peft_config["default"]).from_pretrained(out)
        tensors = load_file(out / "adapter_model.safetensors")
        wanted = {name: tuple(tensor.shape) for name, tensor in _saved(models[config.rank], tmp_path).items()}
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == wanted, found[at]
        assert not left_over(out), found[at]
        outcomes.add(config.rank)
    assert outcomes == {2, 4}
    crash_count("final save", how, found)


def test_a_save_whose_move_failed_is_not_put_over_a_later_one(tmp_path, monkeypatch):
    out, model = tmp_path / "out", adapted(llama(1), target_modules=["q_proj"])
    guard(model)
    model.save_pretrained(out)
    with monkeypatch.context() as failing:
        failing.setattr("axolotl_qtha.tuner.saving.os.replace", raise_once)
        with pytest.raises(OSError, match="once"):
            model.save_pretrained(out)
    assert len(left_over(out)) == 1
    with torch.no_grad():
        next(tensor for tensor in model.parameters() if tensor.requires_grad).add_(1)
    model.save_pretrained(out)
    wanted = (out / "adapter_model.safetensors").read_bytes()
    assert not left_over(out)
    tidy(out, None)
    assert (out / "adapter_model.safetensors").read_bytes() == wanted


def raise_once(*_):
    raise OSError("once")


def _saved(model, folder):
    model.save_pretrained(folder / "whole")
    return load_file(folder / "whole" / "adapter_model.safetensors")


@pytest.mark.parametrize("how", ["before", "half"])
def test_a_run_that_goes_on_after_a_kill_ends_as_one_that_was_not(how, tmp_path, crash_count):
    straight = trainer_in(tmp_path / "straight", 4)
    straight.train()
    wanted = digests(tmp_path / "straight" / "checkpoint-4")
    killed = trainer_in(tmp_path / "out", 4)
    found = places(tmp_path / "out", killed.train)
    for at in range(5, len(found), len(found) // 6):
        out = tmp_path / f"{how}-{at}"
        first = trainer_in(out, 4)
        Interposer(out, at, how).interrupt(first.train)
        out.mkdir(exist_ok=True)
        tidy(out, LIMIT)
        again = trainer_in(out, 4)
        latest = of_run(out)[-1:]
        if latest:
            assert manifest.fault(latest[0], whole=True) is None
            again.add_callback(CompareWithCheckpoint(latest[0]))
        again.train(resume_from_checkpoint=str(latest[0]) if latest else None)
        assert digests(out / "checkpoint-4") == wanted, found[at]
    crash_count("resume", how, found[5 :: len(found) // 6])
