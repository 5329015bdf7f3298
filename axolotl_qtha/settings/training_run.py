"""What a configuration says, as values: the `qtha:` block parsed once, and what planning a training needs to know of the rest."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.utils.dict import DictDefault
from peft import TaskType
from pydantic import ValidationError

from ..tuner.config import QTHAConfig
from ..tuner.targets import HEADED, HEADS
from . import quantization
from .args import QTHABlock
from .parallel import deepspeed_settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

PAIRS = ("dpo", "ipo", "orpo", "simpo")  # `rl:` methods that run a chosen and a rejected answer side by side
FUSED_LOSSES = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy")


# What a YAML says to load a base for each task that Axolotl's loader knows.
TASKS = {
    TaskType.CAUSAL_LM: "neither `reward_model` nor `process_reward_model`",
    TaskType.SEQ_CLS: "`reward_model: true`",
    TaskType.TOKEN_CLS: "`process_reward_model: true`",
}


def task_type(model: nn.Module) -> TaskType:
    """Return PEFT's task for a base, by the name of its class, as Axolotl's loader chooses it for LoRA.

    With `HEADED` ones PEFT trains the head in full, and saves it with the adapter.
    """
    name = type(model).__name__
    if "SequenceClassification" in name:
        return TaskType.SEQ_CLS
    return TaskType.TOKEN_CLS if "TokenClassification" in name else TaskType.CAUSAL_LM


@dataclass(frozen=True)
class AdapterSettings:
    """The `qtha:` block of one loaded configuration."""

    named: dict[str, Any]  # the keys of the adapter that the YAML sets: what a trained adapter is compared with
    diagnostics_steps: int
    parsed: QTHAConfig

    @classmethod
    def of(cls, cfg: DictDefault) -> AdapterSettings:
        """Parse the block of a validated Axolotl configuration.

        Raises:
            ValueError: if a value cannot work.
        """
        block: Any = QTHABlock.model_validate(dict(cfg.qtha or {}))
        named = block.adapter_settings()
        config = QTHAConfig(
            **{"seed": cfg.seed, **named}, task_type=TaskType.CAUSAL_LM.value, base_model_name_or_path=cfg.base_model
        )
        return cls(named, block.diagnostics_steps, config)

    @property
    def config(self) -> QTHAConfig:
        """The adapter, as a copy of its own: PEFT writes names of modules and sizes into the one it is given."""
        return copy.deepcopy(self.parsed)

    def like(self, folder: str) -> AdapterSettings:
        """Return them with the form, full matrices or tensor networks, of the adapter in a folder, if it is left open.

        Sizes follow from the budget, as without it.

        Args:
            folder: what the training goes on from; one that is not here, a name on the Hub, changes nothing.
        """
        if self.parsed.mpo != "auto" or not (Path(folder) / "adapter_config.json").is_file():
            return self
        saved = QTHAConfig.from_pretrained(folder)
        if not isinstance(saved, QTHAConfig):  # said where it is loaded
            return self
        share = {"layers": "auto", "inputs": saved.share.inputs} if saved.mpo == "none" and saved.share else None
        return dataclasses.replace(self, parsed=self.parsed.changed(mpo=saved.mpo, share=share))

    def config_for(self, model: nn.Module) -> QTHAConfig:
        """Return the adapter for a base as it was loaded: with a classification head, that is trained and saved as well."""
        config = self.config
        config.task_type = task_type(model).value
        return config

    def of_trained(self, folder: str, model: nn.Module) -> QTHAConfig:
        """Return the configuration of a trained adapter, its circuits run as this YAML says.

        Args:
            folder: of the adapter, or its name on the Hub.
            model: the base it is put on.

        Raises:
            ValueError: if it was trained for another task, so that the model's head would be missing in it, or have no place.
        """
        saved: QTHAConfig = QTHAConfig.from_pretrained(folder)
        theirs, ours = TaskType(saved.task_type or TaskType.CAUSAL_LM), task_type(model)
        if theirs != ours:
            raise ValueError(
                f"lora_model_dir: {folder!r} is an adapter for {theirs.value} (PEFT's task type), while the YAML loads a "
                f"{type(model).__name__}, which is {ours.value}. What works: {TASKS[theirs]}, or no `lora_model_dir`."
            )
        if saved.modules_to_save and ours in HEADED:  # PEFT adds them each time
            saved.modules_to_save = [name for name in saved.modules_to_save if name not in HEADS] or None
        saved.run_as(self.parsed)
        return saved


@dataclass(frozen=True)
class TrainingRun:
    """What a training will do. `base()` builds its base without weights, `changed()` returns it with other keys in the YAML."""

    base_model: str
    dtype: torch.dtype  # the base is loaded in
    half: bool  # 16 bits are asked for, by bf16 or fp16
    quantised_to: str | None  # "load_in_4bit" or "load_in_8bit", where asked for
    adapter_settings: AdapterSettings
    micro_batch_size: int  # examples
    accumulation: int  # micro batches of a step
    sequence_len: int  # tokens
    pairs: bool  # two sequences for each example
    gradient_checkpointing: bool
    fused_loss: bool  # no logits are kept
    optimizer: str
    deepspeed: dict[str, Any]  # empty without
    fsdp: dict[str, Any]  # likewise
    max_steps: int | None
    evaluated: int  # tokens of a batch of `axolotl evaluate`
    cfg: DictDefault  # of this class alone

    @classmethod
    def of(cls, cfg: DictDefault, adapter: AdapterSettings | None = None) -> TrainingRun:
        """Read a validated Axolotl configuration that has been completed (`quantization.complete`).

        Args:
            cfg: Axolotl's configuration.
            adapter: its `qtha:` block, if that has been parsed.

        Raises:
            ValueError: if the block or the file that `deepspeed:` names cannot be used.
        """
        return cls(
            base_model=cfg.base_model,
            dtype=cfg.torch_dtype,
            half=bool(cfg.bf16 or cfg.bfloat16 or cfg.fp16 or cfg.float16),
            quantised_to=quantization.asked(cfg),
            adapter_settings=adapter or AdapterSettings.of(cfg),
            micro_batch_size=int(cfg.micro_batch_size),
            accumulation=int(cfg.gradient_accumulation_steps or 1),
            sequence_len=cfg.sequence_len,
            pairs=bool(cfg.reward_model) or getattr(cfg.rl, "value", cfg.rl) in PAIRS,
            gradient_checkpointing=bool(cfg.gradient_checkpointing),
            fused_loss=any(cfg[key] for key in FUSED_LOSSES),
            optimizer=getattr(cfg.optimizer, "value", cfg.optimizer) or "adamw_torch",
            deepspeed=deepspeed_settings(cfg.deepspeed),
            fsdp={str(key).removeprefix("fsdp_"): value for key, value in dict(cfg.fsdp_config or {}).items()},
            max_steps=cfg.max_steps if cfg.max_steps and cfg.max_steps > 0 else None,
            evaluated=int(cfg.eval_batch_size or cfg.micro_batch_size) * cfg.sequence_len,
            cfg=cfg,
        )

    @property
    def adapter(self) -> QTHAConfig:
        """The adapter, as a copy of its own."""
        return self.adapter_settings.config

    @property
    def sequences(self) -> int:
        """Sequences of a micro batch."""
        return self.micro_batch_size * (2 if self.pairs else 1)

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch, at most."""
        return self.sequences * self.sequence_len

    def base(self) -> PreTrainedModel:
        """Return the base without weights, on the meta device.

        Raises:
            UnknownBase: if it cannot be built from its configuration alone.
        """
        from .meta_base import meta_base  # starts Axolotl's loaders, which not every command needs

        return meta_base(self.cfg)

    def changed(self, keys: dict[str, Any]) -> TrainingRun:
        """Return the run with other values of some keys of its YAML."""
        cfg = DictDefault({**self.cfg, **keys})
        if keys.get("load_in_4bit"):  # as the YAML's own key would
            quantization.connect(cfg)
            quantization.complete(cfg)
        return TrainingRun.of(cfg, self.adapter_settings)


def why_unread(cfg: DictDefault) -> str | None:
    """Return why a configuration's `datasets:` cannot be read as texts one by one, None where they can."""
    if cfg.rl:
        return f"rl: {cfg.rl}"
    return "streamed or no data" if cfg.pretraining_dataset or cfg.streaming or not cfg.datasets else None


def read_run(path: Path) -> TrainingRun:
    """Return the training that a YAML describes.

    Raises:
        ValueError: if the file is not a configuration with `adapter: qtha`, or the base's configuration cannot be read.
    """
    from .meta_base import read_config

    return TrainingRun.of(read_config(path))


def trained_adapter(path: Path, given: Path | None) -> tuple[Path, str]:
    """Return the folder of a YAML's trained adapter, the given one, else lora_model_dir, else output_dir; and the base's name.

    Raises:
        ValueError: if the file is not a configuration with `adapter: qtha`.
    """
    from .meta_base import read_yaml

    cfg = read_yaml(path)
    return Path(given or cfg.lora_model_dir or cfg.output_dir), cfg.base_model


def checked(values: dict[str, Any]) -> tuple[DictDefault | None, str]:
    """Return the values of a YAML as Axolotl validates them; None, and why, where it refuses them."""
    from .meta_base import validated

    try:
        return validated(copy.deepcopy(values)), ""
    except ValidationError as error:
        return None, "; ".join(_fault(fault) for fault in error.errors())
    except (ValueError, DeprecationWarning) as error:  # Axolotl raises the warning for keys it has given up
        return None, str(error)


def _fault(fault: Any) -> str:
    where = ".".join(map(str, fault["loc"]))
    return (f"{where}: " if where else "") + str(fault["msg"]).removeprefix("Value error, ")


def run_of(cfg: DictDefault) -> TrainingRun:
    """Return the training that a validated configuration describes.

    Raises:
        UnknownBase: if the base's configuration cannot be read.
    """
    from .meta_base import completed

    return TrainingRun.of(completed(cfg))
