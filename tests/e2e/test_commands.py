"""Axolotl's own commands with `adapter: qtha`, on the quickstart's base model and data."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.loaders import ModelLoader, load_tokenizer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from axolotl_qtha.errors import Diverged
from axolotl_qtha.tuner.layer import adapted_layers

from .commands import QUICKSTART, losses, run, train_here, write_config

pytestmark = pytest.mark.e2e

SHORT = {
    "max_steps": 8,
    "save_steps": 4,
    "eval_steps": 8,
    "micro_batch_size": 4,
    "qtha": {"rank": 4, "param_budget": 0.4, "circuit_layers": 2, "target_modules": ["q_proj", "down_proj"], "circuit_lr": 0.05},
}
IDS = torch.tensor([[1, 5, 9, 200, 31, 7, 44, 812]])
RELOAD = """
import sys, torch
import axolotl_qtha
from peft import AutoPeftModelForCausalLM
torch.set_num_threads(int(sys.argv[3]))
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])["ids"]).logits, sys.argv[2] + ".logits")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """Eight steps in one go, with a checkpoint at step 4: (model, losses, output folder)."""
    model, _, trainer = train_here(write_config(folder, **SHORT))
    return model.eval(), losses(trainer), folder / "out"


def test_reloaded_in_a_new_process_gives_the_same_logits(uninterrupted, tmp_path):
    model, _, out = uninterrupted
    with torch.no_grad():
        logits = model(IDS).logits
        with model.disable_adapter():
            base = model(IDS).logits
    assert not torch.equal(logits, base)
    torch.save({"ids": IDS}, tmp_path / "ids")
    done = run([sys.executable, "-c", RELOAD, str(out), str(tmp_path / "ids"), str(torch.get_num_threads())], tmp_path)
    assert done.returncode == 0, done.stdout
    assert torch.equal(torch.load(tmp_path / "ids.logits"), logits)  # float32, same threads: the same operations


def test_every_folder_of_the_run_has_a_card_without_paths(uninterrupted, tmp_path):
    model, seen, out = uninterrupted
    for folder, steps in ((out, 8), (out / "checkpoint-4", 4), (out / "checkpoint-8", 8)):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "peft"
        assert "qtha" in card.data.tags
        assert f"| steps | {steps} |" in card.text
        assert f"| last training loss | {round(seen[steps], 4)} |" in card.text
        assert f"| evaluation loss at step {8 if steps == 8 else 0} |" in card.text  # as eval_steps has it
        assert "| data | `train.jsonl` (a local file, not published) |" in card.text
        assert not re.search(r"(?<![\w:/])/\w", card.content)  # addresses and PATH/TO aside
        assert out.parent.name not in card.content
    (block,) = re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)
    shown = {**yaml.safe_load(block), "base_model": str(QUICKSTART / "base"), "lora_model_dir": str(out)}
    shown["qtha"]["param_budget"] = None  # in place of the quickstart's
    cfg = load_cfg(str(write_config(tmp_path, **{**SHORT, **shown})))
    with torch.no_grad():
        assert torch.equal(ModelLoader(cfg, load_tokenizer(cfg)).load()[0].eval()(IDS).logits, model(IDS).logits)


def test_adapter_has_its_own_learning_rate_for_the_angles(uninterrupted, folder):
    start = load_file(folder / "out" / "checkpoint-4" / "adapter_model.safetensors")
    end = load_file(folder / "out" / "adapter_model.safetensors")
    moved = {part: max((end[k] - start[k]).abs().max() for k in end if k.endswith(part)) for part in (".angles", ".cores")}
    # Adam moves an entry by about the learning rate per step: circuit_lr is 5 times learning_rate
    assert moved[".angles"] > 2 * moved[".cores"]


def test_resume_continues_the_uninterrupted_run(uninterrupted, tmp_path):
    _, expected, out = uninterrupted
    config = write_config(tmp_path, **SHORT, resume_from_checkpoint=str(out / "checkpoint-4"))
    _, _, trainer = train_here(config)
    resumed = losses(trainer)
    assert set(resumed) >= {5, 6, 7, 8}
    for step in (5, 6, 7, 8):
        assert resumed[step] == pytest.approx(expected[step], abs=1e-5), step
    final = load_file(out / "adapter_model.safetensors")
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert max((final[name] - again[name]).abs().max().item() for name in final) < 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gate_order": "2025-05"}, r"qtha\.gate_order: the adapter was made with '2025-06', the YAML says '2025-05'"),
        ({"rank": 2}, r"qtha\.rank: the adapter was made with 4, the YAML says 2"),
        ({"param_budget": 0.6}, r"qtha\.bond_dim: the adapter was made with 4, the YAML says 7"),
        ({"param_budget": None, "bond_dim": 3, "mid_dim": 9}, r"qtha\.bond_dim: .* 4, .* 3; qtha\.mid_dim: .* 4, .* 9\."),
        ({"target_modules": ["q_proj"]}, r"qtha\.target_modules: .* \['down_proj', 'q_proj'\], the YAML says \['q_proj'\]"),
    ],
    ids=str,
)
def test_resume_with_other_settings_is_refused(uninterrupted, tmp_path, changes, words):
    settings = {**SHORT, "qtha": {**SHORT["qtha"], **changes}}
    config = write_config(tmp_path, **settings, resume_from_checkpoint=str(uninterrupted[2] / "checkpoint-4"))
    with pytest.raises(ValueError, match=rf"resume_from_checkpoint: .*checkpoint-4' does not fit the YAML.*{words}"):
        train_here(config)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors"])
def test_resume_from_half_a_checkpoint_is_refused(uninterrupted, tmp_path, name):
    half = shutil.copytree(uninterrupted[2] / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    (half / name).write_bytes((half / name).read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"checkpoint-4' is not complete: .*{name}.*What works: to start anew"):
        train_here(write_config(tmp_path, **SHORT, resume_from_checkpoint=str(half)))


def test_auto_resume_passes_over_half_a_checkpoint(uninterrupted, tmp_path):
    out = shutil.copytree(uninterrupted[2], tmp_path / "out")
    (out / "checkpoint-8" / "trainer_state.json").unlink()
    _, _, trainer = train_here(write_config(tmp_path, **SHORT, auto_resume_from_checkpoints=True))
    assert losses(trainer)[8] == pytest.approx(uninterrupted[1][8], abs=1e-5)
    assert (out / "checkpoint-8" / "trainer_state.json").is_file()
    assert not list(out.glob("incomplete-*"))  # it was set aside until there was a complete one


def test_second_training_starts_from_lora_model_dir(uninterrupted, tmp_path):
    _, first, out = uninterrupted
    model, _, trainer = train_here(write_config(tmp_path, **SHORT, lora_model_dir=str(out)))
    assert losses(trainer)[1] < first[1] - 0.05  # the same first batch, on the trained adapter
    assert model.active_peft_config.bond_dim is not None


def test_a_trained_adapter_runs_as_the_yaml_says(uninterrupted, tmp_path):
    """How circuits are run is no part of an adapter: trained exactly, evaluated with shots and noise."""
    model, _, out = uninterrupted
    noisy = {**SHORT["qtha"], "quantum_backend": "aer", "shots": 100, "noise_model": "depolarizing", "gradient": "adjoint"}
    cfg = load_cfg(str(write_config(tmp_path, **{**SHORT, "qtha": noisy}, lora_model_dir=str(out))))
    other, _ = ModelLoader(cfg, load_tokenizer(cfg)).load()
    assert other.active_peft_config.simulation.shots == 100
    with torch.no_grad():
        first, second = model(IDS).logits, other.eval()(IDS).logits
    assert 1e-3 < (first - second).abs().max() < 5


@pytest.mark.parametrize("damage", ["truncated", "foreign", "nan", "missing"])
def test_damaged_adapter_is_refused(uninterrupted, tmp_path, damage):
    adapter = tmp_path / "adapter"
    shutil.copytree(uninterrupted[2], adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "foreign":
        save_file({"base_model.model.lora_A.weight": torch.zeros(2, 2)}, file)
    elif damage == "nan":
        save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, file)
    else:
        save_file({key: value for key, value in tensors.items() if key != name}, file)
    config = write_config(tmp_path, **SHORT, lora_model_dir=str(adapter))
    with pytest.raises(ValueError, match="What works"):
        train_here(config)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("quantum", "words"),
    [
        ("none", r"not a finite number at step \d; the training diverged and was stopped\. No checkpoint was written"),
        ("qtha", r"^model\.layers\.\d\.\S+: the circuit's encoded input of qubit \d \(token \d+\) is nan.*What works"),
    ],
)
def test_nan_stops_the_run_and_is_not_saved(tmp_path, quantum, words):
    # a learning rate without bounds drives the adapter to infinity within a step or two
    adapter = {"rank": 4, "param_budget": 0.4, "target_modules": ["q_proj", "down_proj"], "quantum": quantum}
    changes = {"learning_rate": 1e38, "max_grad_norm": 0, "max_steps": 4, "eval_steps": 100, "qtha": adapter}
    with pytest.raises((ValueError, Diverged), match=words):
        train_here(write_config(tmp_path, **{**SHORT, **changes}))
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


def dpo(**changes):
    data = {
        "path": str(QUICKSTART / "data" / "preference.jsonl"),
        "ds_type": "json",
        "split": "train",
        "type": {
            "field_prompt": "prompt",
            "field_chosen": "chosen",
            "field_rejected": "rejected",
            "prompt_format": "### Instruction:\n{prompt}\n\n### Response:\n",
        },
    }
    short = {"max_steps": 3, "save_steps": 3, "eval_steps": None, "rl": "dpo", "datasets": [data], "test_datasets": None}
    return {**SHORT, **short, **changes}


def test_dpo_does_not_drop_an_adapter(uninterrupted, tmp_path):
    with pytest.raises(ValueError, match=r"lora_model_dir.*is not read with `rl: dpo`"):
        train_here(write_config(tmp_path, **dpo(lora_model_dir=str(uninterrupted[2]))))


def test_dpo(tmp_path):
    model, _, trainer = train_here(write_config(tmp_path, **dpo()))
    assert losses(trainer)[1] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference agree at the start
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, layer in adapted_layers(model).items():
        adapter = layer.qtha_adapter["default"]
        assert torch.equal(saved[f"base_model.model.{name}.qtha_adapter.cores"], adapter.cores.cpu())
        assert not adapter.is_no_op()
    readme = tmp_path / "out" / "README.md"
    written = readme.read_text()
    assert "| method | dpo |" in written
    readme.unlink()
    trainer.create_model_card(model_name="other", tags=["trl"])  # as a push to the Hub does
    assert readme.read_text() == written


def test_merge_is_refused_with_a_circuit_and_exact_without(forked, uninterrupted, tmp_path):
    config = next(Path(uninterrupted[2]).parent.glob("qtha-*.yml"))
    done = forked(
        ["axolotl", "merge-lora", str(config), "--output-dir", str(tmp_path / "m"), "--lora-model-dir", str(uninterrupted[2])],
        tmp_path,
    )
    assert done.returncode != 0
    assert "not linear in x" in done.stdout
    assert "quantum: none" in done.stdout
    assert not list(tmp_path.rglob("*.safetensors"))

    plain = write_config(tmp_path, **{**SHORT, "qtha": {"rank": 4, "param_budget": 0.4, "quantum": "none"}, "max_steps": 4})
    model, _, _ = train_here(plain)
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    out = tmp_path / "out"
    done = forked(["axolotl", "merge-lora", str(plain), "--lora-model-dir", str(out)], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    with torch.no_grad():
        # every merged weight is rounded once; the logits go up to 20, where float32 has steps of 2e-6 (seen: 1.3e-5)
        assert (merged(IDS).logits - expected).abs().max() < 3e-5
