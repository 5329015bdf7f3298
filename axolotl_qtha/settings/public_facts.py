"""What may be told of a run to whoever reads a published adapter.

Settings are named here one by one, so that `output_dir`, tokens and keys have no way in: numbers enter as numbers, choices if
they are among those known, and a model or data set that is not on the Hub by the last part of its path.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..version import __version__, versions

PACKAGES = ("axolotl", "peft", "transformers", "torch", "qiskit", "qiskit-aer", "qiskit-ibm-runtime")
BUILDERS = ("arrow", "csv", "json", "parquet", "text")  # `path:` may name one of these, and `data_files:` the data
DATA_FILE = re.compile(r"\.(arrow|csv|gz|jsonl?|parquet|txt|zip|zst)$")


@dataclass(frozen=True)
class Source:
    """A model or data set, by a name that may be told: the Hub's, or the last part of a path or address."""

    name: str
    place: Literal["hub", "local", "address"]
    what: Literal["model", "file"]

    def __str__(self) -> str:
        if self.place == "hub":
            return code(self.name)
        where = f"a local {self.what}" if self.place == "local" else f"a {self.what} at another address"
        return f"{code(self.name)} ({where}, not published)" if self.name else f"{where}, not published"

    @property
    def loadable(self) -> str:
        """What to put where code loads it."""
        return self.name if self.place == "hub" else f"PATH/TO/{self.name or self.what.upper()}"


@dataclass(frozen=True)
class Facts:
    """What a card tells of a run; None is not known, or not set."""

    base: Source
    datasets: tuple[Source, ...] = ()
    evaluated_on: tuple[Source, ...] = ()
    method: str | None = None  # of preference tuning and the like, e.g. dpo
    sequence_length: int | None = None  # tokens
    learning_rate: float | None = None
    circuit_lr: float | None = None
    optimizer: str | None = None
    scheduler: str | None = None
    batch: int | None = None  # sequences of one optimiser step, over all ranks
    steps: int | None = None
    epochs: float | None = None
    best_step: int | None = None  # whose weights are loaded at the end of the run
    train_loss: float | None = None  # the last one logged
    eval_loss: float | None = None
    eval_step: int | None = None  # at which it was measured
    quantisation: str | None = None  # of the base
    precision: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


def facts_of(cfg: Any, state: Any = None, model_config: Any = None) -> Facts:
    """Return what may be told of a run.

    Args:
        cfg: Axolotl's configuration.
        state: transformers' `TrainerState`, which knows steps and losses.
        model_config: the loaded base's configuration, which knows how a checkpoint was quantised before.
    """
    from axolotl.utils.schemas.enums import CustomSupportedOptimizers, RLType
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    log = getattr(state, "log_history", None) or []
    batch = cfg.batch_size or (_number(cfg.micro_batch_size) or 0) * (_number(cfg.gradient_accumulation_steps) or 1)
    return Facts(
        base=_source(cfg.base_model, "model"),
        datasets=_sources(cfg.datasets or cfg.pretraining_dataset),
        evaluated_on=_sources(cfg.test_datasets),
        method=choice(cfg.rl, RLType),
        sequence_length=_whole(cfg.sequence_len),
        learning_rate=_number(cfg.learning_rate),
        circuit_lr=_number((cfg.qtha or {}).get("circuit_lr")),
        optimizer=choice(cfg.optimizer, OptimizerNames, CustomSupportedOptimizers),
        scheduler=choice(cfg.lr_scheduler, SchedulerType, ("one_cycle", "rex")),
        batch=_whole(batch) or None,
        steps=_whole(getattr(state, "global_step", None)),
        epochs=_number(getattr(state, "epoch", None)),
        best_step=_whole(getattr(state, "best_global_step", None)) if cfg.load_best_model_at_end else None,
        train_loss=_last(log, "loss"),
        eval_loss=_last(log, "eval_loss"),
        eval_step=_whole(_last([row for row in log if "eval_loss" in row], "step")),
        quantisation=quantised_as(_quantization_config(cfg, model_config)),
        precision=choice(cfg.torch_dtype and str(cfg.torch_dtype).removeprefix("torch."), ("float32", "float16", "bfloat16")),
        seed=_whole(cfg.seed),
        versions={"axolotl_qtha": __version__, **versions(PACKAGES)},
    )


def plain(text: Any) -> str:
    """Return text without what Markdown would take for its own, or what could be a path."""
    return re.sub(r"[^\w.,:;+ -]", "_", str(text))[:200]


def code(name: Any) -> str:
    """Return a name as Markdown's code, on one line, whatever is in it: of a module, model, data set or device.

    >>> code("model.layers.0"), code("norm` ![](x)")
    ('`model.layers.0`', '`norm_ ____x_`')
    """
    plain = re.sub(r"[^ -~]|[`|<>!()\[\]]", "_", str(name))
    return f"`{plain[:200]}`"


def _sources(entries: Any) -> tuple[Source, ...]:
    """Return the data sets of a YAML's list, each once."""
    found = []
    for entry in entries if isinstance(entries, (list, tuple)) else [entries] if entries else []:
        path = entry.get("path") if isinstance(entry, Mapping) else entry
        if path in BUILDERS:
            files = entry.get("data_files") if isinstance(entry, Mapping) else None
            paths = files if isinstance(files, (list, tuple)) else [files]
            found += [Source(_last_part(str(file or "")), "local", "file") for file in paths]
        else:
            found.append(_source(path, "file"))
    return tuple(dict.fromkeys(found))


def _source(path: Any, what: Literal["model", "file"]) -> Source:
    path = str(path or "")
    if "://" in path:
        return Source(_last_part(re.sub(r"^[^/]*://[^/?#]*|[?#].*$", "", path)), "address", what)
    try:
        validate_repo_id(path)
        on_hub = not Path(path).exists() and not DATA_FILE.search(path)
    except HFValidationError:
        on_hub = False
    return Source(path, "hub", what) if on_hub else Source(_last_part(path), "local", what)


def _last_part(path: str) -> str:
    """Return the last part of a path; nothing where it is none, or names the user."""
    part = re.split(r"[\\/]+", path.rstrip("\\/"))[-1]
    if part.startswith("~") or part in ("", ".", "..", os.path.basename(os.path.expanduser("~"))):
        return ""
    return plain(part)


def _quantization_config(cfg: Any, model_config: Any) -> Any:
    """Return how the base is quantised: the loaded model's own settings, else those of the YAML."""
    settings: Any = getattr(model_config, "quantization_config", None)
    for key in ("model_kwargs", "overrides_of_model_kwargs"):
        settings = settings or (cfg.get(key) or {}).get("quantization_config")
    return settings or {key: cfg.get(key) for key in ("load_in_4bit", "load_in_8bit")}


def quantised_as(settings: Any) -> str:
    """Return in words how a base's weights are held, such as "4 bits, nf4, double quantisation, bitsandbytes"; else "none".

    >>> quantised_as({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    '4 bits, nf4, bitsandbytes'
    >>> quantised_as(None)
    'none'

    Args:
        settings: transformers' `quantization_config`, as an object or a dictionary.
    """
    from transformers.utils.quantization_config import QuantizationMethod

    settings = settings.to_dict() if hasattr(settings, "to_dict") else dict(settings or {})
    parts: list[str | None] = []
    if settings.get("load_in_4bit"):
        double = "double quantisation" if settings.get("bnb_4bit_use_double_quant") else None
        parts += ["4 bits", choice(settings.get("bnb_4bit_quant_type"), ("nf4", "fp4")), double]
    elif settings.get("load_in_8bit"):
        parts.append("8 bits")
    elif count := _whole(settings.get("bits")):
        parts.append(f"{count} bits")
    parts.append(choice(settings.get("quant_method"), QuantizationMethod))
    return ", ".join(part for part in parts if part) or "none"


def choice(value: Any, *known: Iterable[Any]) -> str | None:
    """Return a value that is among those known, `other` for any other, None for none."""
    value = getattr(value, "value", value)
    if not value:
        return None
    return str(value) if str(value) in {getattr(item, "value", item) for items in known for item in items} else "other"


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _last(log: list[dict[str, Any]], key: str) -> float | None:
    """Return the latest of the values logged under a name."""
    return next((_number(row[key]) for row in reversed(log) if key in row), None)
