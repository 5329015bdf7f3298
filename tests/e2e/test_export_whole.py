"""Exports with trained embeddings, added tokens and adapted heads: what is written is the adapter's model."""

import json
import shutil

import pytest
import torch
from axolotl.cli.merge_lora import do_cli as merge_lora
from click.testing import CliRunner
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_qtha.cli.export import export

from .commands import QUICKSTART, train_here, write_config
from .test_export import exported, fresh, logits

pytestmark = pytest.mark.e2e

BASE = QUICKSTART / "base"
STEPS = {"max_steps": 10, "save_steps": 10, "eval_steps": 10}
NONE = {"rank": 4, "param_budget": 0.4, "quantum": "none"}
TOLERANCE = 5e-5  # every weight is rounded once; the logits go up to 20, where float32 has steps of 2e-6


def opened(base, lora=None, rows=None):
    """Return the logits of what transformers and PEFT open here."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    return logits(model if lora is None else PeftModel.from_pretrained(model, str(lora)))


def trained(folder, **changes):
    """Return the YAML of a trained adapter, and its logits."""
    path = write_config(folder, **{**STEPS, **changes})
    model, _, _ = train_here(path)
    return path, logits(model)


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    """Trained with its embedding on a base that ties the head to it."""
    return trained(tmp_path_factory.mktemp("embedding"), qtha={**NONE, "modules_to_save": ["embed_tokens"]})


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Trained with a token more."""
    changes = {"tokens": ["<|new|>"], "qtha": {**NONE, "modules_to_save": ["embed_tokens", "lm_head"]}}
    return trained(tmp_path_factory.mktemp("tokens"), **changes)


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """Trained with a tokenizer that has a token more than the base, whose embeddings Axolotl lengthens and does not train."""
    folder = tmp_path_factory.mktemp("longer")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    return trained(folder, tokenizer_config=str(folder / "tokenizer"), qtha=NONE)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """An adapter on the head, which is tied to the embedding."""
    targets = ["q_proj", "v_proj", "lm_head"]
    return trained(tmp_path_factory.mktemp("head"), qtha={**NONE, "target_modules": targets}, lora_target_linear=None)


def test_a_trained_embedding_unties_the_merged_head(embedding, tmp_path):
    config, expected = embedding
    report = exported(config, tmp_path / "merged", "--format", "merged")
    assert (fresh(tmp_path, tmp_path / "merged") - expected).abs().max() < TOLERANCE
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert not torch.equal(file.get_tensor("lm_head.weight"), file.get_tensor("model.embed_tokens.weight"))
    assert report["as_written"]["kl_to_export"] < 1e-6
    assert report["as_written"]["perplexity"] == pytest.approx(report["perplexity"]["export"], rel=1e-5)


def test_a_trained_embedding_as_lora_says_who_cannot_read_it(embedding, tmp_path):
    config, expected = embedding
    done = CliRunner().invoke(export, [str(config), "--out", str(tmp_path / "lora")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "vLLM and llama.cpp will not read this adapter: it has whole modules (modules_to_save: ['embed_tokens'])" in said
    assert said.index("will not read") < said.index("error of the adapters' outputs")  # before the fit
    assert (opened(BASE, tmp_path / "lora") - expected).abs().max() < TOLERANCE
    assert "vllm serve" not in (tmp_path / "lora" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["tokens", "longer"])
def test_added_tokens(kind, request, tmp_path):
    config, expected = request.getfixturevalue(kind)
    exported(config, tmp_path / "merged", "--format", "merged")
    assert (opened(tmp_path / "merged") - expected).abs().max() < TOLERANCE
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<|new|>") == 2048
    done = CliRunner().invoke(export, [str(config), "--out", str(tmp_path / "lora")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "vLLM and llama.cpp will not read this adapter: its embeddings have 2,049 rows" in said
    assert (fresh(tmp_path, BASE, tmp_path / "lora", 2049) - expected).abs().max() < TOLERANCE
    assert AutoTokenizer.from_pretrained(tmp_path / "lora").convert_tokens_to_ids("<|new|>") == 2048
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "resize_token_embeddings(2049)" in card
    assert "vllm serve" not in card


def test_an_adapted_head_is_exported_and_not_merged_by_axolotl(head, tmp_path):
    config, expected = head
    exported(config, tmp_path / "merged", "--format", "merged")
    assert (opened(tmp_path / "merged") - expected).abs().max() < TOLERANCE
    adapter = config.parent / "out"
    with pytest.raises(ValueError, match=r"lm_head has the weight of model\.embed_tokens.*qtha-export.*--format merged"):
        merge_lora(config=str(config), lora_model_dir=str(adapter))
    assert not list(adapter.rglob("merged/*.safetensors"))


@pytest.mark.parametrize("kind", ["embedding", "tokens", "longer"])
def test_merge_lora_is_right_where_it_merges(kind, request):
    config, expected = request.getfixturevalue(kind)
    merge_lora(config=str(config), lora_model_dir=str(config.parent / "out"))
    merged = config.parent / "out" / "merged"
    assert (opened(merged) - expected).abs().max() < TOLERANCE
    shutil.rmtree(merged)


def test_the_tokenizer_is_the_bases_byte_for_byte(embedding, tmp_path):
    config, _ = embedding
    exported(config, tmp_path / "merged", "--format", "merged")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (BASE / file).read_bytes()


@pytest.mark.parametrize(
    ("trouble", "words"),
    [("shape", "--format merged: model.embed_tokens.weight"), ("missing", "--format merged: the base's checkpoint has no")],
)
def test_what_cannot_be_merged_is_said_before_the_fit(embedding, tmp_path, trouble, words, monkeypatch):
    from axolotl_qtha.export import command

    config, _ = embedding
    plan = command.merged.plan

    def with_trouble(layers, transposed, whole, *more):
        if trouble == "missing":
            whole.tensors["score.weight"] = torch.zeros(2, 2)
        else:
            whole.tensors["model.embed_tokens.weight"] = torch.zeros(2048, 7)
        return plan(layers, transposed, whole, *more)

    monkeypatch.setattr(command.merged, "plan", with_trouble)
    monkeypatch.setattr(command, "_layers", lambda *_: pytest.fail("it was fitted"))
    done = CliRunner().invoke(export, [str(config), "--out", str(tmp_path / "merged"), "--format", "merged"])
    assert done.exit_code == 1
    assert words in " ".join(done.output.split())
    assert not (tmp_path / "merged").exists()
