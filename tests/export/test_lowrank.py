"""PEFT's files of an export: they load in plain PEFT and do the same; other servers' rules hold."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from axolotl_qtha.export import fit, lowrank
from axolotl_qtha.export.whole import Whole
from axolotl_qtha.trained.clients import VLLM_RANKS
from axolotl_qtha.trained.passes import adapters_of

from ..export_models import text_pass
from ..models import BASES, FILE, adapted, llama, logits, train

# What vLLM refuses (docs.vllm.ai, LoRA adapters; vllm/lora/peft_helper.py, lora_model.py).
VLLM_REFUSES = {"bias": "none", "use_dora": False, "lora_bias": False, "modules_to_save": None}


def exported(model, kind="linear"):
    """Return the LoRAs of a model's adapters, with the constants where they can be: a row of A, else a bias."""
    run = text_pass(model)
    if kind == "exact":
        return {name: fit.exact(adapter) for name, adapter in run.adapters.items()}
    moments, rows = fit.collect(run)
    constant = kind == "constants"
    return {
        name: fit.linear(adapter, moments[name], constant).low_rank(rows.get(name) if constant else None)
        for name, adapter in run.adapters.items()
    }


def write(model, layers, folder, **changes):
    folder.mkdir(exist_ok=True)
    settings = model.peft_config["default"]
    for key, value in changes.items():
        setattr(settings, key, value)
    return lowrank.write(layers, settings, Whole(), names(model), "GPT2" in type(model.get_base_model()).__name__, folder)


def read(folder):
    """Return the layers of a LoRA adapter as they act, by the name of the layer in the base model."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    scaling, tensors = settings["lora_alpha"] / settings["r"], load_file(folder / FILE)
    paths = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        path.removeprefix("base_model.model."): lowrank.LowRank(
            tensors[f"{path}.lora_A.weight"],
            tensors[f"{path}.lora_B.weight"] * scaling,
            bias * scaling if (bias := tensors.get(f"{path}.lora_B.bias")) is not None else None,
        )
        for path in paths
    }


def names(model):
    return [name for name, _ in model.get_base_model().named_modules()]


@pytest.mark.parametrize("kind", ["exact", "linear", "constants"])
@pytest.mark.parametrize("base", BASES)
def test_plain_peft_gives_the_same_logits(tmp_path, base, kind):
    made = BASES[base]()
    if base == "gpt2":  # norms with biases, so that some layers carry their constant in a row of A: ranks 4 and 5
        for norm in (module for module in made.modules() if isinstance(module, torch.nn.LayerNorm)):
            torch.nn.init.normal_(norm.bias)
    model = train(adapted(made, quantum="none" if kind == "exact" else "qtha"))
    layers = exported(model, kind)
    with fit.replaced(adapters_of(model), layers):
        expected = logits(model)
    write(model, layers, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(BASES[base]() if base != "gpt2" else model.unload(), tmp_path / "lora").eval()
    assert (logits(loaded) - expected).abs().max() <= 1e-5  # float32, alpha and its inverse multiplied in
    if kind == "exact":
        with loaded.disable_adapter():
            assert (logits(loaded) - expected).abs().max() > 1e-3
    assert loaded.peft_config["default"].lora_bias is (kind == "constants")


@pytest.mark.parametrize("alpha", [16.0, 0.5, 3.0])
def test_any_alpha(tmp_path, alpha):
    model = train(adapted(llama(), quantum="none", alpha=alpha))
    expected = logits(model)
    lora = write(model, exported(model, "exact"), tmp_path / "lora")
    assert isinstance(lora.lora_alpha, int)  # as LoraConfig says; other readers rely on it
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    assert (logits(loaded) - expected).abs().max() <= 1e-5


def test_reading_gives_what_was_written(tmp_path):
    model = train(adapted(llama()))
    layers = exported(model, "constants")
    layers["model.layers.0.mlp.down_proj"] = layers["model.layers.0.mlp.down_proj"].widened(7)
    write(model, layers, tmp_path / "lora")
    again = read(tmp_path / "lora")
    assert again.keys() == layers.keys()
    x = torch.randn(5, 89, generator=torch.Generator().manual_seed(0))
    for name, layer in layers.items():
        inputs = x[:, : layer.a.shape[1]]
        torch.testing.assert_close(again[name](inputs), layer(inputs), rtol=0, atol=1e-6)
        assert len(again[name].a) == 7


@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_what_vllm_and_llama_cpp_read(tmp_path, base):
    model = train(adapted(BASES[base]()))
    write(model, exported(model), tmp_path / "lora", base_model_name_or_path="org/model")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert {key: settings[key] for key in VLLM_REFUSES} == VLLM_REFUSES
    assert not settings["use_rslora"]
    assert settings["r"] <= max(VLLM_RANKS)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    assert settings["base_model_name_or_path"] == "org/model"  # by which llama.cpp's converter finds the base
    tensors = load_file(tmp_path / "lora" / FILE)
    modules = {name for name, _ in BASES[base]().named_modules()}
    for name, tensor in tensors.items():
        # vLLM splits the name so, llama.cpp's converter knows no other tensors
        module, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        assert module in modules
        assert module.rsplit(".", 1)[-1] in settings["target_modules"]
        assert matrix in ("A.weight", "B.weight")
        assert tensor.shape[0 if matrix[0] == "A" else 1] == settings["r"]  # one rank for all, from which both take the scale
    assert len(tensors) == 2 * len(exported(model))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": "all-linear"}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ({"target_modules": ["q_proj"]}, {"q_proj"}),
        ({"target_modules": r".*\.0\..*q_proj"}, {"model.layers.0.self_attn.q_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"model.layers.1.self_attn.q_proj"}),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, {"model.layers.1.self_attn.q_proj"}),
    ],
)
def test_targets_are_the_adapted_layers(tmp_path, settings, expected):
    model = train(adapted(llama(), quantum="none", **settings))
    expected_logits = logits(model)
    assert write(model, exported(model, "exact"), tmp_path / "lora").target_modules == expected
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    assert (logits(loaded) - expected_logits).abs().max() <= 1e-5
