"""What a configuration says, as values."""

import pytest
import torch

from axolotl_qtha.planner.estimate import make_plan

from ..planner.bases import CONFIGS, run_on


def test_values_are_those_of_the_yaml(tmp_path):
    run = run_on(tmp_path, CONFIGS["llama"], bf16=True, gradient_checkpointing=True, max_steps=7, eval_batch_size=3)
    assert (run.dtype, run.half, run.gradient_checkpointing) == (torch.bfloat16, True, True)
    assert (run.micro_batch_size, run.accumulation, run.sequence_len, run.tokens) == (4, 2, 128, 512)
    assert (run.max_steps, run.evaluated, run.optimizer, run.fused_loss) == (7, 384, "adamw_torch", False)
    assert (run.deepspeed, run.fsdp, run.quantised_to) == ({}, {}, None)


def test_pairs_of_answers_are_two_sequences(tmp_path):
    data = [{"path": "data.jsonl", "type": "chatml.intel", "split": "train"}]
    run = run_on(tmp_path, CONFIGS["llama"], rl="dpo", datasets=data)
    assert (run.micro_batch_size, run.sequences, run.tokens) == (4, 8, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"load_in_4bit": True}, {"sequence_len": 64}, {"micro_batch_size": 1}], ids=str)
def test_a_changed_run_is_that_of_the_changed_yaml(tmp_path, keys):
    """Also for 4 bits, where the YAML's key leads to settings of bitsandbytes."""
    changed, written = run_on(tmp_path, CONFIGS["llama"]).changed(keys), run_on(tmp_path, CONFIGS["llama"], **keys)
    assert make_plan(changed, []).as_dict() == make_plan(written, []).as_dict()


def test_what_peft_writes_into_the_adapter_does_not_stay(tmp_path):
    run = run_on(tmp_path, CONFIGS["llama"])
    make_plan(run, [])
    assert run.adapter.bond_dim is None
    assert run.adapter.target_modules == "all-linear"
    assert run.adapter is not run.adapter
