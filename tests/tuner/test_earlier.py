"""Adapter files of earlier versions, with a tensor for each core and matrix, are read as if they were today's."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from axolotl_qtha.tuner.layer import adapted_layers

from ..models import VARIANTS, adapted, llama, logits, train

FILE = "adapter_model.safetensors"


def as_saved_earlier(folder, model, change=lambda tensors: None):
    """Write the folder's adapter file as earlier versions did."""
    tensors = {}
    for name, layer in adapted_layers(model).items():
        adapter = layer.qtha_adapter["default"]
        for key in adapter.table:
            value = adapter.stored(key).detach().flatten().clone()
            tensors[f"base_model.model.{name}.qtha_adapter.{key}"] = value
    change(tensors)
    save_file(tensors, folder / FILE)


@pytest.mark.parametrize("variant", [*VARIANTS, {"angle_scale": "learned"}, {"num_cores": 3, "core_gain": "none"}], ids=str)
def test_they_load_as_they_were(variant, tmp_path):
    model = train(adapted(llama(), **variant))
    model.save_pretrained(tmp_path)
    now = load_file(tmp_path / FILE)
    as_saved_earlier(tmp_path, model)
    assert load_file(tmp_path / FILE).keys() != now.keys()
    for assign in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=assign).eval()
        assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / FILE)
    assert again.keys() == now.keys()
    assert all(torch.equal(again[name], now[name]) for name in now)


NAME = "base_model.model.model.layers.1.mlp.up_proj.qtha_adapter."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NAME + "w_a"), r"layers\.1\.mlp\.up_proj.*earlier version does not fit: missing \['w_a'\]"),
        (lambda tensors: tensors.update({NAME + "z": torch.ones(2)}), r"unknown \['z'\]"),
        (lambda tensors: tensors.update({NAME + "mpo_a_1": torch.ones(2)}), r"mpo_a_1 of an earlier version has shape \(2,\)"),
        (lambda tensors: tensors.pop(NAME + "w_c"), r"does not fit this model"),
        (lambda tensors: tensors[NAME + "w_q"].fill_(torch.nan), r"up_proj.*fusion holds NaN"),
    ],
)
def test_damaged_ones_are_refused_and_nothing_is_loaded(change, message, tmp_path):
    model = train(adapted(llama()))
    model.save_pretrained(tmp_path)
    as_saved_earlier(tmp_path, model, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(llama(), tmp_path)
