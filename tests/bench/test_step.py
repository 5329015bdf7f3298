"""The benchmark of a training step measures what it says (its figures are no test)."""

import json
import sys

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen2Config

from axolotl_qtha.bench import step
from axolotl_qtha.plan import count_lora_parameters

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


def test_both_adapters_train_on_the_same_unchanged_base():
    base = step.random_base(LlamaConfig(**SIZES), 4, CPU)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ids = torch.randint(300, (2, 16))
    for config in step.adapters(4, "qtha").values():
        run = step.Run(base, config, ids, checkpointing=False)
        start = [parameter.clone() for parameter in run.trained]
        first = run.model(input_ids=ids, labels=ids).loss.item()
        for _ in range(5):
            run.step()
        assert run.model(input_ids=ids, labels=ids).loss.item() < first
        assert any(not torch.equal(a, b) for a, b in zip(start, run.trained, strict=True))
        run.close()
    after = base.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():  # as bytes: 4-bit numbers stored as float32 may look like NaN
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


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
    assert lora["peak_to_qlora"] == lora["step_to_qlora"] == lora["time_to_qlora"] == 1
    assert 0 < qtha["step_bytes"] < qtha["peak_bytes"]
    assert "x QLoRA" in capsys.readouterr().out


def test_stored_bytes_count_four_bit_weights_as_four_bits():
    full, small = (step.stored_bytes(step.random_base(LlamaConfig(**SIZES), bits, CPU)) for bits in (16, 4))
    entries = sum(a * b for a, b in LAYERS)
    assert full - small == pytest.approx(
        entries * (4 - 0.5 - 1 / 64 - 4 / 64 / 256), rel=1e-3
    )  # float32 to NF4, scales in 8 bits
