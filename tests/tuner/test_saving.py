"""The guard on saving: a complete adapter takes the place of the old one, or nothing does."""

import os
import stat

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from axolotl_qtha.errors import IncompleteAdapter
from axolotl_qtha.tuner.saving import SCRATCH, expected, guard

from ..models import FILE, adapted, config, llama, logits, train


def guarded(**settings):
    """Return a trained model whose saves are guarded."""
    model = train(adapted(llama(), **settings))
    guard(model)
    return model


def content(folder):
    """Return the bytes of each file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "settings", [{}, {"quantum": "frozen"}, {"quantum": "none"}, {"mpo": "none"}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_writes_what_peft_writes(settings, tmp_path):
    model = guarded(**settings)
    model.save_pretrained(tmp_path / "guarded")
    type(model).save_pretrained(model, tmp_path / "plain")
    assert content(tmp_path / "guarded") == content(tmp_path / "plain")
    saved = load_file(tmp_path / "guarded" / FILE)
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected(model, "default")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "guarded").eval()), logits(model))


def without(state):
    del state[next(name for name in state if name.endswith("fusion"))]


def emptied(state):
    """As ZeRO-3 leaves parameters that nobody gathered."""
    name = next(name for name in state if name.endswith("cores"))
    state[name] = torch.empty(0)


def cut(state):
    """As one rank's shard is."""
    name = next(name for name in state if name.endswith("cores"))
    state[name] = state[name][:1].clone()


def infinite(state):
    name = next(name for name in state if name.endswith("angles"))
    state[name] = torch.full_like(state[name], float("inf"))


def head(state):
    name = next(name for name in state if "lm_head.modules_to_save" in name)
    state[name] = torch.full_like(state[name], float("nan"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without, r"fusion is missing"),
        (emptied, r"cores has shape \(0,\) instead of \(\d+,\)"),
        (cut, r"cores has shape \(1,\) instead of"),
        (infinite, r"angles holds NaN or infinite values"),
        (head, r"lm_head.weight holds NaN"),
    ],
)
def test_incomplete_adapters_leave_the_old_files_alone(damage, words, tmp_path):
    model = guarded(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    before = content(tmp_path)
    state = train(model).state_dict()
    damage(state)
    with pytest.raises(IncompleteAdapter, match=words) as error:
        model.save_pretrained(tmp_path, state_dict=state)
    assert "What works" in str(error.value)
    assert content(tmp_path) == before


def test_no_folder_of_a_failed_first_save_looks_like_an_adapter(tmp_path):
    model = guarded()
    state = model.state_dict()
    without(state)
    with pytest.raises(IncompleteAdapter):
        model.save_pretrained(tmp_path / "new", state_dict=state)
    assert not list((tmp_path / "new").iterdir())


def test_every_adapter_of_the_model_is_checked(tmp_path):
    model = guarded()
    model.add_adapter("other", config(rank=2))
    model.save_pretrained(tmp_path)
    assert {name for name in content(tmp_path) if name.endswith(FILE)} == {FILE, f"other/{FILE}"}
    state = model.state_dict()
    del state[next(name for name in state if ".other.fusion" in name)]
    before = content(tmp_path)
    with pytest.raises(IncompleteAdapter, match="fusion is missing"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert content(tmp_path) == before
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert not (tmp_path / "one" / "other").exists()


def test_files_reach_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace

    def fsync(handle):
        events.append("flush folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"flush {os.fstat(handle).st_ino}")
        sync(handle)

    def move(source, target):
        events.append(f"name {os.stat(source).st_ino}")
        replace(source, target)

    model = guarded()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    model.save_pretrained(tmp_path)
    named = [event for event in events if event.startswith("name")]
    assert len(named) == len(content(tmp_path)) >= 2
    for event in named:
        assert events.index(event.replace("name", "flush")) < events.index(event)
    assert events[-1] == "flush folder"


def test_a_save_that_fails_half_way_names_no_half_written_file(tmp_path, monkeypatch):
    model = guarded()
    model.save_pretrained(tmp_path)
    before = content(tmp_path)
    train(model)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert content(tmp_path) == before
    assert not list(tmp_path.glob(f"{SCRATCH}*"))


def test_other_ranks_write_nothing(tmp_path):
    guarded().save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not list((tmp_path / "rank1").rglob("*.safetensors"))


def test_the_model_card_that_is_there_is_kept(tmp_path):
    model = guarded()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nTrained on a Monday.\n")
    model.save_pretrained(tmp_path)
    assert "Trained on a Monday." in card.read_text()
