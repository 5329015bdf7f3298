"""Finding and loading the trained adapter of a configuration, for the commands that come after a training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import refusal
from ..tuner.config import QTHAConfig
from ..tuner.saving import WEIGHTS

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault

    from ..tuner.adapter import QTHAAdapter


def adapter_folder(cfg: DictDefault, given: Path | None) -> Path:
    """Return the folder of the trained adapter: the one given, or the configuration's.

    Raises:
        ValueError: if it holds no adapter.
    """
    folder = Path(given or cfg.lora_model_dir or cfg.output_dir)
    if not (folder / "adapter_config.json").is_file() or not (folder / WEIGHTS).is_file():
        holds = f"holds no trained adapter (adapter_config.json, {WEIGHTS})"
        raise refusal("--lora-model-dir", str(folder), holds, "a training's output_dir")
    return folder


def check_base(cfg: DictDefault, folder: Path) -> None:
    """Refuse a base that the adapter was not trained on.

    Raises:
        ValueError: naming both.
    """
    trained_on = str(QTHAConfig.from_pretrained(str(folder)).base_model_name_or_path or "")
    if trained_on and Path(trained_on).name != Path(cfg.base_model).name:
        raise ValueError(
            f"base_model: {cfg.base_model!r} is not the base of {str(folder)!r}, which was trained on {trained_on!r}. "
            f"What works: `base_model: {trained_on}`."
        )


def configuration(path: Path, folder: Path) -> DictDefault:
    """Return Axolotl's configuration for running the model with its adapter on one device, sequence by sequence."""
    from axolotl.cli.config import load_cfg

    alone = {"deepspeed": None, "fsdp_config": None, "fsdp_version": None}
    plain = {"sample_packing": False, "eval_sample_packing": False, "pad_to_sequence_len": False, "gradient_checkpointing": False}
    return load_cfg(str(path), lora_model_dir=str(folder), **alone, **plain)


def refuse_untrained(adapters: Iterable[QTHAAdapter], given: Path | None) -> None:
    """Refuse adapters that change nothing.

    Raises:
        ValueError: naming their folder.
    """
    if all(adapter.is_no_op() for adapter in adapters):
        raise refusal("--lora-model-dir", str(given or "output_dir"), "is an untrained adapter", "a trained one")
