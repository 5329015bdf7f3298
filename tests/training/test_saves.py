"""Checkpoints that say when they are complete: their manifests, which of them go, and what killed processes left."""

import json
import os
import re
import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

from axolotl_qtha.training import manifest
from axolotl_qtha.training.checkpoints import fault, of_run, set_aside_incomplete
from axolotl_qtha.training.ending import has_ended
from axolotl_qtha.training.manifest import MANIFEST
from axolotl_qtha.training.saves import changed_settings, guard_checkpoints, rotate, settings_of, tidy
from axolotl_qtha.tuner.saving import guard

from ..models import adapted, llama, tokens


def arguments(folder, **changes):
    settings = {"max_steps": 3, "save_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True, **changes}
    return TrainingArguments(folder, **settings)


def trained(folder, **changes):
    model = adapted(llama(1), target_modules=["q_proj"])
    guard(model)
    trainer = Trainer(model, arguments(folder, **changes), train_dataset=[{"input_ids": row, "labels": row} for row in tokens()])
    guard_checkpoints(trainer)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("made")
    trained(folder)
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_tells_what_a_checkpoint_is(run):
    told = manifest.read(run / "checkpoint-3")
    assert (told.state, told.step) == ("complete", 3)
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"} <= told.files.keys()
    assert told.settings == settings_of(arguments(run))
    assert [fault(path, whole=True) for path in of_run(run)] == [None] * 3


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("optimizer.pt", lambda path: path.unlink(), "optimizer.pt is missing"),
        ("scheduler.pt", lambda path: path.write_bytes(path.read_bytes()[:-1]), r"scheduler.pt has [\d,]+ bytes instead of"),
        (
            "trainer_state.json",
            lambda path: path.write_text(path.read_text().replace("3", "4")),
            "is not the file that was saved",
        ),
        (MANIFEST, lambda path: path.write_text(path.read_text()[:50]), "is damaged"),
        (MANIFEST, lambda path: path.write_text("[" * 100_000), "is damaged"),
        (MANIFEST, lambda path: path.write_text(path.read_text().replace("complete", "being written")), "it was being written"),
        (MANIFEST, lambda path: path.write_text(path.read_text().replace("optimizer.pt", "../victim")), "is damaged"),
        (MANIFEST, lambda path: path.write_text(path.read_text().replace("optimizer.pt", "/etc/passwd")), "is damaged"),
        (MANIFEST, lambda path: path.write_text(path.read_text().replace('"step": 3', '"step": -3')), "is damaged"),
        (MANIFEST, lambda path: path.write_text(path.read_text().replace('"step": 3', '"step": "3"')), "is damaged"),
    ],
)
def test_what_is_not_as_it_says_is_not_complete(run, name, change, said):
    change(run / "checkpoint-3" / name)
    assert re.search(said, fault(run / "checkpoint-3", whole=True))
    assert [path.name for path, _ in set_aside_incomplete(run)] == ["incomplete-checkpoint-3"]


def test_cards_and_tokenizers_may_be_edited_and_the_state_may_not(run):
    (run / "checkpoint-3" / "README.md").write_text("mine")
    (run / "checkpoint-3" / "tokenizer_config.json").write_text("{}")
    assert fault(run / "checkpoint-3", whole=True) is None


def test_an_adapter_of_another_run_beside_an_old_optimiser(run, tmp_path):
    """As a run that was killed in the middle of writing over another's checkpoint left it before there were manifests."""
    trained(tmp_path / "other", learning_rate=1e-2)
    shutil.copy(tmp_path / "other" / "checkpoint-3" / "adapter_model.safetensors", run / "checkpoint-3")
    assert fault(run / "checkpoint-3") is None  # sizes alone do not tell
    assert "adapter_model.safetensors is not the file that was saved" in fault(run / "checkpoint-3", whole=True)


def test_one_without_a_manifest_is_judged_by_its_files(run):
    (run / "checkpoint-3" / MANIFEST).unlink()
    assert fault(run / "checkpoint-3", whole=True) is None
    (run / "checkpoint-3" / "trainer_state.json").unlink()
    assert "trainer_state.json is missing" in fault(run / "checkpoint-3")


def test_settings_that_have_changed_are_named(run):
    assert changed_settings(run / "checkpoint-3", arguments(run)) is None
    assert (
        changed_settings(run / "checkpoint-3", arguments(run, max_grad_norm=0.5, seed=3))
        == "max_grad_norm 1.0 -> 0.5, seed 42 -> 3"
    )
    (run / "checkpoint-3" / MANIFEST).unlink()
    assert changed_settings(run / "checkpoint-3", arguments(run, seed=3)) is None


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, None, [1, 2, 3]), (2, None, [2, 3]), (1, None, [3]), (1, 1, [1, 3]), (2, 1, [1, 3]), (5, None, [1, 2, 3])],
)
def test_the_oldest_go(run, limit, best, left):
    rotate(run / "checkpoint-3", limit, str(run / f"checkpoint-{best}") if best else None)
    assert names(run) == [f"checkpoint-{step}" for step in left]


def test_the_newest_stays_where_the_clock_went_backwards(run, caplog):
    os.utime(run / "checkpoint-3", (1, 1))
    rotate(run / "checkpoint-3", 2, None)
    assert names(run) == ["checkpoint-2", "checkpoint-3"]


def test_a_trainers_limit_holds(tmp_path):
    trained(tmp_path, save_total_limit=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_what_was_set_aside_counts_and_goes_in_time(run):
    (run / "checkpoint-3").rename(run / "incomplete-checkpoint-3")
    shutil.copytree(run / "checkpoint-1", run / "incomplete-2-checkpoint-1")
    assert [line.split(" is deleted: ")[-1] for line in tidy(run, 3)] == ["checkpoint-2 is complete"]
    assert names(run) == ["checkpoint-1", "checkpoint-2", "incomplete-checkpoint-3"]
    assert tidy(run, None) == []
    assert [line.split(" is deleted: ")[-1] for line in tidy(run, 2)] == ["save_total_limit: 2"]
    assert names(run) == ["checkpoint-1", "checkpoint-2"]


def test_left_overs_of_every_kind(run):
    for name in (".saving-abc", ".going-checkpoint-1"):
        (run / name).mkdir()
        (run / name / "file").touch()
    shutil.copytree(run / "checkpoint-3", run / ".replaced-checkpoint-3")  # its successor is complete
    (run / "checkpoint-2").rename(run / ".replaced-checkpoint-2")  # its successor is not
    manifest.begin(run / "checkpoint-2", 2, {})
    told = tidy(run, None)
    assert len(told) == 4
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert fault(run / "checkpoint-2", whole=True) is None
    assert tidy(run, None) == []


def test_nothing_is_pushed_before_it_is_complete(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: seen.append(manifest.read(type(tmp_path)(folder)).state)
    )
    trainer = trained(tmp_path)
    trainer.args.push_to_hub = True
    trainer._save_checkpoint(trainer.model, None)
    assert seen == ["complete"]


def test_a_save_that_fails_leaves_the_older_one(run, monkeypatch):
    trainer = trained(run)
    before = (run / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(tensor for tensor in trainer.model.parameters() if tensor.requires_grad).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN or infinite values"):
        trainer._save_checkpoint(trainer.model, None)
    assert (run / "checkpoint-3" / "adapter_model.safetensors").read_bytes() == before
    assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize(
    ("state", "changes", "ended"),
    [
        ({"global_step": 3}, {"max_steps": 3}, True),
        ({"global_step": 3}, {"max_steps": 2}, True),
        ({"global_step": 3}, {"max_steps": 4}, False),
        ({"global_step": 30, "epoch": 3.0}, {"max_steps": -1, "num_train_epochs": 3}, True),
        ({"global_step": 30, "epoch": 3.0}, {"max_steps": -1, "num_train_epochs": 4}, False),
        ({"global_step": 5, "max_steps": 5, "epoch": 0.5}, {"max_steps": -1, "num_train_epochs": 0.8}, False),
        ({"global_step": 20, "epoch": 2.0}, {"max_steps": -1, "num_train_epochs": 3}, False),
    ],
)
def test_which_checkpoint_is_of_the_last_step(tmp_path, state, changes, ended):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"max_steps": 30, "num_train_epochs": 3, "epoch": 1.0, **state}))
    assert has_ended(tmp_path, arguments(tmp_path, **changes)) is ended
