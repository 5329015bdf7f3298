"""What a configuration says, as values."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification, LlamaModel

from axolotl_qtha import QTHAConfig
from axolotl_qtha.planner.estimate import make_plan
from axolotl_qtha.trained.adapter_folder import FREE_WHEN_LOADED, check_fits
from axolotl_qtha.tuner.layer import adapted_layers

from ..models import SIZES
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


@pytest.mark.parametrize("form", [{"mpo": "tt"}, {"mpo": "none"}, {"share": {"layers": "auto"}}, {}], ids=str)
def test_what_goes_on_from_an_adapter_has_its_form(tmp_path, form):
    config = CONFIGS["llama"]
    settings = {"rank": 4, **({"quantum": "none"} if "share" in form else {})}
    model = get_peft_model(LlamaForCausalLM(config), QTHAConfig(**settings, **form, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    left, said = run_on(tmp_path, config, qtha=settings), run_on(tmp_path, config, qtha={**settings, "mpo": "tt"})
    like = left.adapter_settings.like(str(tmp_path / "adapter"))
    made = get_peft_model(LlamaForCausalLM(config), like.config_for(LlamaForCausalLM(config))).active_peft_config
    saved = model.active_peft_config
    assert (made.mpo, made.share, made.bond_dim, made.mid_dim) == (saved.mpo, saved.share, saved.bond_dim, saved.mid_dim)
    assert said.adapter_settings.like(str(tmp_path / "adapter")) is said.adapter_settings  # asked for: told where it is loaded
    assert left.adapter_settings.like("someone/on-the-hub") is left.adapter_settings


def test_what_peft_writes_into_the_adapter_does_not_stay(tmp_path):
    run = run_on(tmp_path, CONFIGS["llama"])
    make_plan(run, [])
    assert run.adapter.bond_dim is None
    assert run.adapter.target_modules == "all-linear"
    assert run.adapter is not run.adapter


TASKS = {
    LlamaForCausalLM: "CAUSAL_LM",
    LlamaModel: "CAUSAL_LM",
    LlamaForSequenceClassification: "SEQ_CLS",
    LlamaForTokenClassification: "TOKEN_CLS",
}


def settings_of(tmp_path, **block):
    return run_on(tmp_path, CONFIGS["llama"], qtha={"rank": 4, "bond_dim": 4, "mid_dim": 8, **block}).adapter_settings


def base(kind):
    return kind(LlamaConfig(**SIZES, num_hidden_layers=1))


@pytest.mark.parametrize("kind", TASKS)
def test_the_task_is_the_one_axolotls_loader_chooses(tmp_path, kind):
    from axolotl.loaders.adapter import _get_peft_task_type

    model = base(kind)
    assert settings_of(tmp_path).config_for(model).task_type == TASKS[kind] == _get_peft_task_type(model).value


@pytest.mark.parametrize("kind", list(TASKS)[2:])
def test_all_linear_leaves_the_head_to_be_trained_in_full(tmp_path, kind):
    model = base(kind)
    model = get_peft_model(model, settings_of(tmp_path, target_modules="all-linear").config_for(model))
    assert len(adapted_layers(model)) == 7
    assert {name.split(".")[3] for name, p in model.named_parameters() if p.requires_grad and "score" in name} == {
        "modules_to_save"
    }


@pytest.mark.parametrize("modules", [None, ["embed_tokens"], ["score", "embed_tokens"]])
def test_the_head_that_peft_adds_is_no_difference(tmp_path, modules):
    model = base(LlamaForSequenceClassification)
    settings = settings_of(tmp_path, target_modules=["q_proj"], modules_to_save=modules)
    get_peft_model(model, settings.config_for(model)).save_pretrained(tmp_path / "trained")
    check_fits("lora_model_dir", tmp_path / "trained", settings.named, FREE_WHEN_LOADED)
    other = settings_of(tmp_path, target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"qtha\.modules_to_save: the adapter was made with .* the YAML says \['norm'\]"):
        check_fits("lora_model_dir", tmp_path / "trained", other.named, FREE_WHEN_LOADED)
    again = settings.of_trained(str(tmp_path / "trained"), model)
    model = get_peft_model(base(LlamaForSequenceClassification), again)
    kept = model.active_peft_config.modules_to_save
    assert sorted(kept) == sorted({*(modules or []), "classifier", "score"})


def test_an_adapter_for_another_task_is_refused(tmp_path):
    settings, model = settings_of(tmp_path, target_modules=["q_proj"]), base(LlamaForCausalLM)
    get_peft_model(model, settings.config_for(model)).save_pretrained(tmp_path / "trained")
    words = r"trained' is an adapter for CAUSAL_LM .*LlamaForSequenceClassification, which is SEQ_CLS.*What works: neither"
    with pytest.raises(ValueError, match=words):
        settings.of_trained(str(tmp_path / "trained"), base(LlamaForSequenceClassification))
    assert settings.of_trained(str(tmp_path / "trained"), base(LlamaForCausalLM)).modules_to_save is None


@pytest.mark.slow
@pytest.mark.parametrize("key", ["reward_model", "process_reward_model"])
def test_a_reward_model_is_planned(tmp_path, key):
    """With the head's entries, in pairs for `reward_model`, and without the logits of a language model."""
    chat = run_on(tmp_path, CONFIGS["llama"])
    run = run_on(tmp_path, CONFIGS["llama"], **{key: True})
    assert run.sequences == (8 if key == "reward_model" else 4)
    plan, usual = make_plan(run, []), make_plan(chat, [])
    assert plan.memory_unknown == ""
    assert plan.parameters == usual.parameters
    assert plan.memory.adapter == usual.memory.adapter + 4 * (192 if key == "reward_model" else 2 * 192 + 2)
