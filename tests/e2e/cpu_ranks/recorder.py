"""A second Axolotl plugin for the tests: writes down what each rank held, and kills a rank where a test says so."""

import hashlib
import json
import os
import signal
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from safetensors.torch import save_file
from transformers import TrainerCallback

import axolotl_qtha.tuner.saving
from axolotl_qtha.tuner.fold_cache import folding_each_time

TOKENS = torch.arange(2, 34).reshape(2, 16)  # the prompts whose logits are compared


class Recorder(BasePlugin):
    """Writes `rank-<i>.json` (what it started from) and `logits-<i>.safetensors` into output_dir.

    QTHA_KILL=<rank>:<step>:<when> sends that rank SIGKILL: `step` when the step is done, `save` while its adapter is saved. With
    `ask` it sends SIGTERM before the step is done. With a number, at that place of the run where files change, from the step on.
    """

    def post_lora_load(self, cfg, model):
        adapter = {name: tensor for name, tensor in model.state_dict().items() if "qtha_" in name}
        digest = hashlib.sha256()
        for name, tensor in sorted(adapter.items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        quantised = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
        folder = Path(cfg.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        seen = {"adapter": digest.hexdigest(), "tensors": len(adapter), "quantised": quantised}
        (folder / f"rank-{_rank()}.json").write_text(json.dumps(seen))

    def add_callbacks_pre_trainer(self, cfg, model):
        rank, step, when = os.environ.get("QTHA_KILL", "-1:0:").split(":")
        if int(rank) != _rank():
            return []
        if when == "save":
            _kill_in_save(f"checkpoint-{step}")
        if when.isdigit():
            return [KillAtPlace(cfg.output_dir, int(step), int(when))]
        return [KillAfter(int(step), when)] if when in ("step", "ask") else []

    def post_train(self, cfg, model):
        path = Path(cfg.output_dir) / f"logits-{_rank()}.safetensors"
        if path.exists():  # Axolotl calls this twice, the second time after its process group is gone
            return
        model.eval()
        # Shards keep no folds, and a kept fold is another order of sums: here only the tensors are to differ.
        with torch.no_grad(), folding_each_time():
            save_file({"logits": model(input_ids=TOKENS).logits.float().contiguous()}, path)


class KillAfter(TrainerCallback):
    def __init__(self, step, when):
        self.step, self.when = step, when

    def on_step_begin(self, args, state, control, **_):
        if self.when == "ask" and state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args, state, control, **_):
        if self.when == "step" and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KillAtPlace(TrainerCallback):
    def __init__(self, folder, step, place):
        self.folder, self.step, self.place = folder, step, place

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            from tests.crash.interposer import Interposer, Killed

            class Real(Interposer):
                def reach(self, call, path, write=None):
                    try:
                        super().reach(call, path, write)
                    except Killed:
                        os.kill(os.getpid(), signal.SIGKILL)

            Real(self.folder, self.place, "half").watching().__enter__()


def _kill_in_save(folder):
    move = axolotl_qtha.tuner.saving._move

    def killed(source, target):
        if Path(target).name == folder:
            os.kill(os.getpid(), signal.SIGKILL)
        move(source, target)

    axolotl_qtha.tuner.saving._move = killed


def _rank():
    return int(os.environ["RANK"])
