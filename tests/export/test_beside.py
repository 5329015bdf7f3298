"""The files beside a merged model's weights: the base's own, byte for byte, but for what the run changed."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from axolotl_qtha.export.beside import copy_beside, settle_config, write_tokenizer
from axolotl_qtha.export.whole import Whole

from ..e2e.commands import QUICKSTART

BASE = QUICKSTART / "base"
FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")


@pytest.fixture
def base(tmp_path):
    """A base whose tokenizer both versions of transformers open: it names a class of version 4."""
    folder = shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    said = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=4))  # not as transformers indents
    (folder / "special_tokens_map.json").write_text("{}")
    return folder


def copied(base, tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    copy_beside(base, folder)
    return folder


def read(folder, file):
    return json.loads((folder / file).read_text())


def test_an_unchanged_run_leaves_every_byte(base, tmp_path):
    folder = copied(base, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer(["padded", "and cut " * 9], padding=True, truncation=True, max_length=5)  # which its last call leaves in it
    assert not write_tokenizer(tokenizer, base, folder)
    settle_config(folder, Whole(embedding="model.embed_tokens", head="lm_head", tied=True, base_tied=True), True, {})
    assert {file.name for file in folder.iterdir()} == {*FILES, "special_tokens_map.json"}
    for file in folder.iterdir():
        assert file.read_bytes() == (base / file.name).read_bytes()


@pytest.mark.parametrize("change", ["tokens", "template", "eos"])
def test_what_the_run_changed_is_written(base, tmp_path, change):
    folder, tokenizer = copied(base, tmp_path), AutoTokenizer.from_pretrained(base)
    if change == "tokens":
        tokenizer.add_tokens(["<|new|>"])
    elif change == "template":
        tokenizer.chat_template = "{{ messages }}"
    else:
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    assert write_tokenizer(tokenizer, base, folder)
    again = AutoTokenizer.from_pretrained(folder)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token == tokenizer.eos_token
    said = read(folder, "tokenizer_config.json")
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"local_files_only", "is_local"} & said.keys()
    assert not (folder / "special_tokens_map.json").exists()  # the base's; it would say otherwise
    new = tokenizer.eos_token_id
    assert read(folder, "config.json")["eos_token_id"] == new
    before = read(base, "generation_config.json")["eos_token_id"]
    assert read(folder, "generation_config.json")["eos_token_id"] == ([new, before] if change == "eos" else before)


def test_the_configuration_says_what_was_written(base, tmp_path):
    folder = copied(base, tmp_path)
    settle_config(folder, Whole(vocabulary=2049, head="lm_head", tied=False, base_tied=True), True, {"rope_theta": 5.0})
    changed = {"vocab_size": 2049, "tie_word_embeddings": False, "rope_theta": 5.0}
    assert read(folder, "config.json") == read(base, "config.json") | changed


def test_a_text_model_inside_of_another(base, tmp_path):
    folder = copied(base, tmp_path)
    nested = {"text_config": {"vocab_size": 2048, "tie_word_embeddings": True}, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(nested))
    settle_config(folder, Whole(vocabulary=2049, head="lm_head", tied=False, base_tied=True), True, {})
    assert read(folder, "config.json") == {
        "text_config": {"vocab_size": 2049, "tie_word_embeddings": False},
        "vision_config": {},
        "tie_word_embeddings": False,
    }


def test_an_override_of_a_model_inside_keeps_what_it_does_not_name(base, tmp_path):
    folder = copied(base, tmp_path)
    nested = {"text_config": {"vocab_size": 2048, "hidden_size": 8, "tie_word_embeddings": True}}
    (folder / "config.json").write_text(json.dumps(nested))
    settle_config(folder, Whole(vocabulary=2049, head="lm_head"), True, {"text_config": {"rope_theta": 1.0, "vocab_size": 3}})
    inside = {"vocab_size": 2049, "hidden_size": 8, "tie_word_embeddings": False, "rope_theta": 1.0}
    assert read(folder, "config.json") == {"text_config": inside, "tie_word_embeddings": False}
