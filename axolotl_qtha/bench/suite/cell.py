"""One run of a suite: a training as `axolotl train` does it, in a process of its own, and what is measured of it."""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from ...circuit.torch_engine import NonFiniteAngle
from ...errors import Diverged, IncompleteAdapter
from ..tasks import Prepared
from .results import STATUS, error_text

WORSE = 1.0  # nats a token above its start: then a run has diverged


def run_cell(keys: dict[str, Any], task: Prepared, folder: Path, threads: int | None) -> dict[str, Any]:
    """Train once, and return the `train_info` of its result, with `answers` beside it; what goes wrong is in there, too.

    Args:
        keys: all keys of Axolotl's YAML but output_dir.
        task: what is trained on.
        folder: a scratch folder, emptied at the end.
        threads: of PyTorch on a CPU.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({**keys, "output_dir": str(folder / "out")}))
    started = time.perf_counter()
    info: dict[str, Any] = {"status": "failed", "metrics": [], "error_msg": ""}
    trainer, watch = None, stopwatch()
    try:
        trainer = _trainer(path, info)
        trainer.add_callback(watch)
        _train(trainer, path, task, info)
        info["status"] = "success"
    except (Diverged, IncompleteAdapter, NonFiniteAngle, FloatingPointError) as error:
        info["status"], info["error_msg"] = "diverged", error_text(error)
    except Exception as error:
        info["error_msg"] = error_text(error)
    if trainer is not None:
        info["metrics"] = curve(trainer.state.log_history, watch.seconds)
    info["total_time"] = time.perf_counter() - started
    info["cpu_memory_max"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        info["accelerator_memory_max"] = torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)
    assert info["status"] in STATUS
    return info


def _trainer(path: Path, info: dict[str, Any]) -> Any:
    """Return Axolotl's trainer for a YAML, its data and model loaded."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer

    cfg = load_cfg(str(path))
    trainer, model, tokenizer, _, _ = setup_model_and_trainer(cfg, load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    trainer.qtha_cfg, trainer.qtha_tokenizer = cfg, tokenizer
    info["num_trainable_params"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    info["num_total_params"] = sum(p.numel() for p in model.parameters())
    return trainer


def _train(trainer: Any, path: Path, task: Prepared, info: dict[str, Any]) -> None:
    """Train, validate at the end, measure on the test set, save."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import execute_training, save_trained_model

    cfg = trainer.qtha_cfg
    execute_training(cfg, trainer, None)
    info["train_time"] = next(row["train_runtime"] for row in reversed(trainer.state.log_history) if "train_runtime" in row)
    if not any("eval_loss" in row and row["step"] == trainer.state.global_step for row in trainer.state.log_history):
        trainer.evaluate()
    if why := diverged(curve(trainer.state.log_history, {})):
        raise FloatingPointError(why)  # what it would write need not be scored
    if task.test is not None:
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | task.keys(test=True)))
        data: Any = load_datasets(cfg=load_cfg(str(path))).eval_dataset
        info["test loss"] = float(trainer.evaluate(eval_dataset=data, metric_key_prefix="test")["test_loss"])
        if task.scoring is not None:
            trainer.model.eval()
            scored = task.scoring.score(trainer.model, trainer.qtha_tokenizer, task.rows or list(data))
            info["test"], info["answers"] = scored.figures, scored.answers
    save_trained_model(cfg, trainer, trainer.model)
    info["file_size"] = sum(file.stat().st_size for file in Path(cfg.output_dir).glob("adapter_model.*"))


def tokenise(keys: dict[str, Any], task: Prepared, folder: Path) -> None:
    """Have Axolotl tokenise a task's data, and keep them where `dataset_prepared_path` in `keys` says."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yml"
    try:
        for test in (False, True) if task.test is not None else (False,):
            path.write_text(yaml.safe_dump({**keys, **task.keys(test), "output_dir": str(folder / "out")}))
            load_datasets(cfg=load_cfg(str(path)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stopwatch() -> Any:
    """Return a callback whose `seconds` says at which second of the training each step was logged."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        seconds: dict[int, float]

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start, self.seconds = time.perf_counter(), {}

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds.setdefault(state.global_step, time.perf_counter() - self.start)

    watch = Stopwatch()
    watch.seconds = {}
    return watch


def curve(log: list[dict[str, Any]], seconds: dict[int, float]) -> list[dict[str, Any]]:
    """Return losses over steps, in nats a token, and when they were logged; and the adapter's diagnostics, where there are any.

    Args:
        log: the trainer's `log_history`.
        seconds: of the training, by step.
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in log:
        row = rows.setdefault(entry["step"], {"step": entry["step"]})
        if "loss" in entry:
            row["train loss"] = float(entry["loss"])
        if "eval_loss" in entry:
            row["valid loss"] = float(entry["eval_loss"])
        row |= {key: value for key, value in entry.items() if key.startswith("qtha/")}
    return [row | ({"seconds": seconds[step]} if step in seconds else {}) for step, row in sorted(rows.items()) if len(row) > 1]


def diverged(rows: list[dict[str, Any]]) -> str:
    """Return why a run has diverged, in words: losses are not finite, or the last validation is far above the first."""
    for row in rows:
        for key in ("train loss", "valid loss"):
            if not math.isfinite(row.get(key, 0.0)):
                return f"{key} of {row[key]} at step {row['step']}"
    valid = [row["valid loss"] for row in rows if "valid loss" in row]
    if len(valid) > 1 and valid[-1] > valid[0] + WORSE:
        return f"valid loss of {valid[-1]:.2f} at the end, {valid[0]:.2f} at the start"
    return ""
