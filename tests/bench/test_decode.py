"""The benchmark of decoding measures what it says (its figures are no test)."""

import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_qtha.bench import decode
from axolotl_qtha.tuner.adapter import QTHAAdapter

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=192,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    max_position_embeddings=64,
)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def test_variants_share_the_base_and_change_its_output():
    base = llama()
    models = decode.variants(base, 4, "qtha")
    weights = {parameter.data_ptr() for parameter in base.parameters()}
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        for name, model in models.items():
            frozen = [parameter for parameter in model.parameters() if name == "base" or not parameter.requires_grad]
            assert {parameter.data_ptr() for parameter in frozen} == weights
            assert not model.training
            changed = (model(input_ids=ids).logits - expected).abs().max()
            assert changed == 0 if name == "base" else changed > 1e-3
    assert models[decode.CACHED] is models[decode.UNCACHED]


def test_uncached_folds_for_each_token(monkeypatch):
    model = decode.variants(llama(), 4, "qtha")[decode.CACHED]
    made, fold = [], QTHAAdapter._fold
    monkeypatch.setattr(QTHAAdapter, "_fold", lambda self, *args: made.append(self) or fold(self, *args))
    ids = torch.ones(2, 4, dtype=torch.long)
    decode.decoding(decode.CACHED, model, ids, 5)()
    assert len(made) == 14
    decode.decoding(decode.UNCACHED, model, ids, 5)()
    assert len(made) == 14 + 5 * 14


@pytest.mark.parametrize("quantum", ["qtha", "none"])
def test_decodes_a_bfloat16_base_as_on_a_gpu(quantum):
    rows = {row["variant"]: row for row in decode.measure(llama().bfloat16(), 4, quantum, batch=2, tokens=3, turns=1)}
    assert list(rows) == ["base", decode.LORA, decode.CACHED, decode.UNCACHED]
    assert {row["quantum"] for row in rows.values()} == {quantum}
    assert rows[decode.CACHED]["logit_difference"] <= 2**-7  # one step of bfloat16


def test_a_base_is_loaded_as_it_was_saved_on_a_cpu(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path)
    base = decode.loaded(str(tmp_path), torch.device("cpu"))
    assert base.dtype == torch.bfloat16
    assert not base.training


def test_prints_and_writes_all_variants(monkeypatch, tmp_path, capsys):
    llama().save_pretrained(tmp_path / "base")
    options = {"--model": tmp_path / "base", "--tokens": 3, "--batch": 2, "--turns": 2, "--json": tmp_path / "rows.json"}
    monkeypatch.setattr(sys, "argv", ["decode", *[str(part) for pair in options.items() for part in pair]])
    decode.main()
    rows = {row["variant"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["base", decode.LORA, decode.CACHED, decode.UNCACHED]
    assert rows[decode.LORA]["to_lora"] == 1
    assert rows["base"]["parameters"] == 0
    assert rows[decode.CACHED]["parameters"] == rows[decode.UNCACHED]["parameters"] < 0.24 * rows[decode.LORA]["parameters"]
    assert rows[decode.CACHED]["logit_difference"] <= 1e-5
    out = capsys.readouterr().out
    assert all(name in out for name in rows)
    assert "x LoRA" in out
