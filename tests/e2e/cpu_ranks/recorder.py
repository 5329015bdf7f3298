"""A second Axolotl plugin for the tests: writes down what each rank held, so that a test can look at it afterwards."""

import hashlib
import json
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from safetensors.torch import save_file

TOKENS = torch.arange(2, 34).reshape(2, 16)  # the prompts whose logits are compared


class Recorder(BasePlugin):
    """Writes `rank-<i>.json` (a hash of the adapter it started from) and `logits-<i>.safetensors` into output_dir."""

    def post_lora_load(self, cfg, model):
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            if "qtha_" in name and tensor.device.type != "meta":
                digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        folder = Path(cfg.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{_rank()}.json").write_text(json.dumps({"adapter": digest.hexdigest()}))

    def post_train(self, cfg, model):
        path = Path(cfg.output_dir) / f"logits-{_rank()}.safetensors"
        if path.exists():  # Axolotl calls this twice, the second time after its process group is gone
            return
        model.eval()
        with torch.no_grad():
            save_file({"logits": model(input_ids=TOKENS).logits.float().contiguous()}, path)


def _rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
