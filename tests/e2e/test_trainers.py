"""Axolotl's trainers with `adapter: qtha`: docs/host.md has a table of them, and each row is what a run here shows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from axolotl_qtha.tuner.adapter import QTHAAdapter
from axolotl_qtha.tuner.saving import WEIGHTS

from .commands import QUICKSTART, REPOSITORY, losses, train_here, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

WORDS = ("qubit", "gate", "pulse", "circuit", "noise", "phase", "basis", "shot")
IDS = torch.tensor([[1, 5, 9, 200, 31, 7, 44, 812]])
STEPS = {"max_steps": 3, "save_steps": 2, "micro_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0, "dataset_num_proc": 1}
NO_TEST_DATA = {"test_datasets": None, "eval_steps": None}


def shorter(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Reward short answers (GRPO); the sampled ones differ in length."""
    return [-float(len(set(completion))) for completion in completions]


def pairs() -> list[dict[str, Any]]:
    return [{"prompt": f"What is a {word}?", "chosen": f"A {word} it is.", "rejected": f"No {word}."} for word in WORDS]


def conversations() -> list[dict[str, Any]]:
    return [
        {key: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
        for row in pairs()
    ]


def judged() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"} for row in pairs() for key in ("chosen", "rejected")
    ]


def questions() -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"]} for row in pairs()]


def rewarded() -> list[dict[str, Any]]:
    return [{"system": "", "input": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs()]


def stepwise() -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "labels": [True, False]} for row in pairs()]


def texts() -> list[dict[str, Any]]:
    return [{"text": " ".join(row.values()) * 4} for row in pairs()]


USER_DEFINED = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
JUDGED = {"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"}
GRPO = {
    "num_generations": 2,
    "max_completion_length": 8,
    "reward_funcs": [f"{__name__}.shorter"],
    "beta": 0.1,
}
# The row of docs/host.md: (rows of data, the data's `type:`, other keys).
TRAINS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rl: dpo": (pairs, USER_DEFINED, {"rl": "dpo"}),
    "rl: ipo": (pairs, USER_DEFINED, {"rl": "ipo"}),
    "rl: kto": (judged, JUDGED, {"rl": "kto", "remove_unused_columns": False}),
    "rl: orpo": (conversations, "chat_template.argilla", {"rl": "orpo", "chat_template": "chatml", "rl_beta": 0.1}),
    "rl: simpo": (pairs, USER_DEFINED, {"rl": "simpo", "simpo_gamma": 0.5}),
    "rl: grpo": (questions, "passthrough", {"rl": "grpo", "trl": GRPO}),
    "reward_model": (
        rewarded,
        "bradley_terry.chat_template",
        {"reward_model": True, "model_type": "AutoModelForSequenceClassification", "num_labels": 1, "chat_template": "chatml"},
    ),
    "process_reward_model": (
        stepwise,
        "stepwise_supervised",
        {"process_reward_model": True, "model_type": "AutoModelForTokenClassification", "num_labels": 2},
    ),
    "pretraining_dataset": (texts, "pretrain", {}),
    "type: completion": (texts, "completion", {}),
}
CLASSES = {"reward_model": AutoModelForSequenceClassification, "process_reward_model": AutoModelForTokenClassification}


def config_of(row: str, folder: Path, **changes: Any) -> Path:
    """Write the YAML of a row, and its data beside it."""
    rows, kind, keys = TRAINS[row]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows()))
    data: dict[str, Any] = {"path": str(folder / "data.jsonl"), "ds_type": "json", "type": kind, "split": "train"}
    if row == "pretraining_dataset":
        keys = {"datasets": None, "pretraining_dataset": [{**data, "path": "json", "data_files": data["path"]}]}
    else:
        keys = {"datasets": [data], **keys}
    return write_config(folder, **STEPS, **NO_TEST_DATA, **{**keys, **changes})


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("row", TRAINS)
def test_trains_saves_and_reloads_equal(row, tmp_path):
    model, _, trainer = train_here(config_of(row, tmp_path))
    assert trainer.state.global_step == 3
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(trainer).values())
    model = trainer.model.eval()
    trained = [module for name, module in model.named_modules() if isinstance(module, QTHAAdapter) and name.endswith(".default")]
    assert trained
    assert not any(adapter.is_no_op() for adapter in trained)
    saved = load_file(tmp_path / "out" / WEIGHTS)
    assert len(saved) == len(tensors(model))
    options = {"num_labels": TRAINS[row][2]["num_labels"]} if row in CLASSES else {}
    base = CLASSES.get(row, AutoModelForCausalLM).from_pretrained(QUICKSTART / "base", dtype=torch.float32, **options)
    again = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
