"""A plugin of pytest that puts QTHA into PEFT's lists of test cases, in the place of PEFT's own methods.

`test_peft_suite.py` runs it in a process of its own inside a checkout of PEFT, whose tests are a package `tests` as ours are.
The cases are PEFT's: the ones it has for LoRA on linear layers, and its small decoders, made here from configurations since PEFT
gets them from the Hub.
"""

import importlib.util
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.layer import QTHALayer

if importlib.util.find_spec("diffusers") is None:  # PEFT's tests import one name of it, for cases that are not run here
    sys.modules["diffusers"] = types.ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]


class Circuit(QTHAConfig):
    """QTHA as PEFT's cases make a configuration: of sizes for layers of 2 to 100, and with PEFT's `init_weights=False`."""

    settings: ClassVar[dict[str, Any]] = {"rank": 2, "alpha": 2, "bond_dim": 2, "mid_dim": 4}

    def __new__(cls, *args: Any, init_weights: bool = True, **kwargs: Any) -> Any:
        """Leave the name out that QTHAConfig does not know."""
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, init_weights: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **{**self.settings, **kwargs})
        self.no_op = init_weights  # PEFT: whether a new adapter changes nothing


class Linear(Circuit):
    """The same without a circuit, which can be merged."""

    settings: ClassVar[dict[str, Any]] = {**Circuit.settings, "quantum": "none"}


CLASSES = (Circuit, Linear)
_update_layer = QTHALayer.update_layer


def _update_and_start(self: QTHALayer, adapter_name: str, config: QTHAConfig, *args: Any, **kwargs: Any) -> None:
    _update_layer(self, adapter_name, config, *args, **kwargs)
    adapter: Any = self.qtha_adapter[adapter_name]
    if not getattr(config, "no_op", True) and adapter.cores.device.type != "meta":
        with torch.no_grad():
            adapter.stored(f"mpo_b_{config.num_cores - 1}").normal_(std=0.3)


QTHALayer.update_layer = _update_and_start  # type: ignore[method-assign]

# ---- the cases ----

SMALL = {"vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
MLP = {**SMALL, "intermediate_size": 64}
GPT = {"vocab_size": 1000, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
ENDS = {"bos_token_id": 0, "eos_token_id": 999, "pad_token_id": 998}  # none of them in the inputs: a padding token is all zero
DECODERS = {
    "OPT": OPTConfig(**SMALL, **ENDS, ffn_dim=64, word_embed_proj_dim=32),
    "GPT2": GPT2Config(**GPT, **ENDS),
    "GPTJ": GPTJConfig(**GPT, **ENDS, rotary_dim=4),
    "Llama": LlamaConfig(**MLP, **ENDS),
    "qwen2": Qwen2Config(**MLP, **ENDS, num_key_value_heads=2),
    "Gemma3": Gemma3TextConfig(**MLP, **ENDS, num_key_value_heads=2, head_dim=8),
}
_folder = Path(tempfile.mkdtemp(prefix="peft-suite-"))


def _decoders(theirs: list[str]) -> list[Any]:
    """Return folders of small models, by the names of PEFT's."""
    made = []
    for name in (theirs_name.split("/")[-1] for theirs_name in theirs):
        kind = next(kind for kind in DECODERS if kind.lower() in name.lower())
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(DECODERS[kind]).save_pretrained(_folder / name)
        made.append(pytest.param(str(_folder / name), id=name))
    return made


def _of_lora(theirs: list[Any]) -> list[Any]:
    """Return PEFT's cases of LoRA that name linear layers and nothing of LoRA's own, for each kind of QTHA."""
    taken = [
        row
        for row in theirs
        if row[2] is LoraConfig and set(row[3]) <= {"target_modules", "modules_to_save"} and _on_linear(row[1], row[3])
    ]
    return [
        pytest.param(name, model, cls, kwargs, id=f"{name} as {cls.__name__}")
        for name, model, _, kwargs in taken
        for cls in CLASSES
    ]


def _on_linear(model: str, kwargs: dict[str, Any]) -> bool:
    """Return whether a case is on linear layers of transformers or PyTorch alone; `conv1d` is GPT-2's in one model."""
    names = kwargs["target_modules"]
    names = {names} if isinstance(names, str) else set(names)
    return names <= {"lin0", "lin1"} if model != "EmbConv1D" else names == {"conv1d"}


def _of_several(theirs: list[Any]) -> list[Any]:
    """Return PEFT's cases of two LoRAs at a time, on the same layers and on different ones."""
    pairs = {"Same": ("lin0", "lin0"), "Different": ("lin0", "lin1")}
    return [
        pytest.param(
            name,
            "qtha",
            cls,
            *({"target_modules": [target], "init_weights": False} for target in targets),
            id=f"{name} as {cls.__name__}",
        )
        for name, targets in pairs.items()
        for cls in CLASSES
    ]


REPLACED = {
    "TEST_CASES": _of_lora,
    "ALL_PEFT_CONFIG_CLASSES": lambda _: list(CLASSES),
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": _of_several,
    "ALL_CONFIGS": lambda _: [
        pytest.param(cls, {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}, id=cls.__name__) for cls in CLASSES
    ],
    "PEFT_DECODER_MODELS_TO_TEST": _decoders,
}
_done: set[int] = set()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Exchange what is in a module's lists of cases before the first test is made from them."""
    if id(metafunc.module) not in _done:
        _done.add(id(metafunc.module))
        for name, cases in REPLACED.items():
            if (theirs := getattr(metafunc.module, name, None)) is not None:
                theirs[:] = cases(list(theirs))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what is made from them, and nothing else."""
    items[:] = [item for item in items if (spec := getattr(item, "callspec", None)) and spec.params.get("config_cls") in CLASSES]
