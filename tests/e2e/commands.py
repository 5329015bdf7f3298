"""Running Axolotl: its real commands in a process, and its Python entry points in this one."""

import functools
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import axolotl.cli  # noqa: F401  it sets up logging, which after an import of absl (rouge-score's) closes pytest's own stream
import yaml

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "example_configs" / "quickstart"
PREPARED = tempfile.TemporaryDirectory(prefix="qtha-prepared-")  # kept for as long as this process runs
# Keys on which prepared data do not depend. What differs in any other has a folder of its own.
OF_THE_RUN = {"output_dir", "qtha", "adapter", "plugins", "load_in_4bit", "gradient_checkpointing", "resume_from_checkpoint"}
OF_THE_RUN |= {"max_steps", "save_steps", "eval_steps", "optimizer", "learning_rate", "lr_scheduler", "warmup_steps"}
OF_THE_RUN |= {"micro_batch_size"}


def run(command: list[str], cwd: Path, text: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this interpreter's tools first on the PATH; its output is in `stdout`."""
    return subprocess.run(
        command,
        cwd=cwd,
        input=text,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=with_tools(**env),
        timeout=900,
    )


def with_tools(**env: str) -> dict[str, str]:
    """Return this process's environment with its interpreter's tools first on the PATH, and with `env`."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **env}


def write_config(folder: Path, source: str = "qtha.yml", **changes: Any) -> Path:
    """Write a quickstart YAML with absolute paths, outputs in `folder`, and `changes` (None removes a key).

    The data are prepared in this process, and once for all tests with the same: both save seconds a run.
    """
    config = yaml.safe_load((QUICKSTART / source).read_text())
    config["base_model"] = str(QUICKSTART / "base")
    for key in ("datasets", "test_datasets"):
        for data in config[key]:
            data["path"] = str(REPOSITORY / data["path"])
    config["test_datasets"][0]["split"] = "train[:8]"  # one batch in the place of nine, which take longer than many a training
    config["dataset_num_proc"] = 1
    config["output_dir"] = str(folder / "out")
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            value = {**config[key], **value}
        config[key] = value
    if "dataset_prepared_path" not in changes:
        of_data = {key: value for key, value in config.items() if key not in OF_THE_RUN}
        name = hashlib.sha256(json.dumps(of_data, sort_keys=True, default=str).encode()).hexdigest()[:16]
        config["dataset_prepared_path"] = str(Path(PREPARED.name) / name)
    path = folder / f"{source.removesuffix('.yml')}-{len(list(folder.glob('*.yml')))}.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def train_here(config: Path) -> tuple[Any, Any, Any]:
    """Train in this process as `axolotl train` does; return model, tokenizer and trainer."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import train

    _freeze()
    cfg = load_cfg(str(config))
    assert (
        PluginManager.get_instance().load_datasets(cfg, preprocess=False) is None
    )  # by which plugins know that it is a training
    load = load_preference_datasets if cfg.rl else load_datasets
    return train(cfg=cfg, dataset_meta=load(cfg=cfg, cli_args=TrainerCliArgs()))


@functools.cache
def _freeze() -> None:
    """Have collections of garbage leave out what has been imported: they take a second otherwise, and each run has five."""
    gc.collect()
    gc.freeze()


def losses(trainer: Any) -> dict[int, float]:
    """Return the training loss of each logged step."""
    return {row["step"]: float(row["loss"]) for row in trainer.state.log_history if "loss" in row}
