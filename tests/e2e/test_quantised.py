"""Training on bases that Axolotl quantises as it loads them, and on checkpoints quantised before."""

import shutil
import sys

import bitsandbytes
import pytest
import torch
from axolotl.cli.config import load_cfg
from axolotl.loaders import ModelLoader, load_tokenizer
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_qtha.settings import quantization
from axolotl_qtha.tuner.layer import QTHALayer, adapted_layers

from ..quantised import NF4
from .commands import QUICKSTART, losses, run, train_here, write_config
from .test_commands import IDS, SHORT, dpo

pytestmark = pytest.mark.e2e

# a learning rate that does not depend on max_steps, so that a shorter run is the beginning of a longer one
FEW = {**SHORT, "lr_scheduler": "constant", "max_steps": 3, "save_steps": 3, "eval_steps": None}
EIGHT_BIT = {"load_in_4bit": None, "load_in_8bit": True}
# large enough for the 8-bit optimisers, which keep tensors under 4096 entries in 32 bits
LARGE = {"rank": 12, "mpo": "none", "quantum": "none", "target_modules": ["q_proj", "down_proj"]}
RELOAD = """
import sys, torch
import axolotl_qtha
from peft import AutoPeftModelForCausalLM
torch.set_num_threads(int(sys.argv[3]))
given = torch.load(sys.argv[2])
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, quantization_config=given["settings"])
with torch.no_grad():
    torch.save(model(given["ids"]).logits, sys.argv[2] + ".logits")
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder for the tokenised data, which is the same for all."""
    return str(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def train(prepared, tmp_path):
    """Train on a 4-bit base for a few steps with changes to the YAML; return (model, trainer)."""

    def train(**changes):
        changes = {"dataset_prepared_path": prepared, **FEW, **changes}
        model, _, trainer = train_here(write_config(tmp_path, "qtha-4bit.yml", **changes))
        return model, trainer

    return train


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """Eight steps with a checkpoint and an evaluation after the fourth: (model, trainer, output folder)."""
    folder = tmp_path_factory.mktemp("run")
    changes = {**FEW, "dataset_prepared_path": prepared, "max_steps": 8, "save_steps": 4, "eval_steps": 4}
    model, _, trainer = train_here(write_config(folder, "qtha-4bit.yml", **changes))
    return model.eval(), trainer, folder / "out"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def bases(model):
    """Return the kinds of layer that carry adapters."""
    return {type(module.get_base_layer()) for module in model.modules() if isinstance(module, QTHALayer)}


def falls(trainer, by):
    steps = losses(trainer)
    return steps[max(steps)] < steps[1] - by


# ---- training ----


def test_loss_falls_and_every_tensor_moves_after_an_evaluation(uninterrupted):
    model, trainer, out = uninterrupted
    assert bases(model) == {bitsandbytes.nn.Linear4bit}
    evaluated = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert {4, 8} <= set(evaluated)
    assert evaluated[8] < evaluated[4] - 0.01
    assert falls(trainer, by=0.3)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (out / "checkpoint-4", out))
    assert all(".qtha_adapter." in name for name in after)
    assert [name for name, tensor in after.items() if torch.equal(tensor, before[name])] == []


def test_resume_continues_the_uninterrupted_run(uninterrupted, train, tmp_path):
    _, whole, out = uninterrupted
    _, trainer = train(max_steps=8, resume_from_checkpoint=str(out / "checkpoint-4"))
    resumed, expected = losses(trainer), losses(whole)
    for step in (5, 6, 7, 8):
        assert resumed[step] == pytest.approx(expected[step], abs=1e-5), step  # float32, the same operations
    final = load_file(out / "adapter_model.safetensors")
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert max((final[name] - again[name]).abs().max().item() for name in final) < 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_loss(uninterrupted, train, use_reentrant):
    _, trainer = train(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found, expected = losses(trainer), losses(uninterrupted[1])
    assert trainer.args.gradient_checkpointing
    for step in (1, 2, 3):
        assert found[step] == pytest.approx(expected[step], abs=1e-5), step  # float32, the same operations


def test_eight_bits(train):
    model, trainer = train(**EIGHT_BIT)
    assert bases(model) == {bitsandbytes.nn.Linear8bitLt}
    assert falls(trainer, by=0.3)


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_optimisers_with_eight_bit_states(train, optimizer):
    _, trainer = train(optimizer=optimizer, qtha={**LARGE, "param_budget": None, "circuit_lr": None})
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(inner) is bitsandbytes.optim.AdamW
    assert torch.uint8 in {value.dtype for state in inner.state.values() for value in state.values() if torch.is_tensor(value)}
    assert falls(trainer, by=0.3)


def test_dpo(train, tmp_path):
    model, trainer = train(**dpo(dataset_prepared_path=None))
    assert bases(model) == {bitsandbytes.nn.Linear4bit}
    assert losses(trainer)[1] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference agree at the start
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, layer in adapted_layers(model).items():
        adapter = layer.qtha_adapter["default"]
        assert torch.equal(saved[f"base_model.model.{name}.qtha_adapter.cores"], adapter.cores.cpu())
        assert not adapter.is_no_op()


# ---- what reaches the model ----


def loaded(folder, **changes):
    """Return the model as Axolotl loads it for training; transformers' Trainer refuses bfloat16 on a CPU."""
    cfg = load_cfg(str(write_config(folder, "qtha-4bit.yml", **{**FEW, **changes})))
    return ModelLoader(cfg, load_tokenizer(cfg)).load()[0]


def test_pure_bfloat16(tmp_path):
    model = loaded(tmp_path, bfloat16=True)
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            assert parameter.dtype == torch.bfloat16, name  # what flash attention needs
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    found = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[3] < found[0] - 0.3
    assert logits(model).dtype == torch.bfloat16


def test_bnb_config_kwargs_reach_the_model(tmp_path):
    changes = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16"}
    base = loaded(tmp_path, bnb_config_kwargs=changes).base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert (base.weight.quant_state.quant_type, base.weight.quant_state.nested) == ("fp4", False)
    assert base.compute_dtype == torch.bfloat16
    plain = loaded(tmp_path).base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert (plain.weight.quant_state.quant_type, plain.weight.quant_state.nested) == ("nf4", True)
    assert plain.compute_dtype == torch.float32


def test_layers_named_to_stay_in_full_precision(tmp_path):
    model = loaded(tmp_path, bnb_config_kwargs={"llm_int8_skip_modules": ["q_proj", "lm_head"]})
    assert bases(model) == {bitsandbytes.nn.Linear4bit, torch.nn.Linear}


def test_a_base_that_was_not_quantised_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "connect", lambda data: None)  # as before this package told Axolotl
    with pytest.raises(ValueError, match=r"load_in_4bit: true, but no layer of the base.*would train in full precision"):
        train()
    assert not list(tmp_path.rglob("adapter*"))


# ---- checkpoints quantised before ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The quickstart's base, saved in 4 bits."""
    folder = tmp_path_factory.mktemp("quantised") / "base"
    shutil.copytree(QUICKSTART / "base", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(QUICKSTART / "base", quantization_config=NF4).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("load_in_4bit", [None, True])
def test_a_quantised_checkpoint(uninterrupted, train, checkpoint, load_in_4bit):
    model, trainer = train(base_model=checkpoint, load_in_4bit=load_in_4bit)
    assert bases(model) == {bitsandbytes.nn.Linear4bit}
    found, expected = losses(trainer), losses(uninterrupted[1])
    for step in (1, 2, 3):
        assert found[step] == pytest.approx(expected[step], abs=1e-5), step  # the same numbers, quantised earlier


def test_a_checkpoint_quantised_otherwise_is_refused(train, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"load_in_8bit: true, but no layer .* Linear8bitLt.*a quantisation of its own"):
        train(base_model=checkpoint, **EIGHT_BIT)
    assert not list(tmp_path.rglob("adapter*"))


# ---- reloading and merging ----


def test_reloaded_in_a_new_process_gives_the_same_logits(uninterrupted, tmp_path):
    model, _, out = uninterrupted
    torch.save({"ids": IDS, "settings": NF4}, tmp_path / "ids")
    done = run([sys.executable, "-c", RELOAD, str(out), str(tmp_path / "ids"), str(torch.get_num_threads())], tmp_path)
    assert done.returncode == 0, done.stdout
    assert torch.equal(torch.load(tmp_path / "ids.logits"), logits(model))  # float32, same threads: the same operations


def test_on_the_full_precision_base_logits_differ_by_the_rounding(uninterrupted):
    model, _, out = uninterrupted
    full = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    difference = (logits(full) - logits(model)).abs().max().item()
    with full.disable_adapter(), model.disable_adapter():
        rounding = (logits(full) - logits(model)).abs().max().item()
    print(f"full precision minus 4 bits, largest logit difference: {difference:.3f}, without adapters {rounding:.3f}")
    assert 0 < difference < 5 * rounding  # of the same size as that of the bases alone


def test_merging_through_the_full_precision_base(forked, train, tmp_path):
    train(qtha={**SHORT["qtha"], "quantum": "none", "circuit_lr": None})
    out = tmp_path / "out"
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    (config,) = tmp_path.glob("*.yml")
    done = forked(["axolotl", "merge-lora", str(config), "--lora-model-dir", str(out)], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    # one rounding of the merged float32 weights per layer
    assert (logits(merged) - expected).abs().max() < 1e-4
