"""Running Axolotl on several CPU ranks (gloo), see `cpu_ranks/sitecustomize.py`."""

import json
import os
import socket
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_qtha.tuner.fold_cache import folding_each_time

from .commands import QUICKSTART, REPOSITORY, run, write_config
from .servers import Server

SUPPORT = Path(__file__).parent / "cpu_ranks"
ZERO = REPOSITORY / "example_configs" / "deepspeed"
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "reshard_after_forward": True,
    },
}
# What the YAML says for each way to share a run, and the kind of the shim.
STRATEGIES: dict[str, tuple[dict[str, Any], str]] = {
    "ddp": ({}, "ddp"),
    "zero1": ({"deepspeed": str(ZERO / "zero1.json")}, "deepspeed"),
    "zero2": ({"deepspeed": str(ZERO / "zero2.json")}, "deepspeed"),
    "zero3": ({"deepspeed": str(ZERO / "zero3.json")}, "deepspeed"),
    "zero3-offload": ({"deepspeed": str(ZERO / "zero3-offload.json")}, "deepspeed"),
    "fsdp2": (FSDP2, "fsdp"),
}
KIND_ENV = {"ddp": {"ACCELERATE_USE_CPU": "true"}, "deepspeed": {"DS_ACCELERATOR": "cpu"}, "fsdp": {}}
STEPS, MICRO_BATCH = 6, 2


def environment(kind: str) -> dict[str, str]:
    """Return what lets `axolotl` train on CPU ranks."""
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    return {"QTHA_CPU_RANKS": kind, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **KIND_ENV[kind]}


def config_for(folder: Path, strategy: str | None, **changes: Any) -> Path:
    """Write the quickstart, 6 steps with 4 sequences a step over all ranks; `strategy` None: on one process."""
    settings = {"plugins": ["axolotl_qtha.QTHAPlugin", *(["recorder.Recorder"] if strategy else [])]}
    settings |= {"max_steps": STEPS, "save_steps": 3, "eval_steps": STEPS, "micro_batch_size": MICRO_BATCH, "eval_batch_size": 4}
    settings |= {"lr_scheduler": "constant", "warmup_steps": 0, "gradient_accumulation_steps": 1 if strategy else 2}
    settings |= {"dataset_prepared_path": str(folder.parent / "prepared")}
    settings |= STRATEGIES[strategy][0] if strategy else {}
    folder.mkdir(parents=True, exist_ok=True)
    return write_config(folder, **{**settings, **changes})


def train(config: Path, strategy: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Train on two ranks with `axolotl train`."""
    command = ["axolotl", "train", str(config), "--launcher", "torchrun", "--", "--standalone", "--nproc_per_node=2"]
    return run(command, config.parent, **environment(STRATEGIES[strategy][1]), **env)


class Servers:
    """Processes that fork ranks, one for each kind: saves the imports."""

    def __init__(self) -> None:
        self.kinds = {kind: Server(**environment(kind)) for kind in KIND_ENV}

    def train(
        self, config: Path, strategy: str, ranks: int = 2, again: bool = True, killed: str = "", fails: bool = False
    ) -> str:
        """Train as torchrun would have ranks do, and return what they printed.

        Args:
            config: the YAML.
            strategy: a key of STRATEGIES.
            ranks: how many.
            again: whether to begin anew if they wait for each other for ever.
            killed: value of QTHA_KILL; the run must fail then.
            fails: whether every rank must.
        """
        log, command = config.with_suffix(".log"), ["axolotl", "train", str(config), "--launcher", "python"]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "QTHA_KILL": killed or "-1:0:"}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        processes = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        codes = self.kinds[STRATEGIES[strategy][1]].run(command, REPOSITORY, log, processes, bool(killed))
        text = log.read_text()
        if killed or fails:
            assert all(codes) if fails else any(codes), text[-6000:]
            log.unlink()
            return text
        if again and codes != [0] * ranks and "Timeout (0:" in text:  # of faulthandler
            warnings.warn(f"{config.stem} stood still: {text[-6000:]}", stacklevel=2)
            log.unlink()
            return self.train(config, strategy, ranks, again=False)
        assert codes == [0] * ranks, text[-6000:]
        return text

    def stop(self) -> None:
        """End the processes."""
        for server in self.kinds.values():
            server.stop()


def free_port() -> str:
    """Return a port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def output(config: Path) -> Path:
    """Return the output_dir a YAML names."""
    return Path(yaml.safe_load(config.read_text())["output_dir"])


def history(folder: Path, step: int = STEPS) -> dict[int, tuple[float, float]]:
    """Return loss and gradient norm of each step, from a run's checkpoint."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in state["log_history"] if "loss" in row}


def assert_follows(found: dict[int, tuple[float, float]], wanted: dict[int, tuple[float, float]]) -> None:
    """Losses within 1e-4 (float32 sums in another order), gradient norms within 1e-3, at every step."""
    assert found.keys() == wanted.keys()
    for step in wanted:
        assert abs(found[step][0] / wanted[step][0] - 1) <= 1e-4, (step, found[step], wanted[step])
        assert abs(found[step][1] / wanted[step][1] - 1) <= 1e-3, (step, found[step], wanted[step])


def logits_of(adapter: Path) -> torch.Tensor:
    """Return the logits of a saved adapter on the recorder's prompts, with one thread as the ranks have."""
    base = AutoModelForCausalLM.from_pretrained(QUICKSTART / "base", attn_implementation="sdpa", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), folding_each_time():
            return model(input_ids=torch.arange(2, 34).reshape(2, 16)).logits
    finally:
        torch.set_num_threads(threads)


def logits_in_memory(folder: Path) -> list[torch.Tensor]:
    """Return what each rank's model gave at the end of its training, on the same prompts."""
    return [load_file(path)["logits"] for path in sorted(folder.glob("logits-*.safetensors"))]
