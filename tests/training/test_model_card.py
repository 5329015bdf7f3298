"""The model card: valid, with the figures of the model, and code that runs."""

import dataclasses
import os
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from axolotl_qtha import QTHAConfig
from axolotl_qtha.settings.args import QTHABlock
from axolotl_qtha.settings.public_facts import Facts, Source
from axolotl_qtha.trained.clients import Exported
from axolotl_qtha.training.model_card import FILE, FOLDER, make_card, shown, write_card

from ..models import VARIANTS, adapted, llama, logits, train, trainable
from ..models import adapters as adapters_of

TARGETS = ["q_proj", "k_proj", "down_proj"]
FACTS = Facts(
    Source("Qwen/Qwen3-0.6B", "hub", "model"),
    (Source("org/data", "hub", "file"), Source("own.jsonl", "local", "file")),
    steps=60,
    train_loss=1.23456,
    quantisation="none",
    versions={"peft": "0.20.0"},
)
MEASURED = {
    "surrogate": "wide",
    "constant": "of 6 layers: 0 in a bias, 2 in a row of A, 4 left out",
    "rank": 20,
    "text": "the training data of the configuration",
    "fitted_tokens": 30123,
    "predicted_tokens": 7654,
    "perplexity": {"base": 20.125, "qtha": 10.5, "export": 10.75, "linear": 11.0},
    "kl_nats_per_token": {"base": 0.7, "qtha": 0.0, "export": 0.00123, "linear": 0.01},
    "top1_agreement": {"base": 0.5, "qtha": 1.0, "export": 0.987, "linear": 0.9},
    "perplexity_gain_kept": 0.974,
}


def parts(model):
    """Return what a card is made from."""
    sizes = [(adapter.shape.in_features, adapter.shape.out_features) for adapter in adapters_of(model).values()]
    return model.active_peft_config, sizes


def blocks(card, language):
    return re.findall(rf"```{language}\n(.*?)```", card.content, flags=re.DOTALL)


def count(model):
    return sum(parameter.numel() for parameter in trainable(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_card_of_an_adapter(settings, tmp_path):
    model = adapted(llama(), target_modules=TARGETS, **settings)
    settled, sizes = parts(model)
    write_card(make_card(settled, FACTS, sizes), tmp_path)
    card = ModelCard.load(tmp_path / FILE)
    assert card.data.library_name == "peft"
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert card.data.datasets == ["org/data"]
    assert card.data.pipeline_tag == "text-generation"
    assert {"qtha", "axolotl", "base_model:adapter:Qwen/Qwen3-0.6B"} <= set(card.data.tags)
    assert card.data.license is None
    assert ("quantum-machine-learning" in card.data.tags) == settled.has_circuit
    lora = get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS))
    assert f"| this adapter | {count(model):,} |" in card.text
    assert f"| LoRA of rank 4 on the same 6 layers | {count(lora):,} |" in card.text
    drawings = blocks(card, "text")
    assert len(drawings) == settled.has_circuit
    for drawing in drawings:
        qubits = settled.circuit_qubits
        assert {f"q_{i}:" for i in range(4)} <= set(drawing.split()) or (qubits == 1 and "q:" in drawing.split())
        angles = {1: 2, 4: 16}[qubits]  # 4 rows of 4 a layer, 2 where there is nothing to entangle with
        assert all(f"theta[{i}]" in drawing for i in range(angles))
        assert f"theta[{angles}]" not in drawing
    # the YAML it shows makes the same adapter
    (block,) = blocks(card, "yaml")
    again = QTHAConfig(**QTHABlock.model_validate(yaml.safe_load(block)["qtha"]).adapter_settings(), task_type="CAUSAL_LM")
    assert count(get_peft_model(llama(), again)) == count(model)
    assert shown(again) == shown(settled)


@pytest.mark.parametrize("mpo", ["tt", "none"])
def test_how_matrices_are_stored_is_told_in_every_form(mpo):
    assert shown(QTHAConfig(mpo=mpo, core_gain="balanced"))["core_gain"] == "balanced"


def test_a_training_on_a_device_is_told_without_its_account():
    settled, sizes = parts(adapted(llama(), target_modules=TARGETS, rank=2))
    ibm = {"backend": "ibm_fez", "instance": "Zq83-planted", "max_qpu_seconds": 77, "shots": 1024, "gradient": "spsa"}
    config = dataclasses.replace(settled, quantum_backend="ibm", ibm=ibm)
    card = make_card(config, FACTS, sizes)
    row = "| circuits | 8 tokens of each forward pass on `ibm_fez`, 1,024 shots, gradient by spsa; the others simulated exactly |"
    assert row in card.content
    for private in ("Zq83", "77", "*****"):
        assert private not in card.content
    assert yaml.safe_load(blocks(card, "yaml")[0])["qtha"]["quantum_backend"] == "torch", "readers have another account, or none"
    assert "circuits |" not in make_card(settled, FACTS, sizes).content


def test_what_is_not_published_has_no_place_in_the_metadata():
    facts = Facts(Source("base", "local", "model"), (Source("own.jsonl", "local", "file"),))
    card = make_card(QTHAConfig(bond_dim=2, mid_dim=8), facts, [(64, 64)])
    assert card.data.base_model is card.data.datasets is card.data.pipeline_tag is None
    assert "`base` (a local model, not published)" in card.text
    assert 'from_pretrained("PATH/TO/base")' in card.text
    assert "None" not in card.text.replace("None is set", "")


@pytest.mark.parametrize("kind", ["adapter", "lora", "merged"])
def test_the_code_it_shows_loads_the_folder(kind, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    if kind == "adapter":
        model = train(adapted(base, target_modules=TARGETS))
    else:
        model = train(get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")))
    expected = logits(model)
    (model.merge_and_unload() if kind == "merged" else model).save_pretrained(tmp_path / "out")
    settled, sizes = parts(adapted(llama(), target_modules=TARGETS))
    facts = Facts(Source("base", "local", "model"))
    (code,) = blocks(make_card(settled, facts, sizes, kind, None if kind == "adapter" else MEASURED), "python")
    assert ("axolotl_qtha" in code) == (kind == "adapter")
    names = {}
    exec(code.replace("PATH/TO/base", str(tmp_path / "base")).replace(FOLDER, str(tmp_path / "out")), names)
    assert (logits(names["model"].eval()) - expected).abs().max() < 1e-5
    assert not torch.allclose(logits(llama()), expected)


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_card_of_an_export(kind):
    settled, sizes = parts(adapted(llama(), target_modules=TARGETS))
    card = make_card(settled, FACTS, sizes, kind, MEASURED)
    assert card.data.library_name == {"lora": "peft", "merged": "transformers"}[kind]
    assert ("lora" in card.data.tags) == (kind == "lora")
    assert "| base | 20.125 | 0.7 | 50.0% |" in card.text
    assert "| this export | 10.750 | 0.00123 | 98.7% |" in card.text
    assert "keeps 97.4% of the perplexity" in card.text
    assert "Surrogate: `wide`, fitted to 30,123 tokens" in card.text
    serve, *convert = blocks(card, "bash")
    assert ("--max-lora-rank 32" in serve) == (kind == "lora")  # the smallest vLLM has for 20
    assert [line.split()[1] for line in convert] == ["convert_lora_to_gguf.py"] * (kind == "lora")
    lora = get_peft_model(llama(), LoraConfig(r=20, target_modules=TARGETS))
    assert (f"| this LoRA, rank 20 | {count(lora):,} |" in card.text) == (kind == "lora")
    without = make_card(settled, FACTS, sizes, kind, {**MEASURED, "perplexity_gain_kept": None})
    assert "there is no gain to keep" in without.text


def test_modules_trained_in_full_are_named():
    settled, sizes = parts(adapted(llama(), target_modules=TARGETS, modules_to_save=["lm_head"]))
    assert "trained in full: `lm_head`" in make_card(settled, FACTS, sizes).text
    card = make_card(settled, FACTS, sizes, "lora", MEASURED)
    assert not blocks(card, "bash")
    assert "vLLM does not read it: it has whole modules (modules_to_save: ['lm_head'])" in card.text
    assert "llama.cpp does not read it: it has whole modules" in card.text


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (Exported(4, bias=True), "PEFT runs it but cannot merge it: the base's layers have no biases"),
        (Exported(4, head="lm_head", tied=True), "PEFT runs it but cannot merge it: merging into lm_head would change"),
        (Exported(4, vocabulary=2049), "base.resize_token_embeddings(2049)"),
        (Exported(4, overrides={"num_hidden_layers": 2}), 'from_pretrained("Qwen/Qwen3-0.6B", num_hidden_layers=2)'),
        (Exported(600), "vLLM does not read it: its rank is 600"),
    ],
)
def test_the_card_shows_only_what_works(lora, words):
    settled, sizes = parts(adapted(llama(), target_modules=TARGETS))
    card = make_card(settled, FACTS, sizes, "lora", MEASURED, lora)
    assert words in card.text
    assert not any("vllm" in block for block in blocks(card, "bash"))
    assert "--max-lora-rank" not in make_card(settled, FACTS, sizes, "lora", MEASURED, Exported(16)).text  # vLLM's default


def test_the_card_of_an_adapter_names_the_export_that_others_need():
    settled, sizes = parts(adapted(llama(), target_modules=TARGETS))
    text = make_card(settled, FACTS, sizes).text
    assert "KeyError: 'QTHA'" in text
    assert "axolotl qtha-export CONFIG.yml" in text


HOSTILE = "norm`![](http://host/x.png)<img src=x>|"
LONG = f"{'proj ' * 18}``` # A heading of its own ![](http://host/x.png)"  # the YAML breaks it before the fence


@pytest.mark.parametrize("kind", ["adapter", "lora", "merged"])
def test_no_name_puts_markdown_of_its_own_on_a_card(kind):
    """Modules, data sets and what an export names may come from a stranger's adapter or YAML."""
    settings = {"modules_to_save": [HOSTILE, "lm_head"], "target_modules": [LONG, HOSTILE, "q_proj"]}
    config = QTHAConfig(bond_dim=2, mid_dim=8, **settings)
    sources = tuple(Source(f"{HOSTILE}\n\n# A heading", place, "file") for place in ("hub", "local", "address"))
    facts = dataclasses.replace(FACTS, datasets=sources, evaluated_on=sources)
    lora = Exported(4, whole=(HOSTILE, f"{HOSTILE}\n\n# A heading"), head=HOSTILE, tied=True, overrides={HOSTILE: 1})
    text = make_card(config, facts, [(64, 64)], kind, MEASURED, lora).text
    assert "lm_head" in text
    outside = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "# A heading" not in outside.splitlines()
    outside = re.sub(r"`[^`\n]+`", "", outside)  # code within a line
    for markdown in ("![", "<img", "# A heading", "host/x.png"):
        assert markdown not in outside


def test_a_card_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / FILE).write_text("old")
    card = make_card(QTHAConfig(bond_dim=2, mid_dim=8), FACTS, [(64, 64)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            write_card(card, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_text() == "old"
    write_card(card, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert ModelCard.load(tmp_path / FILE).data.library_name == "peft"
