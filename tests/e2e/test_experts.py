"""`quantize_moe_experts`: experts are quantised and frozen, adapters sit on attention and shared modules."""

import shutil
from collections import Counter

import axolotl.monkeypatch.moe_quant as moe
import pytest
import torch
import transformers.core_model_loading
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from safetensors.torch import load_file
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from axolotl_qtha.settings import quantization

from .commands import QUICKSTART, losses, train_here, write_config

pytestmark = pytest.mark.slow

LAYERS = 2
BLOCK = {"rank": 4, "alpha": 8, "param_budget": 1.0, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small base with experts and a shared one, and the quickstart's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    for file in QUICKSTART.joinpath("base").glob("tokenizer*"):
        shutil.copy(file, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    heads = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = Qwen2MoeConfig(vocab_size=len(tokenizer), **sizes, **heads, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    return folder


def config(folder, base, **changes):
    settings = {
        "qtha": BLOCK,
        "max_steps": 3,
        "eval_steps": None,
        "save_steps": 3,
        "load_in_4bit": True,
        "quantize_moe_experts": True,
    }
    return write_config(folder, base_model=str(base), **{**settings, **changes})


def check(folder, base, model, trainer):
    """The experts are in 4 bits, as they were, and without gradient; everything else that is linear was trained."""
    parametrized = {name: module for name, module in model.named_modules() if is_parametrized(module)}
    assert len(parametrized) == LAYERS
    before = {name: weight for name, weight in load_file(base / "model.safetensors").items() if ".experts." in name}
    assert before
    for module in parametrized.values():
        for parametrization in module.parametrizations.values():
            assert parametrization.original.dtype == torch.uint8
            assert not parametrization.original.requires_grad
    adapted = Counter(name.rsplit(".", 1)[-1] for name, m in model.named_modules() if type(m).__name__ == "QTHALinear")
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "shared_expert_gate")
    assert adapted == dict.fromkeys(names, LAYERS)
    assert all("qtha_adapter" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert len(losses(trainer)) == 3
    saved = load_file(folder / "out" / "adapter_model.safetensors")
    assert saved
    assert not any("experts." in name.replace("shared_expert", "") for name in saved)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path, base):
    model, _, trainer = train_here(config(tmp_path, base, bf16=True))
    check(tmp_path, base, model, trainer)


def test_all_but_the_gpu(tmp_path, base, monkeypatch):
    """As on a GPU, but that the experts are quantised on the CPU, which Axolotl leaves out."""
    plain = transformers.core_model_loading.set_param_for_module

    def quantise_on_load(cfg):
        moe._moe_load_state |= {"count": 0, "mode": "4bit"}

        def set_param(model, target_name, param_value, *args, **kwargs):
            plain(model, target_name, param_value, *args, **kwargs)
            if param_value.ndim >= 3 and "expert" in target_name:
                owner, _, leaf = target_name.rpartition(".")
                replace_parameter_4bit(model.get_submodule(owner), leaf, compress_statistics=True, quant_type="nf4")
                moe._moe_load_state["count"] += 1

        monkeypatch.setattr(transformers.core_model_loading, "set_param_for_module", set_param)

    monkeypatch.setattr(moe, "patch_moe_quantization_on_load", quantise_on_load)
    monkeypatch.setattr(quantization, "check_experts_device", lambda cfg: None)
    model, _, trainer = train_here(config(tmp_path, base, device_map="cpu"))
    check(tmp_path, base, model, trainer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_on_a_cpu_it_is_refused_before_the_base_is_loaded(tmp_path, base):
    with pytest.raises(ValueError, match=r"quantize_moe_experts: true needs an NVIDIA GPU.*What works:"):
        train_here(config(tmp_path, base))


def test_a_base_without_experts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "check_experts_device", lambda cfg: None)
    with pytest.raises(ValueError, match=r"quantize_moe_experts: true, but no expert.*is quantised.*What works:"):
        train_here(config(tmp_path, QUICKSTART / "base", device_map="cpu"))
