"""The benchmark of a training step measures what it says (its figures are no test)."""

import json
import sys

import bitsandbytes as bnb
import peft.tuners.lora
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from axolotl_qtha import QTHAConfig
from axolotl_qtha.bench import step
from axolotl_qtha.timing import peak_bytes
from axolotl_qtha.tuner.sizes import count_lora_parameters, count_parameters, resolve
from axolotl_qtha.tuner.targets import select_targets

SIZES = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LAYERS = 2 * [(256, 256), (256, 128), (256, 128), (256, 256), (256, 512), (256, 512), (512, 256)]
KINDS = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt, 16: nn.Linear}
LORA = {4: peft.tuners.lora.Linear4bit, 8: peft.tuners.lora.Linear8bitLt, 16: peft.tuners.lora.Linear}
CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_base_is_quantised_and_runs(kind, bits):
    base = step.random_base(kind(**SIZES), bits, CPU)
    linear = [module for module in base.modules() if isinstance(module, nn.Linear) and module is not base.lm_head]
    assert len(linear) == 14
    assert all(type(module) is KINDS[bits] for module in linear)
    assert not any(parameter.device.type == "meta" or parameter.requires_grad for parameter in base.parameters())
    loss = base(input_ids=torch.ones(1, 5, dtype=torch.long), labels=torch.ones(1, 5, dtype=torch.long)).loss
    assert torch.isfinite(loss)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_lora_is_the_layer_that_peft_makes_for_a_loaded_base(bits):
    base = step.random_base(LlamaConfig(**SIZES), bits, CPU)
    run = step.AdaptedBase(base, step.adapters(4, "qtha")["qlora"], torch.ones(1, 4, dtype=int))
    assert {type(layer) for layer in run.layers.values()} == {LORA[bits]}
    assert base.is_loaded_in_4bit == (bits == 4)


def test_smollm2_is_of_its_published_size_and_has_tied_embeddings():
    config = step.SHAPES["smollm2-135m"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    small = LlamaConfig(**SIZES, tie_word_embeddings=config.tie_word_embeddings)
    base = step.random_base(small, 16, CPU)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    run = step.AdaptedBase(base, step.adapters(4, "qtha")["qlora"], torch.ones(1, 4, dtype=int))
    assert len(run.layers) == len(LAYERS)
    run.attach()
    assert torch.isfinite(run.loss())


def test_launches_are_those_of_each_layer_and_leave_no_gradients():
    ids, found = torch.ones(1, 4, dtype=int), []
    for layers in (1, 3):
        base = step.random_base(LlamaConfig(**{**SIZES, "num_hidden_layers": layers}), 16, CPU)
        base.enable_input_require_grads()
        run = step.AdaptedBase(base, step.adapters(4, "none")["qtha, quantum: none"], ids)
        frozen = step.accumulating(base, ids)
        run.attach()
        found.append(run.launches(frozen))
        assert all(parameter.grad is None for parameter in run.trained)
    assert found[0].operators == found[1].operators > 4


def test_both_adapters_train_on_the_same_unchanged_base():
    base = step.random_base(LlamaConfig(**SIZES), 4, CPU)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ids = torch.randint(300, (2, 16))
    runs = [step.AdaptedBase(base, config, ids) for config in step.adapters(4, "qtha").values()]
    shared = [{name: layer.get_base_layer() for name, layer in run.layers.items()} for run in runs]
    assert len(shared[0]) == len(LAYERS)
    assert shared[0] == shared[1]  # modules are equal only if they are the same object
    assert all(type(layer) is bnb.nn.Linear4bit and layer.weight.quant_state.nested for layer in shared[0].values())
    starts = [[parameter.clone() for parameter in run.trained] for run in runs]
    losses = [[], []]
    for _ in range(5):
        for run, values in zip(runs, losses, strict=True):
            run.attach()
            assert all(base.get_submodule(name) is layer for name, layer in run.layers.items())
            values.append(run.loss().item())
            run.step()
            run.detach()
    assert losses[0][0] == losses[1][0]  # new adapters change nothing: this is the base's loss
    for run, start, values in zip(runs, starts, losses, strict=True):
        assert values[-1] < values[0]
        assert any(not torch.equal(a, b) for a, b in zip(start, run.trained, strict=True))
    after = base.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():  # as bytes: 4-bit numbers stored as float32 may look like NaN
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_what_is_kept_is_the_adapter_and_its_two_moments():
    run = step.AdaptedBase(
        step.random_base(LlamaConfig(**SIZES), 4, CPU), step.adapters(4, "qtha")["qlora"], torch.ones(1, 4, dtype=int)
    )
    entries = count_lora_parameters(4, LAYERS)
    assert run.kept_bytes() == 4 * entries
    run.attach()
    run.step()
    assert run.kept_bytes() == 4 * 3 * entries + 4 * len(run.trained)  # AdamW counts its steps for each tensor


def test_peak_is_of_a_step_that_already_has_the_moments():
    base, ids = step.random_base(LlamaConfig(**SIZES), 4, CPU), torch.randint(300, (2, 16))
    row = step.measure(base, 4, "none", ids, False, repeats=1)[0]
    base.enable_input_require_grads()
    run = step.AdaptedBase(base, step.adapters(4, "none")["qlora"], ids)
    run.attach()
    run.step()
    assert row["step_bytes"] == run.kept_bytes() + peak_bytes(run.step, CPU)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_beside_itself_needs_the_same_memory(monkeypatch, checkpointing):
    names = ("qlora", "qlora again")
    same = {name: step.adapters(4, "qtha")["qlora"] for name in names}
    monkeypatch.setattr(step, "adapters", lambda *_: same)
    base = step.random_base(LlamaConfig(**SIZES), 4, CPU)
    rows = step.measure(base, 4, "qtha", torch.randint(300, (2, 64)), checkpointing, repeats=1)
    assert [row["adapter"] for row in rows] == list(names)
    assert rows[0]["peak_bytes"] == rows[1]["peak_bytes"]


@pytest.mark.slow
def test_checkpointing_keeps_less():
    base = step.random_base(LlamaConfig(**SIZES), 4, CPU)
    ids = torch.randint(300, (2, 64))
    off, on = (step.measure(base, 4, "none", ids, checkpointing, repeats=1) for checkpointing in (False, True))
    assert all(b["peak_bytes"] < a["peak_bytes"] for a, b in zip(off, on, strict=True))
    assert not base.is_gradient_checkpointing


@pytest.mark.slow
def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step.SHAPES, "small", LlamaConfig(**SIZES))
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["step", "--ranks", "8", "--tokens", "16", "--repeats", "1", "--json", str(out)])
    step.main()
    rows = json.loads(out.read_text())
    assert [(row["adapter"], row["checkpointing"]) for row in rows] == [
        ("qlora", False),
        ("qtha, quantum: qtha", False),
        ("qlora", True),
        ("qtha, quantum: qtha", True),
    ]
    lora, qtha = rows[:2]
    assert lora["parameters"] == count_lora_parameters(8, LAYERS)
    assert 0 < qtha["parameters"] <= 0.24 * lora["parameters"]
    config = QTHAConfig(rank=8)
    layers = list(select_targets(config, LlamaForCausalLM(LlamaConfig(**SIZES))).values())
    assert qtha["parameters"] == count_parameters(resolve(config, layers), layers)
    assert lora["peak_to_qlora"] == lora["step_to_qlora"] == lora["time_to_qlora"] == 1
    assert qtha["peak_to_qlora"] == qtha["peak_bytes"] / lora["peak_bytes"]
    assert 0 < qtha["step_bytes"] < qtha["peak_bytes"]
    assert (
        lora["launches"]["operators"] == 13
    )  # 12 as without quantisation, and the copy that PEFT makes of a 4-bit layer's result
    assert qtha["launches"]["custom_as_one"] > 2
    out = capsys.readouterr().out
    assert all(part in out for part in ("x QLoRA", "launches", "(stand-in)", "ours as 1", "fused kernels is left out"))


@pytest.mark.parametrize("flag", [True, False])
def test_checkpointing_can_be_chosen(monkeypatch, tmp_path, flag):
    monkeypatch.setitem(step.SHAPES, "small", LlamaConfig(**SIZES))
    out = tmp_path / "rows.json"
    choice = "--checkpointing" if flag else "--no-checkpointing"
    arguments = ["--rank", "4", "--quantum", "none", "--tokens", "8", "--repeats", "1", choice, "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["step", *arguments])
    step.main()
    assert [(row["adapter"], row["checkpointing"]) for row in json.loads(out.read_text())] == [
        ("qlora", flag),
        ("qtha, quantum: none", flag),
    ]


def test_stored_bytes_count_four_bit_weights_as_four_bits():
    full, small = (step.stored_bytes(step.random_base(LlamaConfig(**SIZES), bits, CPU)) for bits in (16, 4))
    entries = sum(a * b for a, b in LAYERS)
    assert full - small == pytest.approx(
        entries * (4 - 0.5 - 1 / 64 - 4 / 64 / 256), rel=1e-3
    )  # float32 to NF4, scales in 8 bits
