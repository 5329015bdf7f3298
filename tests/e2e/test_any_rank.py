"""The quickstart at rank 16, 32 and 64, its circuits side by side: 4 bits and packing, saving, resuming, exporting, two ranks."""

import json

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from axolotl_qtha.cli.export import export
from axolotl_qtha.tuner.layer import adapted_layers

from .commands import QUICKSTART, losses, train_here, write_config
from .ranks import assert_follows, config_for, history, logits_in_memory, logits_of, output

pytestmark = pytest.mark.e2e

IDS = torch.tensor([[1, 45, 300, 7, 12, 99, 4, 8]])
# The quickstart's layers are 48 to 128 wide: a quarter of a LoRA of rank 32 has no room there for its 32 x 32 matrices.
WIDE = {
    "diagnostics_steps": 3,
    "rank": 32,
    "alpha": 32,
    "param_budget": 0.9,
    "target_modules": ["gate_proj", "up_proj", "down_proj"],
}
FEW = {"load_in_4bit": True, "micro_batch_size": 2, "max_steps": 6, "save_steps": 3, "eval_steps": None, "test_datasets": None}
FEW |= {"lr_scheduler": "constant", "warmup_steps": 0}
# Not resumed: with packing Axolotl goes on with other sequences than the run would have, with LoRA too.
PACKED = FEW | {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Rank 32 on a 4-bit base: (model, trainer, folder)."""
    folder = tmp_path_factory.mktemp("wide")
    model, _, trainer = train_here(write_config(folder, qtha=WIDE, **FEW))
    return model.eval(), trainer, folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_rank_32_trains_in_4_bits(trained):
    model, trainer, folder = trained
    steps = losses(trainer)
    assert steps[6] < steps[1] - 0.3
    measured = [row for row in trainer.state.log_history if "qtha/quantum_share" in row][-1]  # W_Q starts at zero
    assert measured["qtha/quantum_share"] > 0
    assert 1 <= measured["qtha/effective_rank"] <= 32
    assert {(layer.qtha_adapter["default"].config.blocks) for layer in adapted_layers(model).values()} == {8}
    saved = json.loads((folder / "out/adapter_config.json").read_text())
    assert (saved["rank"], saved["qubits"]) == (32, 4)
    card = (folder / "out/README.md").read_text()
    assert "One layer on 4 qubits: `z` are 4 of the 32 numbers" in card
    assert "8 of its own side by side" in card


def test_it_is_saved_as_it_is(trained):
    model, _, folder = trained
    settings = BitsAndBytesConfig(**model.config.quantization_config.to_diff_dict())
    base = AutoModelForCausalLM.from_pretrained(QUICKSTART / "base", dtype=torch.float32, quantization_config=settings)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder / "out").eval()), logits(model))


def test_it_resumes(trained):
    _, whole, folder = trained
    where = folder / "resumed"
    where.mkdir()
    checkpoint = str(folder / "out/checkpoint-3")
    _, _, trainer = train_here(write_config(where, qtha=WIDE, **FEW, resume_from_checkpoint=checkpoint))
    before, after = losses(whole), losses(trainer)
    assert {step: after[step] for step in (4, 5, 6)} == {step: before[step] for step in (4, 5, 6)}


def test_packed_sequences(tmp_path):
    _, _, trainer = train_here(write_config(tmp_path, qtha=WIDE, **PACKED))
    steps = losses(trainer)
    assert steps[3] < steps[1] - 0.1


@pytest.mark.parametrize("surrogate", ["linear", "wide", "distilled"])
def test_rank_64_is_exported(tmp_path_factory, surrogate, rank_64):
    out = tmp_path_factory.mktemp("export") / "lora"
    done = CliRunner().invoke(export, [str(rank_64), "--out", str(out), "--surrogate", surrogate])
    assert done.exit_code == 0, done.output[-3000:] + repr(done.exception)
    report = json.loads((out / "export.json").read_text())
    assert report["rank"] == 64
    assert report["perplexity_gain_kept"] >= 0.8
    assert report["kl_nats_per_token"]["export"] < report["kl_nats_per_token"]["base"]


@pytest.fixture(scope="module")
def rank_64(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank-64")
    settings = {"rank": 64, "qubits": 8, "mpo": "none", "param_budget": None, "target_modules": ["gate_proj", "down_proj"]}
    few = {"max_steps": 12, "save_steps": 12, "eval_steps": None, "test_datasets": None, "learning_rate": 5e-3}
    config = write_config(folder, qtha=settings, **few)
    train_here(config)
    return config


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_two_ranks_do_what_one_does(strategy, tmp_path_factory, servers, single):
    config = config_for(single.parent.parent / strategy, strategy, **SHARED)
    servers.train(config, strategy)
    assert_follows(history(output(config)), history(single))
    assert torch.equal(logits_in_memory(output(config))[0], logits_of(output(config)))


SHARED = {"qtha": {**WIDE, "rank": 16, "qubits": 8, "mpo": "tt"}}  # FSDP2 has no other by itself


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    config = config_for(tmp_path_factory.mktemp("ranks") / "single", None, **SHARED)
    train_here(config)
    return output(config)
