"""Every optimiser that Axolotl has a name for trains the whole adapter, or is refused; docs/host.md says which does what."""

import re
import zlib

import pytest
import torch
from axolotl.utils.schemas.enums import CustomSupportedOptimizers
from transformers.training_args import OptimizerNames

from axolotl_qtha.settings.optimisers import MATRICES
from axolotl_qtha.tuner.adapter import QTHAAdapter
from axolotl_qtha.tuner.layer import adapted_layers

from .commands import REPOSITORY, train_here, write_config

pytestmark = pytest.mark.e2e

NAMES = list(dict.fromkeys(entry.value for entry in (*OptimizerNames, *CustomSupportedOptimizers)))
# What an optimiser needs beyond the packages of `pip install -e ".[test]"`.
NEEDS = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free_radam": "schedulefree",
    "schedule_free_adamw": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "stable_adamw": "optimi",
    "optimi_adamw": "optimi",
    "came_pytorch": "came_pytorch",
    **{name: "flashoptim" for name in ("flash_adamw", "flash_adam", "flash_sgd", "flash_sgdw", "flash_lion")},
}
CUDA = ("adalomo", "stable_adamw", "flash_adamw", "flash_adam", "flash_sgd", "flash_sgdw", "flash_lion")
UNKNOWN_TO_AXOLOTL = ("ao_adamw_4bit", "ao_adamw_8bit")  # its enumeration has them, its builder does not
PLAIN = ("sgd", "schedule_free_sgd", "lomo")  # descent moves by the gradient, which while B is nearly zero is nothing before it
KEYS = {"schedule_free_radam": {"max_steps": 9}}  # it waits for five
# Nothing is evaluated, and one block is enough.
SHORT = {"max_steps": 5, "save_steps": 5, "warmup_steps": 0, "eval_steps": None, "test_datasets": None}
SHORT["overrides_of_model_config"] = {"num_hidden_layers": 1}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MATRICES and name not in UNKNOWN_TO_AXOLOTL])
def test_trains_all_of_the_adapter(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name in CUDA and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, _, _ = train_here(write_config(tmp_path, **{**SHORT, **KEYS.get(name, {}), "optimizer": name}))
    for layer, module in adapted_layers(model).items():
        adapter = module.qtha_adapter["default"]
        start = QTHAAdapter(adapter.config, adapter.shape, adapter.config.seed + zlib.crc32(layer.encode()))
        moving = ["cores"] if name in PLAIN else dict(adapter.named_parameters())
        for key, value in ((key, adapter.get_parameter(key)) for key in moving):
            assert not torch.equal(value, start.get_parameter(key)), f"{layer}.{key}"


@pytest.mark.parametrize("name", list(MATRICES))
def test_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"optimizer: '{name}' .*What works: `optimizer: adamw_torch`"):
        train_here(write_config(tmp_path, **SHORT, optimizer=name))


@pytest.mark.parametrize("source", ["qtha.yml", "lora.yml"])
def test_axolotl_itself_does_not_know_all_its_names(source, tmp_path):
    for name in UNKNOWN_TO_AXOLOTL:
        with pytest.raises(ValueError, match="Unhandled optimizer"):
            train_here(write_config(tmp_path, source, **SHORT, optimizer=name))


def test_the_page_says_so():
    page = (REPOSITORY / "docs" / "host.md").read_text().split("## Optimisers")[1].split("\n## ")[0]
    cells = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", page, re.M)]
    rows = {outcome: set(re.findall(r"`(\w+)`", names)) for outcome, names in cells}
    assert rows["refused"] == set(MATRICES)
    assert rows["unknown to Axolotl's own builder"] == set(UNKNOWN_TO_AXOLOTL)
    assert rows["trained, with a package of its own"] | rows["needs a package or a GPU, not run"] == set(NEEDS)
    named = [name for names in rows.values() for name in names]
    assert sorted(named) == sorted(NAMES)
    assert rows["trained"].isdisjoint(NEEDS)
