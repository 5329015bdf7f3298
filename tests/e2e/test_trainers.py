"""Axolotl's trainers with `adapter: qtha`: docs/host.md has a table of them, and each row is what a run here shows."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.cli.config import load_cfg
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from axolotl_qtha.training.resuming import CompareWithCheckpoint
from axolotl_qtha.tuner.adapter import QTHAAdapter
from axolotl_qtha.tuner.saving import WEIGHTS, saved_tensors

from .commands import QUICKSTART, losses, train_here, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

WORDS = ("qubit", "gate", "pulse", "circuit", "noise", "phase", "basis", "shot")
IDS = torch.tensor([[1, 5, 9, 200, 31, 7, 44, 812]])
STEPS = {"max_steps": 3, "save_steps": 2, "micro_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0}


def shorter(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Reward short answers (GRPO); the sampled ones differ in length."""
    return [-float(len(set(completion))) for completion in completions]


def pairs() -> list[dict[str, Any]]:
    return [{"prompt": f"What is a {word}?", "chosen": f"A {word} it is.", "rejected": f"No {word}."} for word in WORDS]


def conversations() -> list[dict[str, Any]]:
    return [
        {
            key: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}]
            for key in ("chosen", "rejected")
        }
        for row in pairs()
    ]


def judged() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in pairs()
        for key in ("chosen", "rejected")
    ]


def questions() -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"]} for row in pairs()]


def rewarded() -> list[dict[str, Any]]:
    return [{"system": "", "input": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs()]


def stepwise() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "labels": [True, False]} for row in pairs()
    ]


def texts() -> list[dict[str, Any]]:
    return [{"text": " ".join(row.values()) * 4} for row in pairs()]


PAIRS = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
JUDGED = {"field_prompt": "prompt", "field_completion": "completion", "field_label": "label"}
GRPO = {"num_generations": 2, "max_completion_length": 8, "reward_funcs": [f"{__name__}.shorter"], "beta": 0.1}
Row = tuple[Callable[[], list[dict[str, Any]]], Any, dict[str, Any]]
# A row of the table in docs/host.md: the data, its `type:`, and the keys that make Axolotl take this trainer.
TRAINS: dict[str, Row] = {
    "type: completion": (texts, "completion", {}),
    "pretraining_dataset": (texts, "pretrain", {}),
    "rl: dpo": (pairs, PAIRS, {"rl": "dpo"}),
    "rl: ipo": (pairs, PAIRS, {"rl": "ipo"}),
    "rl: simpo": (pairs, PAIRS, {"rl": "simpo", "simpo_gamma": 0.5}),
    "rl: orpo": (conversations, "chat_template.argilla", {"rl": "orpo", "chat_template": "chatml", "rl_beta": 0.1}),
    "rl: kto": (judged, JUDGED, {"rl": "kto", "remove_unused_columns": False}),
    "rl: grpo": (questions, "passthrough", {"rl": "grpo", "trl": GRPO}),
    "reward_model": (rewarded, "bradley_terry.chat_template", {"reward_model": True, "chat_template": "chatml"}),
    "process_reward_model": (stepwise, "stepwise_supervised", {"process_reward_model": True}),
}
CLASSES = {"reward_model": (AutoModelForSequenceClassification, 1), "process_reward_model": (AutoModelForTokenClassification, 2)}
# Likewise: the keys, and what the refusal says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rl: gdpo": ({"rl": "gdpo", "trl": GRPO}, r"rl: 'gdpo' .*What works: `rl: grpo`"),
    "rl: grpo, trl: {use_vllm: true}": ({"rl": "grpo", "trl": {**GRPO, "use_vllm": True}}, r"use_vllm: True .*What works: "),
}


def config_of(row: str, folder: Path, prepared: Path, **changes: Any) -> Path:
    """Write the YAML of a row, and its data where that is prepared."""
    rows, kind, keys = TRAINS[row]
    file = prepared / f"{rows.__name__}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in rows()))
    data: dict[str, Any] = {"path": str(file), "ds_type": "json", "type": kind, "split": "train"}
    streamed = {"datasets": None, "pretraining_dataset": [{**data, "path": "json", "data_files": str(file)}]}
    own = {"test_datasets": None, "eval_steps": None, "dataset_prepared_path": str(prepared / "all")}
    own |= streamed if row == "pretraining_dataset" else {"datasets": [data]}
    return write_config(folder, **{**STEPS, **own, **keys, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function from a row to its run, made once: (model, trainer, output_dir, function that runs it with other keys)."""
    prepared = tmp_path_factory.mktemp("data")
    made: dict[str, Any] = {}

    def run(row: str, **changes: Any) -> Any:
        folder = tmp_path_factory.mktemp("run")
        _, _, trainer = train_here(config_of(row, folder, prepared, **changes))
        return trainer.model.eval(), trainer, folder / "out"

    def first(row: str) -> Any:
        if row not in made:  # GRPO trains an adapter on, whose copy is its frozen reference
            made[row] = run(row, **({"lora_model_dir": str(first("type: completion")[2])} if row == "rl: grpo" else {}))
        return made[row]

    first.again = run  # type: ignore[attr-defined]
    return first


@pytest.mark.parametrize("row", TRAINS)
def test_trains_saves_and_reloads_equal(row, runs):
    model, trainer, out = runs(row)
    assert trainer.state.global_step == 3
    seen = losses(trainer)
    assert set(seen) == {1, 2, 3}
    assert all(map(math.isfinite, seen.values()))
    trained = [module for name, module in model.named_modules() if isinstance(module, QTHAAdapter) and name.endswith(".default")]
    assert not any(adapter.is_no_op() for adapter in trained)
    saved = load_file(out / WEIGHTS)
    assert len(saved) == sum(parameter.requires_grad for parameter in model.parameters())
    first = load_file(out / "checkpoint-2" / WEIGHTS)
    assert all(not torch.equal(saved[name], first[name]) for name in saved)  # the third step moved every tensor
    kind, labels = CLASSES.get(row, (AutoModelForCausalLM, None))
    base = kind.from_pretrained(QUICKSTART / "base", dtype=torch.float32, **({"num_labels": labels} if labels else {}))
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, out).eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("row", CLASSES)
def test_the_head_is_trained_and_saved(row, runs):
    model, _, out = runs(row)
    head = {name: value for name, value in load_file(out / WEIGHTS).items() if ".score." in name}
    assert head
    start = {
        f"base_model.model.score.{name}": value for name, value in model.base_model.model.score.original_module.named_parameters()
    }
    assert head.keys() == start.keys()
    assert all(not torch.equal(value, start[name]) for name, value in head.items())


def test_grpo_keeps_its_reference_and_trains_the_other(runs):
    _, _, start = runs("type: completion")
    model, _, out = runs("rl: grpo")
    begun, saved = load_file(start / WEIGHTS), load_file(out / WEIGHTS)
    assert all(torch.equal(tensor, begun[name]) for name, tensor in saved_tensors(model, "ref").items())
    assert all(not torch.equal(tensor, begun[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("row", ["rl: grpo", "rl: dpo", "reward_model"])
def test_a_resumed_run_begins_with_the_checkpoints_adapter(row, runs, monkeypatch):
    _, _, whole = runs(row)
    begun: dict[str, torch.Tensor] = {}
    compare = CompareWithCheckpoint.on_train_begin

    def seen(self: Any, *arguments: Any, model: Any, **more: Any) -> None:
        begun.update({name: tensor.detach().clone() for name, tensor in saved_tensors(model, "default").items()})
        compare(self, *arguments, model=model, **more)

    monkeypatch.setattr(CompareWithCheckpoint, "on_train_begin", seen)
    start = {"lora_model_dir": str(runs("type: completion")[2])} if row == "rl: grpo" else {}
    model, _, out = runs.again(row, **start, resume_from_checkpoint=str(whole / "checkpoint-2"))
    saved = load_file(whole / "checkpoint-2" / WEIGHTS)
    assert saved.keys() == begun.keys()
    assert all(torch.equal(begun[name], value) for name, value in saved.items())
    final, again = load_file(whole / WEIGHTS), load_file(out / WEIGHTS)
    assert max((final[name] - again[name]).abs().max().item() for name in final) < 1e-5  # as the run that was not interrupted
    assert sorted(model.peft_config) == (["default", "ref"] if row == "rl: grpo" else ["default"])


@pytest.mark.parametrize("row", REFUSED)
def test_is_refused_before_the_base_is_loaded(row, tmp_path):
    keys, words = REFUSED[row]
    data = [{"path": "unread.jsonl", "ds_type": "json", "type": "passthrough"}]
    with pytest.raises(ValueError, match=words):
        load_cfg(str(write_config(tmp_path, **keys, datasets=data, test_datasets=None, eval_steps=None)))
