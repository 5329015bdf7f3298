"""What Axolotl is told to quantise, compared with what it does for LoRA, and the checks of the model that comes back."""

from types import SimpleNamespace

import pytest
import torch
from axolotl.loaders.model import ModelLoader
from axolotl.utils.dict import DictDefault
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from axolotl_qtha.settings import quantization

from ..e2e.ranks import ZERO
from ..models import llama, qwen2
from ..quantised import NF4, quantised

ADAPTERS = {"load_in_4bit": "qlora", "load_in_8bit": "lora"}  # whose settings Axolotl makes itself
SHARED = {
    "alone": {},
    "zero2": {"deepspeed": str(ZERO / "zero2.json")},
    "zero3": {"deepspeed": str(ZERO / "zero3.json")},
    "fsdp2": {"fsdp_config": {"version": 2}},
}


def ours(**settings):
    """Return what `from_pretrained` gets with `adapter: qtha`."""
    data = {"adapter": "qtha", **settings}
    quantization.connect(data)
    cfg = DictDefault(data)
    quantization.complete(cfg)
    return dict(cfg.overrides_of_model_kwargs["quantization_config"])


def axolotls(**settings):
    """Return what `from_pretrained` gets from Axolotl itself with LoRA."""
    loader = object.__new__(ModelLoader)
    loader.cfg = DictDefault(settings)
    loader.model_kwargs, loader.model_config = {}, SimpleNamespace()
    loader._set_quantization_config()
    return loader.model_kwargs["quantization_config"]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["llama", "jamba", "qwen2_moe", "nemotron_h", "falcon_h1"])
@pytest.mark.parametrize("key", ADAPTERS)
def test_settings_are_axolotls_own(key, model, dtype, shared):
    cfg = {key: True, "model_config_type": model, "torch_dtype": dtype, **SHARED[shared]}
    expected = axolotls(adapter=ADAPTERS[key], **cfg).to_dict()
    if key == "load_in_4bit":
        small = model in ("llama", "falcon_h1") or shared != "alone"
        assert expected["bnb_4bit_quant_storage"] == ("bfloat16" if small else "float32")
        if shared in ("zero3", "fsdp2"):  # Axolotl's bfloat16 fits a bfloat16 base alone
            expected["bnb_4bit_quant_storage"] = str(dtype).removeprefix("torch.")
    assert BitsAndBytesConfig(**ours(**cfg)).to_dict() == expected
    skipped = {("jamba", "load_in_8bit"): ["mamba"], ("falcon_h1", key): ["out_proj"]}.get((model, key))
    assert expected["llm_int8_skip_modules"] == skipped


@pytest.mark.parametrize(
    "changes",
    [
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        {"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"},
        {"llm_int8_skip_modules": ["lm_head", "k_proj"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("model", ["llama", "jamba", "falcon_h1"])
def test_the_yaml_comes_before_what_is_known_of_the_model(model, changes):
    cfg = {"load_in_4bit": True, "model_config_type": model, "torch_dtype": torch.float32, "bnb_config_kwargs": changes}
    expected = axolotls(adapter="qlora", **cfg).to_dict()
    assert BitsAndBytesConfig(**ours(**cfg)).to_dict() == expected
    assert changes.items() <= expected.items()


@pytest.mark.parametrize("place", ["model_kwargs", "overrides_of_model_kwargs"])
def test_other_model_kwargs_stay(place):
    given = {"trust_remote_code": False, "quantization_config": {"llm_int8_skip_modules": ["k_proj"]}}
    data = {"load_in_8bit": True, place: given}
    quantization.connect(data)
    assert data[place]["trust_remote_code"] is False
    expected = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["k_proj"]}
    assert data[place]["quantization_config"] == expected
    assert given == {"trust_remote_code": False, "quantization_config": {"llm_int8_skip_modules": ["k_proj"]}}
    assert set(data) == {"load_in_8bit", place}


@pytest.mark.parametrize("keys", [{}, {"load_in_4bit": False}, {"load_in_8bit": None, "bnb_config_kwargs": {}}])
def test_nothing_is_asked_for_and_nothing_told(keys):
    data = dict(keys)
    quantization.connect(data)
    assert data == keys
    cfg = DictDefault(data)
    quantization.complete(cfg)
    assert cfg == DictDefault(keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


@pytest.mark.parametrize("key", ADAPTERS)
def test_a_quantised_checkpoint_keeps_its_own_settings(folder, key, tmp_path):
    quantised(folder, "nf4").save_pretrained(tmp_path)
    keys = {key: True, "base_model": str(tmp_path)}
    data = dict(keys)
    quantization.connect(data)
    assert data == keys
    with pytest.raises(ValueError, match=r"bnb_config_kwargs.*'fp4'.*has no effect on base_model.*What works: leave it out"):
        quantization.connect({**keys, "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}})
    data["base_model"] = str(folder)
    quantization.connect(data)
    assert data["overrides_of_model_kwargs"]["quantization_config"][key] is True


# ---- the model that comes back ----


def test_check_base_counts_what_was_loaded(folder):
    four, eight, full = quantised(folder, "nf4"), quantised(folder, "int8"), llama()
    assert quantization.check_base(DictDefault(load_in_4bit=True), four) == 14
    assert quantization.check_base(DictDefault(load_in_8bit=True), eight) == 14
    assert quantization.check_base(DictDefault(), quantised(folder, "torchao 2")) == 14
    assert quantization.check_base(DictDefault(), full) == 0
    for key, wrong in (("load_in_4bit", eight), ("load_in_4bit", full), ("load_in_8bit", four), ("load_in_8bit", full)):
        with pytest.raises(ValueError, match=rf"{key}: true, but no layer of the base.*What works:.*`{key}: false`"):
            quantization.check_base(DictDefault({key: True}), wrong)


@pytest.mark.parametrize("key", ADAPTERS)
def test_check_base_refuses_a_head_that_is_the_embedding(key, tmp_path):
    model = qwen2()
    model.save_pretrained(tmp_path)
    settings = {"quant_method": "bitsandbytes", key: True, "llm_int8_skip_modules": ["k_proj"]}
    tied = type(model).from_pretrained(tmp_path, quantization_config=settings)
    with pytest.raises(
        ValueError, match=r"lm_head: its weight is the embed.*is \['k_proj'\].*What works:.*\['k_proj', 'lm_head'\]"
    ):
        quantization.check_base(DictDefault({key: True}), tied)
    settings["llm_int8_skip_modules"] = ["k_proj", "lm_head"]
    whole = type(model).from_pretrained(tmp_path, quantization_config=settings)
    assert quantization.check_base(DictDefault({key: True}), whole) == 12


def without(folder, names):
    """Return a 4-bit Llama with these modules in full precision."""
    return LlamaForCausalLM.from_pretrained(folder, quantization_config={**NF4, "llm_int8_skip_modules": names})


def targets(model, *leaves):
    return {name: module for name, module in model.named_modules() if name.endswith(leaves)}


def test_check_targets_names_layers_left_in_full_precision(folder):
    model = without(folder, ["lm_head", "q_proj", "k_proj"])
    cfg = DictDefault(load_in_4bit=True)
    assert quantization.check_targets(cfg, targets(model, "q_proj", "v_proj"), model) == [
        f"model.layers.{k}.self_attn.q_proj" for k in range(2)
    ]
    assert quantization.check_targets(DictDefault(), targets(model, "q_proj", "v_proj"), model) == []
    with pytest.raises(ValueError, match=r"all 4 adapted layers stayed.*llm_int8_skip_modules is \['lm_.*What works: fewer"):
        quantization.check_targets(cfg, targets(model, "q_proj", "k_proj"), model)


def test_check_targets_refuses_layers_left_in_full_precision_unnamed(folder):
    model = quantised(folder, "nf4")  # transformers leaves the head out by itself
    with pytest.raises(ValueError, match=r"1 of 3 adapted layers.*\['lm_head'\].*What works:.*exclude_modules: \[lm_head\]"):
        quantization.check_targets(DictDefault(load_in_4bit=True), targets(model, "up_proj", "lm_head"), model)


def test_check_targets_knows_what_a_quantised_checkpoint_left_out(folder, tmp_path):
    without(folder, ["lm_head", "layers.1.self_attn.q_proj"]).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    layers = targets(model, "q_proj")
    assert quantization.check_targets(DictDefault(load_in_4bit=True), layers, model) == ["model.layers.1.self_attn.q_proj"]
