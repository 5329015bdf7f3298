"""Bad input through the real command line: an exit code, one clear error, nothing written."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from axolotl_qtha.settings.meta_base import read_config

from .commands import train_here, write_config

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qtha": {"rnak": 4}}, ["qtha.rnak: (int, value not shown)", "`rank`"]),
        ({"plugins": None, "qtha": None}, ["Adapter 'qtha'", "plugins"]),
        ({"load_in_4bit": True, "load_in_8bit": True}, ["load_in_4bit, load_in_8bit: both are true", "one of them"]),
    ],
    ids=["unknown key", "no plugin", "4 and 8 bit"],
)
def test_command_line(forked, tmp_path, changes, words):
    config = write_config(tmp_path, **changes)
    done = forked(["axolotl", "train", str(config)], tmp_path)
    assert done.returncode != 0
    for word in words:
        assert word in done.stdout, done.stdout[-3000:]
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("qtha", "words"),
    [
        ({"target_modules": ["q_prj"]}, [r"qtha.target_modules: 'q_prj'", "`q_proj`"]),
        ({"target_modules": ["q_proj", "vproj"]}, [r"qtha.target_modules: 'vproj'", "`v_proj`"]),
        ({"target_modules": ["embed_tokens"]}, ["embed_tokens", "Embedding", "modules_to_save"]),
        ({"param_budget": 0.01}, ["qtha.param_budget: 0.01", "`param_budget: 0."]),
        ({"layers_to_transform": [1, 9]}, ["qtha.layers_to_transform: [9]", "indices 0 to 3"]),
        ({"in_factors": {100: [10, 10]}}, ["qtha.in_factors", "[128, 352]"]),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_known_once_the_model_is(tmp_path, qtha, words):
    with pytest.raises(ValueError, match="qtha") as error:
        train_here(write_config(tmp_path, qtha=qtha, max_steps=1))
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.rglob("adapter*"))


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


@pytest.mark.parametrize(
    ("targets", "skip", "words"),
    [
        (
            ["q_proj", "v_proj"],
            ["lm_head", "q_proj", "v_proj"],
            ["all 8 adapted layers stayed in full precision", "['lm_head', 'q_proj', 'v_proj']", "other target_modules"],
        ),
        (["q_proj", "lm_head"], None, ["1 of 5 adapted layers", "exclude_modules: [lm_head]"]),
        (["q_proj"], LINEAR, ["no layer of the base that was loaded is a Linear4bit", "load_in_4bit: false"]),
        (["q_proj"], ["k_proj"], ["lm_head: its weight is the embedding's", "['k_proj', 'lm_head']"]),
    ],
    ids=["targets skipped", "head", "all skipped", "tied head not skipped"],
)
def test_bases_not_quantised_as_asked(tmp_path, targets, skip, words):
    changes = {"qtha": {"target_modules": targets}, "bnb_config_kwargs": skip and {"llm_int8_skip_modules": skip}}
    with pytest.raises(ValueError, match="What works") as error:
        train_here(write_config(tmp_path, "qtha-4bit.yml", **changes, max_steps=1))
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.rglob("adapter*"))


@pytest.mark.parametrize("number", [None, errno.EROFS])
def test_an_output_dir_that_cannot_be_written(tmp_path, monkeypatch, number):
    (tmp_path / "taken").write_text("")
    config = write_config(tmp_path, output_dir=str(tmp_path / "taken" / "out" if number is None else tmp_path / "out"))
    real = os.open

    def read_only(path, *args, **kwargs):
        if number is not None and str(path).startswith(str(tmp_path)) and args[0] & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ValueError, match=r"output_dir: '.*out' cannot be written: (Not a|Read-only).*What works"):
        train_here(config)
    assert sorted(tmp_path.iterdir()) == [config, tmp_path / "taken"]
    assert read_config(config).output_dir  # a plan writes nothing there


@pytest.mark.parametrize("command", ["inference", "evaluate"])
def test_without_a_trained_adapter(forked, tmp_path, command):
    done = forked(["axolotl", command, str(write_config(tmp_path))], tmp_path)
    assert done.returncode != 0
    assert "--lora-model-dir" in done.stdout


def test_the_printed_budget_works(tmp_path):
    with pytest.raises(ValueError, match="param_budget") as error:
        train_here(write_config(tmp_path, qtha={"param_budget": 0.01}, max_steps=1))
    budget = float(str(error.value).split("`param_budget: ")[1].split("`")[0])
    train_here(write_config(tmp_path, qtha={"param_budget": budget}, max_steps=1, eval_steps=None, save_steps=None))
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
