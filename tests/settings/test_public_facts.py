"""What is told of a run: its figures, and neither paths, addresses, tokens nor keys."""

import importlib.util
from importlib import metadata

import pytest
import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.datasets import SFTDataset
from pydantic import TypeAdapter, ValidationError
from transformers import BitsAndBytesConfig, LlamaConfig, TrainerState

from axolotl_qtha.settings.public_facts import facts_of
from axolotl_qtha.training.model_card import make_card
from axolotl_qtha.version import __version__

from ..models import config

SECRET = "hf_PLANTEDplantedPLANTEDplanted"
PATH = f"/home/alice/{SECRET}"


def planted(schema):
    """Return a value with a secret for every field of a pydantic model that takes one: as text, or inside a list or mapping."""
    values = {}
    for name, field in schema.model_fields.items():
        for value in (PATH, [PATH], {SECRET: PATH}, [{SECRET: PATH}]):
            try:
                TypeAdapter(field.annotation).validate_python(value)
            except (ValidationError, TypeError, AttributeError):  # some validators expect mappings
                continue
            values[name] = value
            break
    return values


def test_no_setting_tells_a_secret_or_a_path():
    values = planted(AxolotlInputConfig)
    assert len(values) > 100
    assert {
        "hub_model_id",
        "output_dir",
        "wandb_entity",
        "comet_api_key",
        "optimizer",
        "lr_scheduler",
    } <= values.keys()
    data = {**planted(SFTDataset), "path": f"{PATH}/train.jsonl"}
    values |= {
        "hub_token": SECRET,  # in no schema
        "base_model": f"{PATH}/base",
        "datasets": [data, {**data, "path": "json", "data_files": [f"{PATH}/more.json"]}],
        "test_datasets": [
            {**data, "path": f"https://alice:{SECRET}@intern.example/{SECRET}/held-out.parquet?key={SECRET}#{SECRET}"}
        ],
        "qtha": {"circuit_lr": PATH, "target_modules": [PATH]},
        "model_kwargs": {"quantization_config": {"quant_method": PATH, "bits": PATH, SECRET: PATH}},
    }
    facts = facts_of(DictDefault(values))
    assert facts.optimizer == facts.scheduler == "other"
    settings = config(layers_pattern=PATH, target_modules=["q_proj"], exclude_modules=[PATH])
    settings.base_model_name_or_path, settings.revision = PATH, SECRET
    card = str(make_card(settings, facts, [(48, 48)]))
    for word in (SECRET, "alice", "intern.example", "/home"):
        assert word not in card
    for name in ("base", "train.jsonl", "more.json", "held-out.parquet"):
        assert f"`{name}` (a" in card


HUB, LOCAL, ELSEWHERE = "`{}`", "`{}` (a local model, not published)", "`{}` (a model at another address, not published)"


@pytest.mark.parametrize(
    ("path", "name", "words"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", HUB),
        ("gpt2", "gpt2", HUB),
        ("here/model", "model", LOCAL),  # a folder that could be on the Hub by its name
        ("gone/data.jsonl", "data.jsonl", LOCAL),
        ("/home/alice/models/base/", "base", LOCAL),
        ("./base", "base", LOCAL),
        ("a/b/base", "base", LOCAL),
        ("~/base", "base", LOCAL),
        (r"C:\Users\alice\base", "base", LOCAL),
        ("/mnt/my | `base`\n# x", "my _ _base___ x", LOCAL),
        ("/home/alice", "", "a local model, not published"),
        ("~alice", "", "a local model, not published"),
        (".", "", "a local model, not published"),
        ("https://alice:pass@host.intern:8000/x/base?token=1", "base", ELSEWHERE),
        ("s3://bucket/base", "base", ELSEWHERE),
        ("s3://bucket", "", "a model at another address, not published"),
    ],
)
def test_names(path, name, words, tmp_path, monkeypatch):
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/alice")
    base = facts_of(DictDefault({"base_model": path})).base
    assert base.name == name
    assert str(base) == words.format(name)


def test_figures_of_a_run():
    cfg = DictDefault(
        base_model="gpt2",
        rl="dpo",
        datasets=[{"path": "org/data"}, {"path": "org/data", "split": "other"}],
        sequence_len=512,
        learning_rate="2e-4",
        qtha={"circuit_lr": 0.05},
        optimizer="adamw_torch",
        lr_scheduler="cosine",
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        batch_size=32,  # as Axolotl leaves it on 4 ranks
        torch_dtype=torch.bfloat16,
        seed=7,
    )
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}, {"step": 3, "loss": 1.25}, {"step": 3, "train_loss": 9.0}]
    facts = facts_of(cfg, TrainerState(global_step=3, epoch=0.5, log_history=log, best_global_step=2))
    assert [data.name for data in facts.datasets] == ["org/data"]
    assert (facts.method, facts.sequence_length, facts.learning_rate, facts.circuit_lr) == ("dpo", 512, 2e-4, 0.05)
    assert (facts.optimizer, facts.scheduler, facts.batch, facts.precision, facts.seed) == (
        "adamw_torch",
        "cosine",
        32,
        "bfloat16",
        7,
    )
    assert (facts.steps, facts.epochs, facts.train_loss, facts.eval_loss, facts.eval_step) == (3, 0.5, 1.25, 1.5, 2)
    assert facts.best_step is None  # not loaded
    assert facts_of(DictDefault(**cfg, load_best_model_at_end=True), TrainerState(best_global_step=2)).best_step == 2


@pytest.mark.parametrize(
    ("cfg", "settings", "words"),
    [
        ({}, None, "none"),
        ({"load_in_4bit": True}, None, "4 bits"),
        ({"overrides_of_model_kwargs": {"quantization_config": {"load_in_8bit": True}}}, None, "8 bits"),
        ({}, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "4 bits, nf4, bitsandbytes"),
        ({}, {"quant_method": "gptq", "bits": 4}, "4 bits, gptq"),
    ],
)
def test_quantisation(cfg, settings, words):
    model_config = LlamaConfig()
    if settings is not None:
        model_config.quantization_config = settings
    assert facts_of(DictDefault(cfg), model_config=model_config).quantisation == words


def test_the_versions_that_a_card_tells_have_the_quantum_packages():
    """What ran the circuits is a part of what a result can be repeated with."""
    told = facts_of(DictDefault({"base_model": "org/base"})).versions
    for name in ("axolotl", "peft", "transformers", "torch", "qiskit", "qiskit-aer"):
        assert told[name] == metadata.version(name)
    ibm = "qiskit-ibm-runtime"  # an extra
    assert (ibm in told) == bool(importlib.util.find_spec("qiskit_ibm_runtime"))
    assert told["axolotl_qtha"] == __version__
