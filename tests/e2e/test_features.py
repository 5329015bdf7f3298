"""What the host can do besides, with `adapter: qtha`: it works, or is refused; docs/host.md has a row for each."""

import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoTokenizer

from .commands import REPOSITORY, losses, train_here, write_config

pytestmark = pytest.mark.e2e

SHORT = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "warmup_steps": 0}
SHORT["overrides_of_model_config"] = {"num_hidden_layers": 1}
IDS = torch.tensor([[1, 5, 9, 200, 31, 7, 44, 812]])

WORKS = {
    "neftune_noise_alpha": {"neftune_noise_alpha": 5},
    "group_by_length": {"group_by_length": True},
    "early_stopping_patience": {"early_stopping_patience": 1},
    "load_best_model_at_end": {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False},
    "save_only_model": {"save_only_model": True},
    "added_tokens_overrides": {
        "added_tokens_overrides": {0: "<|new|>"},
        "special_tokens": {"pad_token": "<|new|>"},
        "qtha": {"modules_to_save": ["embed_tokens", "lm_head"]},
    },
    "tokens": {"tokens": ["<|new|>"], "qtha": {"modules_to_save": ["embed_tokens", "lm_head"]}},
}
REFUSED = {
    "loraplus_lr_ratio": 16,
    "relora": True,
    "lisa_n_layers": 2,
    "unfrozen_parameters": ["lm_head.*"],
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return str(tmp_path_factory.mktemp("prepared"))


@pytest.mark.parametrize("feature", WORKS)
def test_works(feature, tmp_path, prepared):
    """It trains, and what was saved is what was trained."""
    keys = {**SHORT, **WORKS[feature]}
    if "qtha" not in keys:  # the vocabulary is part of the prepared data
        keys["dataset_prepared_path"] = prepared
    model, _, trainer = train_here(write_config(tmp_path, **keys))
    out = tmp_path / "out"
    assert len(losses(trainer)) == 4
    model.eval()
    with torch.no_grad():
        expected = model(IDS).logits
        with model.disable_adapter():
            assert not torch.equal(model(IDS).logits, expected)
    if "tokens" in feature:
        check_tokens(model, out)
        return
    options = {"num_hidden_layers": 1, "dtype": torch.float32}
    again = AutoPeftModelForCausalLM.from_pretrained(out, **options).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)
    if feature == "load_best_model_at_end":
        best = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
        assert all(torch.equal(tensor, best[name]) for name, tensor in load_file(out / "adapter_model.safetensors").items())
    if feature == "save_only_model":
        assert not (out / "checkpoint-2" / "optimizer.pt").exists()


def check_tokens(model, out):
    """Check that the trained rows of a token that was added are saved."""
    new = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|new|>")
    saved = load_file(out / "adapter_model.safetensors")
    rows = next(tensor for name, tensor in saved.items() if "embed_tokens" in name)
    assert torch.equal(rows[new], model.get_input_embeddings().weight[new])


def test_circuit_lr_goes_before_the_users_groups(tmp_path, prepared):
    """Axolotl gives a tensor to the first group whose text is in its name."""
    keys = {
        **SHORT,
        "max_steps": 1,
        "save_steps": 1,
        "eval_steps": None,
        "test_datasets": None,
        "dataset_prepared_path": prepared,
    }
    keys |= {"lr_groups": [{"name": "mine", "modules": ["q_proj"], "lr": 1e-4}], "qtha": {"circuit_lr": 0.05}}
    model, _, trainer = train_here(write_config(tmp_path, **keys))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if name.endswith(".angles")} == {0.05}
    assert {rate for name, rate in rates.items() if "q_proj" in name and not name.endswith(".angles")} == {1e-4}
    assert {rate for name, rate in rates.items() if "q_proj" not in name and not name.endswith(".angles")} == {0.01}


@pytest.mark.parametrize("key", REFUSED)
def test_is_refused(key, tmp_path):
    with pytest.raises(ValueError, match=rf"{key}: "):
        train_here(write_config(tmp_path, **SHORT, **{key: REFUSED[key]}))
    assert not (tmp_path / "out").exists()


def test_the_page_has_them_all():
    page = (REPOSITORY / "docs" / "host.md").read_text().split("## Features")[1].split("\n## ")[0]
    rows = {}
    for key, outcome in re.findall(r"^\| (.*?) \| (.*?)[;.:|]", page, re.M):
        rows |= dict.fromkeys(re.findall(r"`(\w+):?[^`]*`", key), outcome.strip())
    assert {key for key, outcome in rows.items() if outcome == "works"} >= set(WORKS)
    assert {key for key, outcome in rows.items() if outcome == "refused"} >= set(REFUSED)
