"""The layer benchmark measures what it says (its figures are no test)."""

import json
import sys

import peft.tuners.lora
import pytest
import torch
from torch import nn

from axolotl_qtha.bench import layer
from axolotl_qtha.bench.bases import random_linear
from axolotl_qtha.timing import peak_bytes

CPU = torch.device("cpu")
WRAPPED = "base_model.model.proj.base_layer"


def test_circuit_keeps_the_same_memory_for_any_number_of_layers():
    kept = [row["kept_bytes"] for row in layer.circuit_rows(torch.device("cpu"), tokens=256, qubits=6)]
    assert len(kept) == 4
    assert set(kept) == {256 * 6 * 4}  # z in float32; the angles are a parameter


def test_peak_is_what_was_allocated_at_one_time():
    def run():
        first = torch.zeros(1000, 1000)
        del first
        torch.zeros(500, 1000)

    assert 4_000_000 <= peak_bytes(run, torch.device("cpu")) < 4_200_000


def test_variants_have_the_parameters_they_claim(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        ["layer", "--shapes", "96x128", "--ranks", "4", "--tokens", "8", "--repeats", "1", "--json", str(tmp_path / "o")],
    )
    layer.main()
    rows = {row["variant"]: row for row in json.loads((tmp_path / "o").read_text())["layers"]}
    assert rows["base"]["parameters"] == 0
    assert rows["lora"]["parameters"] == 4 * (96 + 128)
    assert rows["qtha, quantum: none"]["parameters"] <= 0.24 * rows["lora"]["parameters"]
    assert rows["lora"]["to_lora"] == 1.0
    assert [name for name, row in rows.items() if row.get("diagnostics", 0) > 0] == ["qtha", "qtha, quantum: none"]
    launched = {name: row["launches"]["operators"] for name, row in rows.items()}
    assert (launched["base"], launched["lora"]) == (2, 14)
    assert 2 < launched["qtha, quantum: none"] < launched["qtha"]
    assert all(row["launches"]["kernels"] is row["launches"]["gpu_seconds"] is None for row in rows.values())
    out = capsys.readouterr().out
    assert all(part in out for part in ("x LoRA", "launches (stand-in)", "ours as 1", "fused kernels is left out"))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_get_the_adapters_made_for_them(bits):
    base = random_linear(nn.Linear(64, 128, bias=False, device="meta"), bits, CPU, torch.float32)
    models = layer.variants(base, 4, bits)
    lora = {4: peft.tuners.lora.Linear4bit, 8: peft.tuners.lora.Linear8bitLt}[bits]
    assert type(models["lora"].base_model.model.proj) is lora
    assert {id(model.get_submodule(name)) for model, name in zip(models.values(), ["proj", *3 * [WRAPPED]], strict=True)} == {
        id(base)
    }
    (row, *_) = layer.layer_rows((64, 128), 4, 8, 1, CPU, bits)
    assert row["launches"]["operators"] >= 2
