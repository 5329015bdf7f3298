"""The plan against the models themselves: parameters exactly, advice by following it."""

import re

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.planner.estimate import find_settings, make_plan
from axolotl_qtha.planner.show import show_plan
from axolotl_qtha.settings.meta_base import UnknownBase, read_config
from axolotl_qtha.terminal import console
from axolotl_qtha.tuner.layer import QTHALayer

from .bases import CONFIGS, MORE, SIZES, run_on, write_run

GIB = 2**30


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_parameters_are_those_of_the_built_model(name, tmp_path):
    config = {**CONFIGS, **MORE}[name]
    run = run_on(tmp_path, config)
    plan = make_plan(run, [])
    model = get_peft_model(AutoModelForCausalLM.from_config(config), run.adapter)
    assert plan.parameters == trainable(model)
    layers = [module for module in model.modules() if isinstance(module, QTHALayer)]
    assert sum(target.count for target in plan.targets) == len(layers)
    for target in plan.targets:
        own = [m for m in layers if (m.in_features, m.out_features) == (target.in_features, target.out_features)]
        assert target.parameters == sum(p.numel() for p in own[0].qtha_adapter.parameters())
    settled = model.active_peft_config
    assert (plan.bond_dim, plan.mid_dim) == (settled.bond_dim, settled.mid_dim)
    if name in CONFIGS:  # PEFT's own LoRA on the same base; on Mixtral it also adapts the experts
        lora = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear"))
        assert plan.lora_parameters == trainable(lora)


@pytest.mark.slow
def test_modules_to_save_are_trained_too(tmp_path):
    run = run_on(tmp_path, CONFIGS["llama"], qtha={"rank": 4, "param_budget": 0.5, "modules_to_save": ["lm_head"]})
    plan = make_plan(run, [])
    assert plan.memory.adapter == 4 * (plan.parameters + 1000 * 192)


@pytest.mark.slow
def test_circuits_are_counted_as_qiskit_counts_them(tmp_path):
    plan = make_plan(run_on(tmp_path, CONFIGS["llama"]), [])
    assert plan.circuits_per_step == 3 * 4 * 4 * 128 * 2  # layers, inputs of each, batch, length, accumulated batches
    networks = make_plan(run_on(tmp_path, CONFIGS["llama"], qtha={"rank": 4, "param_budget": 0.5, "mpo": "tt"}), [])
    assert networks.circuits_per_step == 3 * 7 * 4 * 128 * 2  # modules of each
    assert plan.gates == dict(Ansatz(4, 2).circuit().count_ops())
    none = make_plan(run_on(tmp_path, CONFIGS["llama"], qtha={"rank": 4, "quantum": "none"}), [])
    assert none.circuits_per_step == 0
    assert none.memory.circuit == 0


@pytest.mark.slow
def test_circuits_side_by_side(tmp_path, capsys):
    block = {"rank": 16, "mpo": "none"}
    four, eight = (make_plan(run_on(tmp_path, CONFIGS["llama"], qtha=block | {"qubits": n}), []) for n in (4, 8))
    assert (four.qubits, four.circuits_per_token, four.gates) == (4, 4, dict(Ansatz(4, 2).circuit().count_ops()))
    assert four.circuits_per_step == 2 * eight.circuits_per_step == 3 * 7 * 4 * 128 * 2 * 4
    assert four.parameters == eight.parameters
    assert 4 * four.memory.circuit <= eight.memory.circuit  # the state of one circuit at a time, for a chunk of tokens
    # 16 times the amplitudes, twice the gates a circuit, half the circuits
    share = four.circuits_share
    assert eight.circuits_share == pytest.approx(16 * share / (1 - share + 16 * share))
    show_plan(four, console())
    said = " ".join(capsys.readouterr().out.split())
    assert "(4 per adapted layer and token, 1,024 tokens) of 4 qubits and 24 RY, 16 CRZ" in said
    assert f"They are {share:.1%} of a step's arithmetic." in said
    assert "quantum: qtha (4 circuits of 4 qubits)" in said


@pytest.mark.slow
def test_layers_of_another_rank_are_planned_with_it(tmp_path):
    config = CONFIGS["llama"]
    block = {
        "rank": 4,
        "param_budget": 0.6,
        "rank_pattern": {"k_proj": 1, "up_proj": 12},
        "alpha_pattern": {"q_proj": 4},
        "mpo": "tt",
    }
    run = run_on(tmp_path, config, qtha=block)
    plan = make_plan(run, [])
    model = get_peft_model(AutoModelForCausalLM.from_config(config), run.adapter)
    assert plan.parameters == trainable(model)
    ranks = {"r": 4, "rank_pattern": block["rank_pattern"]}
    lora = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(target_modules="all-linear", **ranks))
    assert plan.lora_parameters == trainable(lora)
    assert plan.circuits_per_step == 3 * (5 * 1 + 1 + 3) * 128 * 4 * 2  # rank 12: three circuits
    assert "rank 1 on 3 layers, rank 4 on 15 layers, rank 12 on 3 layers" in plan.note


@pytest.mark.slow
def test_the_plan_says_that_the_default_budget_gave_way(tmp_path, capsys):
    plan = make_plan(run_on(tmp_path, CONFIGS["llama"], qtha={"rank": 32}), [])
    assert f"the least that rank 32 takes there, {plan.parameters / plan.lora_parameters:.3g} of LoRA's" in plan.note
    show_plan(plan, console())
    assert "The default param_budget 0.24 cannot be met on layers this small" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_parameter_shift_takes_further_circuits(tmp_path, capsys):
    aer = {"rank": 4, "quantum_backend": "aer"}
    plan = make_plan(run_on(tmp_path, CONFIGS["llama"], qtha=aer), [])
    # two layers on four qubits: RY takes two shifts, CRZ four
    assert plan.shift_circuits == 2 * plan.gates["ry"] + 4 * plan.gates["crz"] == 2 * 24 + 4 * 16
    show_plan(plan, console())
    circuits = plan.circuits_per_step * (1 + 112)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"112 shifted ones for its gradient: {circuits:,} circuits, at 0.1 ms each {circuits * 1e-4 / 60:.0f} minutes a step"
        in said
    )
    assert make_plan(run_on(tmp_path, CONFIGS["llama"], qtha=aer | {"gradient": "adjoint"}), []).shift_circuits == 0
    exact = make_plan(run_on(tmp_path, CONFIGS["llama"], qtha={"rank": 4}), [])
    assert exact.shift_circuits == 0
    assert plan.memory.circuit == 0 < exact.memory.circuit  # Aer's states are Aer's
    assert plan.parameters == exact.parameters


@pytest.mark.slow
def test_zero3_does_not_partition_the_plan(tmp_path):
    run = run_on(tmp_path, CONFIGS["llama"])
    alone = make_plan(run, [])
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert is_deepspeed_zero3_enabled()
        assert make_plan(run, []) == alone
    finally:
        unset_hf_deepspeed_config()
        del settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load_in_4bit": True}, "4 bits, nf4, double quantisation, bitsandbytes"),
        ({"load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}, "4 bits, nf4, bitsandbytes"),
        ({"load_in_8bit": True}, "8 bits, bitsandbytes"),
        ({}, "none"),
    ],
)
@pytest.mark.slow
def test_quantisation_is_named(tmp_path, changes, words):
    assert make_plan(run_on(tmp_path, CONFIGS["llama"], **changes), []).quantisation == words


BIG = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}


def big(tmp_path, **changes):
    return run_on(tmp_path, LlamaConfig(**{**SIZES, **BIG}), sequence_len=1024, **changes)


@pytest.mark.slow
def test_a_gpu_that_is_large_enough(tmp_path):
    plan = make_plan(big(tmp_path), [("large", 80 * GIB), ("large", 80 * GIB)])
    assert plan.fits is True
    assert plan.advice == []
    assert make_plan(big(tmp_path), []).fits is None
    assert make_plan(big(tmp_path), [("large", 80 * GIB), ("small", GIB)]).fits is False  # one too small is enough


@pytest.mark.slow
def test_advice_fits_when_it_is_followed(tmp_path):
    run = big(tmp_path)
    needed = make_plan(run, []).needed
    gpu = [("tight", int(0.7 * needed))]
    plan = make_plan(run, gpu)
    assert plan.fits is False
    followed = {
        "gradient_checkpointing: true": {"gradient_checkpointing": True},
        "load_in_4bit": {"load_in_4bit": True},
        "micro_batch_size: 1": {"micro_batch_size": 1},
        "sequence_len: 512": {"sequence_len": 512},
        "sequence_len: 256": {"sequence_len": 256},
    }
    seen = 0
    for words, changes in followed.items():
        advised = any(words in text for text in plan.advice)
        if "sequence_len" in words:
            changed = run_on(tmp_path, LlamaConfig(**{**SIZES, **BIG}), **changes)
        else:
            changed = big(tmp_path, **changes)
        assert make_plan(changed, gpu).fits is advised, words
        seen += advised
    assert seen >= 2


@pytest.mark.slow
def test_advice_combines_changes_or_says_that_none_helps(tmp_path):
    run = big(tmp_path)
    least = make_plan(big(tmp_path, gradient_checkpointing=True, load_in_4bit=True, micro_batch_size=1), []).needed
    (together,) = make_plan(run, [("small", least + 2**20)]).advice
    for words in ("gradient_checkpointing: true", "load_in_4bit: true", "micro_batch_size: 1", "gradient_accumulation_steps: 8"):
        assert words in together
    (hopeless,) = make_plan(run, [("tiny", 2**20)]).advice
    assert "larger GPU" in hopeless


@pytest.mark.slow
def test_checkpointing_and_fused_losses_take_less(tmp_path):
    plain, fused = make_plan(big(tmp_path), []), make_plan(big(tmp_path, chunked_cross_entropy=True), [])
    checkpointed = make_plan(big(tmp_path, gradient_checkpointing=True), [])
    assert checkpointed.memory.activations == plain.memory.activations_with_checkpointing < plain.memory.activations
    assert plain.memory.activations_with_checkpointing == checkpointed.memory.activations_with_checkpointing
    logits = 4 * 1024 * 32000 * 4
    assert plain.memory.total - fused.memory.total > 2 * logits  # in float32, and their gradient


def test_optimiser_states(tmp_path):
    small = {"qtha": {"rank": 4, "mpo": "none", "quantum": "none"}}  # matrices of more than 4096 entries, mostly
    states = {name: make_plan(big(tmp_path, optimizer=name, **small), []).memory for name in ("adamw_torch", "adamw_bnb_8bit")}
    assert states["adamw_torch"].optimiser == 2 * states["adamw_torch"].adapter
    assert states["adamw_bnb_8bit"].optimiser < 0.35 * states["adamw_torch"].optimiser


@pytest.mark.slow
def test_pairs_of_answers_double_the_batch(tmp_path):
    data = [{"path": "data.jsonl", "type": "chatml.intel"}]
    dpo = make_plan(run_on(tmp_path, CONFIGS["llama"], rl="dpo", datasets=data), [])
    assert dpo.memory.activations > 1.9 * make_plan(run_on(tmp_path, CONFIGS["llama"]), []).memory.activations


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.24, 1.0])
def test_settings_that_meet_a_budget(tmp_path, budget):
    settings = find_settings(big(tmp_path), budget)
    assert {row.rank for row in settings} >= {4, 8, 16, 32}
    assert all(row.share <= budget for row in settings)
    for row in settings[:: len(settings) // 2]:
        used = {"rank": row.rank, "num_cores": row.num_cores, "bond_dim": row.bond_dim, "mid_dim": row.mid_dim}
        plan = make_plan(big(tmp_path, qtha=used), [])
        assert plan.parameters == row.parameters
        assert plan.parameters / plan.lora_parameters == row.share


def test_every_rank_is_looked_at_whatever_qubits_says(tmp_path):
    named = big(tmp_path, qtha={"rank": 32, "qubits": 8, "param_budget": None})
    assert {row.rank for row in find_settings(named, 1.0)} >= {4, 12, 32}


def test_budgets_that_cannot_be_met(tmp_path):
    with pytest.raises(ValueError, match=r"qtha.param_budget: 0.0001 cannot be met.*What works"):
        find_settings(big(tmp_path), 0.0001)
    with pytest.raises(ValueError, match=r"qtha.param_budget: 24.* is not a share"):
        find_settings(big(tmp_path), 24.0)
    full = big(tmp_path, qtha={"mpo": "none", "param_budget": None})
    with pytest.raises(ValueError, match=r"qtha\.mpo: 'none' leaves out the tensor networks.*What works: .*layers: auto"):
        find_settings(full, 0.24)


def test_how_many_layers_share_is_planned(tmp_path, capsys):
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 6})
    keys = {"rank": 4, "mpo": "none", "quantum": "none", "share": {"layers": "auto", "inputs": True}, "param_budget": 0.5}
    plan = make_plan(run_on(tmp_path, config, qtha=keys), [])
    assert plan.parameters == sum(target.total for target in plan.targets) <= 0.5 * plan.lora_parameters
    assert re.match(r"A, B and circuits shared by \d neighbouring layers", plan.shared)


def test_a_model_that_cannot_run_without_weights_is_planned_without_memory(tmp_path):
    plan = make_plan(run_on(tmp_path, MORE["mixtral"]), [("a GPU", GIB)])
    assert plan.memory is None
    assert "RuntimeError" in plan.memory_unknown
    assert plan.fits is None
    assert plan.parameters > 0


def test_wrong_settings_are_refused_without_weights(tmp_path):
    run = run_on(tmp_path, CONFIGS["llama"], qtha={"rank": 4, "param_budget": 0.5, "target_modules": ["q_prj"]})
    with pytest.raises(ValueError, match=r"qtha.target_modules: 'q_prj'.*`q_proj`"):
        make_plan(run, [])


def test_a_base_that_cannot_be_read(tmp_path):
    run = write_run(tmp_path, CONFIGS["llama"])
    with pytest.raises(UnknownBase, match=r"base_model: .*empty.*What works"):
        read_config(write_run(tmp_path, CONFIGS["llama"], base_model=str(tmp_path / "empty")))
    with pytest.raises(UnknownBase, match=r"base_model: 'nobody/nothing'.*What works"):
        read_config(write_run(tmp_path, CONFIGS["llama"], base_model="nobody/nothing"))
    (tmp_path / "base" / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UnknownBase, match=r"no_such_model.*What works"):
        read_config(run)


@pytest.mark.parametrize("text", ["adapter: lora", "just text", "a: [1", "\x00"])
def test_no_configuration_of_ours(tmp_path, text):
    path = tmp_path / "run.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match="What works"):
        read_config(path)


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ({"layers": 3}, "A, B and circuits shared by 3 or 1 neighbouring layers"),
        (
            {"layers": 2, "inputs": True},
            "A, B and circuits shared by 2 neighbouring layers; A and circuits shared by modules",
        ),
    ],
    ids=str,
)
def test_shared_tensors_are_counted_once_and_said(share, words, tmp_path):
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 4})
    run = run_on(tmp_path, config, qtha={"rank": 4, "bond_dim": 3, "mid_dim": 6, "share": share})
    plan = make_plan(run, [])
    model = get_peft_model(AutoModelForCausalLM.from_config(config), run.adapter)
    assert plan.parameters == trainable(model) < sum(target.count * target.parameters for target in plan.targets)
    assert plan.memory.adapter == 4 * plan.parameters
    assert plan.shared.startswith(words)
    groups = {"q_proj", "o_proj", "gate_proj", "down_proj"} if share.get("inputs") else {t.name for t in plan.targets}
    assert plan.circuits_per_step == plan.tokens_per_step * sum(t.count for t in plan.targets if t.name in groups)
    out = console(200)
    with out.capture() as captured:
        show_plan(plan, out)
    assert words in " ".join(captured.get().split())
