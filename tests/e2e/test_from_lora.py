"""What `axolotl qtha-from-lora` writes is what `axolotl train` takes."""

import math

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from axolotl_qtha.cli.from_lora import from_lora

from .commands import losses, train_here, write_config
from .ranks import history, output, train

pytestmark = pytest.mark.e2e

FEW = {"max_steps": 3, "save_steps": 3, "eval_steps": None, "sequence_len": 128, "micro_batch_size": 2}
FSDP1 = {
    "fsdp": ["full_shard", "auto_wrap"],
    "fsdp_config": {
        "fsdp_limit_all_gathers": True,
        "fsdp_sync_module_states": True,
        "fsdp_offload_params": False,
        "fsdp_use_orig_params": False,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_sharding_strategy": "FULL_SHARD",
    },
}


def translated(folder, **changes):
    lora = write_config(folder, "lora.yml", **{**FEW, **changes})
    done = CliRunner().invoke(from_lora, [str(lora), "--out", str(folder / "ours.yml")])
    assert done.exit_code == 0, done.output
    return folder / "ours.yml"


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_target_modules": None, "lora_target_linear": True, "peft_use_rslora": True},
        {"adapter": "qlora", "load_in_4bit": True, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["lora", "qlora"],
)
def test_it_trains(tmp_path, changes):
    config = translated(tmp_path, **changes)
    _, _, trainer = train_here(config)
    assert len(losses(trainer)) == 3
    saved = load_file(output(config) / "adapter_model.safetensors")
    assert any("qtha_adapter" in name for name in saved)
    assert any("lm_head" in name for name in saved) == ("lora_modules_to_save" in changes)


def test_what_was_fsdp1_trains_on_two_ranks_and_saves_a_whole_adapter(tmp_path):
    config = translated(tmp_path, **FSDP1)
    done = train(config, "fsdp2")
    assert done.returncode == 0, done.stdout[-6000:]
    assert all(math.isfinite(loss) for loss, _ in history(output(config), 3).values())
    assert load_file(output(config) / "adapter_model.safetensors")
