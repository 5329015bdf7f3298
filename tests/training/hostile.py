"""Files as a stranger might send them, and checkpoints with DeepSpeed's own classes in them."""

import os
from collections import OrderedDict
from pathlib import Path

import torch


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def states(stage: int) -> dict[str, dict]:
    """Return DeepSpeed's states of one rank, by the file they are in, with the classes that it writes."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name, shape = "base_model.q_proj.qtha_adapter.default.flat", torch.Size([4])
    kept = {"loss_scaler": LossScaler(1.0), "zero_stage": ZeroStageEnum(stage)}
    if stage < 3:
        adam = {"state": [{"exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4), "step": 1}], "param_groups": [{"lr": 0.1}]}
        kept |= {"base_optimizer_state": adam, "single_partition_of_fp32_groups": [torch.ones(4)]}
        kept |= {"param_slice_mappings": [OrderedDict({name: fragment_address(numel=4, start=0)})]}
    else:
        adam = {"state": {0: {"exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
        kept |= {"optimizer_state_dict": adam, "fp32_flat_groups": [torch.ones(4)]}
    model = {"module": {}, "param_shapes": [OrderedDict({name: shape})], "dp_world_size": 1, "mp_world_size": 1, "iteration": 1}
    where = "zero_pp_rank_0_mp_rank_00" if stage == 3 else "mp_rank_00"
    return {
        f"{where}_model_states.pt": model,
        "zero_pp_rank_0_mp_rank_00_optim_states.pt": {"optimizer_state_dict": kept, "ds_version": "0.18.9"},
    }


def write_states(folder: Path, stage: int = 2, step: int = 2) -> Path:
    """Make a folder with DeepSpeed's states in it, and return it."""
    (folder / f"global_step{step}").mkdir(parents=True)
    for name, values in states(stage).items():
        torch.save(values, folder / f"global_step{step}" / name)
    (folder / "latest").write_text(f"global_step{step}")
    return folder
