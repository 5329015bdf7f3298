"""Saving, loading and switching adapters, and the damaged files that are refused."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from axolotl_qtha.errors import IncompleteAdapter

from ..models import BASES, FILE, VARIANTS, adapted, adapters, config, gpt2, llama, logits, qwen2, train, trainable

# ---- saving and loading ----


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", [*VARIANTS, {"angle_scale": "learned"}, {"num_cores": 3, "core_gain": "none"}], ids=str)
def test_what_is_saved_is_what_comes_back(base, variant, tmp_path):
    model = train(adapted(BASES[base](), **variant))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BASES[base](), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not trainable(loaded)


def test_a_network_of_sines_comes_back(tmp_path):
    model = train(adapted(llama(), quantum="sine"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(model))


def test_auto_model_loads_base_and_adapter(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    model = train(adapted(base))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), logits(model))


def test_a_loaded_adapter_trains_on_as_if_never_saved(tmp_path):
    model = train(adapted(llama()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(train(loaded)), logits(train(model)))


def test_the_file_holds_the_adapter_and_nothing_else(tmp_path):
    model = train(adapted(llama(), target_modules=["q_proj", "down_proj"], angle_scale="learned"))
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    saved = load_file(tmp_path / FILE)
    parts = ("cores", "fusion", "angles", "scale")
    layers = [f"model.layers.{k}.{module}" for k in range(2) for module in ("self_attn.q_proj", "mlp.down_proj")]
    assert saved.keys() == {f"base_model.model.{layer}.qtha_adapter.{part}" for layer in layers for part in parts}
    for name, parameter in trainable(model).items():
        assert torch.equal(saved[name.replace(".default.", ".")], parameter)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "QTHA"
    assert (settings["rank"], settings["bond_dim"], settings["mid_dim"]) == (4, 4, 8)
    assert not list((tmp_path).glob("*.tmp"))


def damaged(folder, change):
    """Save an adapter of a Llama, change its tensors, and return the folder."""
    train(adapted(llama())).save_pretrained(folder)
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)
    return folder


def load(folder):
    return PeftModel.from_pretrained(llama(), folder)


NAME = "base_model.model.model.layers.1.mlp.up_proj.qtha_adapter.cores"
LAYER = "base_model.model.model.layers.0.self_attn.k_proj."
CHANGES = {
    "one tensor missing": (lambda tensors: tensors.pop(NAME), r"cores"),
    "one layer missing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(LAYER)],
        r"3 tensors are missing.*layers\.0\.self_attn\.k_proj",
    ),
    "one tensor more": (lambda tensors: tensors.update({NAME + "z": torch.ones(3)}), r"coresz"),
    "one layer more": (lambda tensors: tensors.update({NAME.replace("layers.1", "layers.2"): torch.ones(3)}), r"layers\.2"),
    "NaN": (lambda tensors: tensors[NAME].view(-1)[5:6].fill_(torch.nan), r"up_proj.*cores holds NaN or infinite"),
    "infinity": (lambda tensors: tensors[NAME].view(-1)[5:6].fill_(torch.inf), r"up_proj.*cores holds NaN or infinite"),
    "another shape": (
        lambda tensors: tensors.update({NAME: torch.ones(5, 8)}),
        r"cores has shape \(5, 8\).*needs \(\d+,\)",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_damaged_tensors_are_refused(kind, tmp_path):
    change, message = CHANGES[kind]
    with pytest.raises(ValueError, match=rf"(?s){message}.*What works") as caught:
        load(damaged(tmp_path, change))
    assert "default" in str(caught.value)  # the adapter's name


def test_an_undamaged_file_is_not_refused(tmp_path):
    load(damaged(tmp_path, lambda tensors: None))


def test_a_truncated_file_is_refused(tmp_path):
    train(adapted(llama())).save_pretrained(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        (tmp_path / FILE).write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"is corrupt or truncated.*What works"):
            load(tmp_path)


def test_the_tensors_of_lora_are_refused(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    train(adapted(llama())).save_pretrained(tmp_path / "qtha")
    shutil.copy(tmp_path / "lora" / FILE, tmp_path / "qtha" / FILE)
    with pytest.raises(ValueError, match=r"holds no QTHA adapter.*lora_A.*What works"):
        load(tmp_path / "qtha")


def test_a_file_of_another_base_model_is_refused(tmp_path):
    train(adapted(qwen2(), target_modules=["q_proj"])).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="What works"):
        PeftModel.from_pretrained(llama(layers=3), tmp_path / "two")
    with pytest.raises(ValueError, match=r"target_modules.*What works"):
        PeftModel.from_pretrained(gpt2(), tmp_path / "two")


def test_nan_is_not_saved_and_the_earlier_file_stays(tmp_path):
    model = train(adapted(llama()))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        adapters(model)["model.layers.1.mlp.up_proj"].stored("w_b")[2, 1] = torch.nan
    with pytest.raises(IncompleteAdapter, match=r"layers\.1\.mlp\.up_proj.*cores holds NaN or infinite.*not saved.*What works"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- several adapters ----


def test_two_adapters_give_their_own_outputs(tmp_path):
    first = train(adapted(llama(), seed=1))
    second = train(adapted(llama(), seed=2, rank=3, quantum="silu", target_modules=["q_proj", "up_proj"]))
    expected = {"first": logits(first), "second": logits(second)}
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")

    model = PeftModel.from_pretrained(llama(), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
    model.save_pretrained(tmp_path / "both")
    for name, wanted in expected.items():
        folder = tmp_path / "both" / name
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder).eval()), wanted)

    model.set_adapter("second")
    model.delete_adapter("first")
    assert not any("first" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), expected["second"])


def test_adding_an_adapter_leaves_the_first_alone():
    model = train(adapted(llama()))
    expected = logits(model)
    model.add_adapter("second", config(seed=3, target_modules=["q_proj", "up_proj"]))
    assert torch.equal(logits(model), expected)
    assert not any(".second." in name for name in trainable(model))
    model.set_adapter("second")
    assert trainable(model)
    assert all(".second." in name for name in trainable(model))
    assert torch.equal(logits(model), logits(llama()))
    train(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
