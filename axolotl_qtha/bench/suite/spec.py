"""The suite's YAML, and the runs (cells) it stands for."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from ...errors import PrivateSettings, alternatives
from ...settings.args import QTHABlock
from ..tasks import TASKS
from .adapters import ADAPTERS, EQUAL, QTHA, has_budget, joined
from .block import Block
from .part import Part

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS = (
    "base_model",
    "adapter",
    "plugins",
    "qtha",
    "datasets",
    "test_datasets",
    "output_dir",
    "learning_rate",
    "max_steps",
    "seed",
)
MULTIPLE = re.compile(r"(?:(\d+(?:\.\d+)?) ?\* ?)?rank")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=1, strict=True)]


class Suite(BaseModel):
    """What is run: every adapter, rank and budget on every task, at each learning rate, then the best rate at every seed.

    Raises:
        ValueError: naming the key, if a value cannot work.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    output_dir: str = Field(description="Folder of results, summary and pictures.")
    base_model: str = Field(description="Folder or name of the base.")
    tasks: list[str | Block] = Field(min_length=1, description=f"Of {sorted(TASKS)}, or blocks with data of one's own.")
    adapters: list[str] = Field(min_length=1, description=f"Of {sorted(ADAPTERS)}.")
    ranks: list[Whole] = Field(default=[8], min_length=1, description="Ranks of all adapters.")
    qtha: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of the `qtha:` block for QTHA, its controls and variants, but for what makes each what it is. Here and "
        "in variants the value `rank` stands for the rank of the run: `circuit_layers: rank`, or `2 * rank`.",
    )
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+(-[A-Za-z0-9_.]+)*$")], dict[str, Any]] = Field(
        default_factory=dict,
        description="Further adapters: QTHA with other keys of the `qtha:` block, by names of one's own. With `rank: 2 * rank` "
        "budgets are of LoRA at the rank of the run all the same: twice the rank at the same size.",
    )
    budgets: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=[0.24], min_length=1, description="QTHA: `param_budget`, trainable parameters as a share of LoRA's."
    )
    learning_rates: list[Positive] = Field(min_length=1, description="The grid, the same for each adapter.")
    seeds: list[Annotated[int, Field(ge=0, strict=True)]] = Field(
        min_length=1, description="Of the adapter's start and the order of the data."
    )
    target_modules: list[str] = Field(default=LINEAR, min_length=1, description="Layers to adapt.")
    select: Literal["first_seed", "all_seeds"] = Field(
        default="first_seed", description="Seeds whose validation losses choose the learning rate."
    )
    max_steps: Whole = Field(description="Optimiser steps of each run.")
    evaluations: Whole = Field(default=4, description="Validations of each run, the last at its end.")
    equivalence_margin: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Validation losses less than this apart, in nats a token, count as the same: each pair is tested for it. "
        "Choose it before you see results. Default: no such test.",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Further keys of Axolotl's, for all runs.")
    jobs: Whole = Field(default=1, description="Runs at a time. On a CPU they share its cores.")

    @field_validator("tasks")
    @classmethod
    def _tasks_known(cls, tasks: list[str | Block]) -> list[str | Block]:
        for name in tasks:
            if isinstance(name, str) and name not in TASKS:
                raise ValueError(_unknown(name, "task", TASKS))
        return tasks

    @field_validator("adapters")
    @classmethod
    def _adapters_known(cls, adapters: list[str]) -> list[str]:
        for name in adapters:
            if name not in ADAPTERS:
                raise ValueError(_unknown(name, "adapter", ADAPTERS))
        return adapters

    @field_validator("qtha")
    @classmethod
    def _common_works(cls, block: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Check the keys of all at every rank of the suite."""
        for key, own in {"rank": "ranks", "seed": "seeds", "param_budget": "budgets", "target_modules": "target_modules"}.items():
            if key in block:
                raise ValueError(f"{key!r} is set by the suite. What works: `{own}` of the suite, and no `{key}` here.")
        for rank in info.data.get("ranks", ()):
            checked("qtha", {"rank": rank, **at_rank(block, rank)})
        return block

    @field_validator("variants")
    @classmethod
    def _variants_work(cls, variants: dict[str, dict[str, Any]], info: ValidationInfo) -> dict[str, dict[str, Any]]:
        """Check each variant at every rank of the suite; `ranks` stands above, so that pydantic has read it before."""
        for name, block in variants.items():
            if name in ADAPTERS:
                raise ValueError(f"{name!r} is an adapter's name. What works: a name of its own.")
            fixed = {"seed"} if _multiple(block.get("rank")) else {"rank", "seed"}
            if taken := sorted(set(block) & fixed):
                key = taken[0]
                raise ValueError(
                    f"{name}: {key!r} is set by the suite for each run: its `{key}s` decide, for all adapters and variants. "
                    f"What works: `{key}s: [{block[key]}]` of the suite, and no `{key}` here"
                    + (", or a multiple of the run's, `rank: 2 * rank`." if key == "rank" else ".")
                )
            for rank in info.data.get("ranks", ()):  # none where they are at fault themselves
                checked(name, {"rank": rank, **at_rank(joined(info.data.get("qtha", {}), block), rank)})
        return variants

    @field_validator("equivalence_margin", mode="before")
    @classmethod
    def _margin_is_a_number(cls, margin: Any) -> Any:
        if isinstance(margin, bool):  # which pydantic would take for 1
            raise ValueError(f"{margin!r} is no number of nats a token. What works: `equivalence_margin: 0.02`, or none.")
        return margin

    @field_validator("settings")
    @classmethod
    def _settings_free(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(set(settings) & set(OURS)):
            raise ValueError(f"{taken[0]!r} is set by the suite for each run. What works: the suite's own keys.")
        return settings

    @field_validator("tasks", "adapters", "ranks", "budgets", "learning_rates", "seeds")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        names = [value.name if isinstance(value, Block) else value for value in values]
        if twice := [value for value in names if names.count(value) > 1]:
            raise ValueError(f"{twice[0]!r} is named twice. What works: each once.")
        return values

    @property
    def task_names(self) -> list[str]:
        """Return the tasks by name."""
        return [task if isinstance(task, str) else task.name for task in self.tasks]

    @property
    def search_seeds(self) -> list[int]:
        """Return the seeds at which every learning rate is run."""
        return self.seeds if self.select == "all_seeds" else self.seeds[:1]

    def methods(self) -> list[Method]:
        """Return what is compared on each task."""
        return [
            Method(adapter, rank, budget)
            for adapter in (*self.adapters, *self.variants)
            for rank in self.ranks
            for budget in (self.budgets if self._sized(adapter) else [None])
        ]

    def block(self, adapter: str, rank: int) -> dict[str, Any] | None:
        """Return the keys of an adapter's `qtha:` block at a rank, without the size; None for PEFT's."""
        own = self.variants.get(adapter, QTHA.get(adapter))
        return None if own is None else at_rank(joined(self.qtha, own), rank)

    def _sized(self, adapter: str) -> bool:
        """Return whether an adapter's size depends on the budget; that of `lora-equal` is only named if there are several."""
        equal = adapter == EQUAL
        block = self.block("qtha" if equal else adapter, self.ranks[0])
        return block is not None and has_budget(block) and not (equal and len(self.budgets) == 1)


def at_rank(block: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return keys of a `qtha:` block with the rank of a run in the place of the value `rank`, or `2 * rank`.

    >>> at_rank({"circuit_layers": "rank", "num_cores": 4, "rank": "1.5 * rank"}, 6)
    {'circuit_layers': 6, 'num_cores': 4, 'rank': 9}

    Raises:
        ValueError: if a multiple is not whole.
    """
    return {key: _times(found, rank) if (found := _multiple(value)) else value for key, value in block.items()}


def _multiple(value: Any) -> re.Match[str] | None:
    """Return the match of a value that stands for the rank of a run, or so many times that."""
    return MULTIPLE.fullmatch(value) if isinstance(value, str) else None


def _times(multiple: re.Match[str], rank: int) -> int:
    """Return what a multiple of the rank comes to."""
    product = float(multiple[1] or 1) * rank
    if not product.is_integer():
        raise ValueError(f"'{multiple[0]}' is {product:g} at rank {rank}. What works: a multiple that is whole at each rank.")
    return int(product)


def checked(name: str, keys: dict[str, Any]) -> Any:
    """Return the `qtha:` block, a QTHABlock, of an adapter or variant; what works at one rank need not at another.

    Args:
        name: of the adapter or variant.
        keys: of its block, `rank` among them.

    Raises:
        ValueError: naming it and the rank.
    """
    try:
        return QTHABlock.model_validate(keys)
    except ValidationError as error:
        raise ValueError(f"{name}, at rank {keys['rank']}: " + "; ".join(map(_line, error.errors()))) from error
    except PrivateSettings as error:
        raise PrivateSettings(f"variants: {name}: {error}") from None


@dataclass(frozen=True)
class Method:
    """An adapter at a size."""

    adapter: str
    rank: int
    budget: float | None  # param_budget, of QTHA adapters and what is to equal them

    @property
    def name(self) -> str:
        """Return what it is called in files."""
        return f"{self.adapter}--r{self.rank}" + (f"-b{self.budget:g}" if self.budget is not None else "")

    @property
    def label(self) -> str:
        """Return what it is called in tables."""
        return f"{self.adapter}, r {self.rank}" + (f", {self.budget:g}" if self.budget is not None else "")


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    method: Method
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its result's file."""
        return f"{self.task}--{self.method.name}--lr{self.learning_rate:g}--s{self.seed}"


def search(suite: Suite) -> list[Cell]:
    """Return the runs that choose the learning rates: the whole grid at the first seed, or at all."""
    return grid(suite, suite.search_seeds)


def grid(suite: Suite, seeds: list[int]) -> list[Cell]:
    """Return the runs of each method on each task, at each learning rate and these seeds."""
    return [
        Cell(task, method, rate, seed)
        for task in suite.task_names
        for method in suite.methods()
        for rate in suite.learning_rates
        for seed in seeds
    ]


def repeats(suite: Suite, chosen: dict[tuple[str, Method], float], part: Part | None = None) -> list[Cell]:
    """Return the runs at the other seeds, at the rates that were chosen.

    Args:
        suite: what is run.
        chosen: the rates that are known; which runs a part has does not depend on how many these are.
        part: of the suite.
    """
    seeds = suite.seeds[len(suite.search_seeds) :]
    every = [(task, method, seed) for task in suite.task_names for method in suite.methods() for seed in seeds]
    return [
        Cell(task, method, chosen[task, method], seed)
        for task, method, seed in (part or Part()).pick(every)
        if (task, method) in chosen
    ]


def read_suite(path: Path) -> Suite:
    """Return a suite.

    Raises:
        ValueError: one line for each fault, with the key, the value and what would work.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({error}). What works: a suite, see example_configs/bench/.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}. What works: a suite, see example_configs/bench/.")
    for key in raw:
        if key not in Suite.model_fields:
            raise ValueError(_unknown(str(key), "key of a suite", Suite.model_fields))
    try:
        return Suite.model_validate(raw)
    except ValidationError as error:
        raise ValueError("\n".join(_line(fault) for fault in error.errors() if not _other_kind(fault))) from error


def _other_kind(fault: Any) -> bool:
    """Return whether a fault is that a task's block is no name, or its name no block."""
    return fault["loc"][0] == "tasks" and (
        (fault["loc"][-1] == "str" and isinstance(fault["input"], dict))
        or ("Block" in str(fault["loc"][-1]) and fault["type"] == "model_type")
    )


def _line(fault: Any) -> str:
    """Return a fault in words."""
    where = [part for part in map(str, fault["loc"]) if part != "str" and "Block" not in part]
    if fault["type"] == "extra_forbidden":
        return f"{'.'.join(where[:-1])}: {_unknown(where[-1], 'key of a task', Block.model_fields)}"
    # Pydantic's messages say what works, but not always what was found.
    value = "" if fault["type"] in ("value_error", "missing") else f"{fault['input']!r}: "
    text = f"{value}{fault['msg'].removeprefix('Value error, ')}"
    return ": ".join([*filter(None, [".".join(where)]), text])  # what a whole block is at fault for is nowhere in it


def _unknown(name: str, what: str, known: Any) -> str:
    return f"{name!r} is no {what}. What works: {alternatives(name, known)}."


def fingerprint(settings: dict[str, Any]) -> str:
    """Return what tells two runs' settings apart."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def eval_steps(suite: Suite) -> int:
    """Return the steps between validations."""
    return math.ceil(suite.max_steps / suite.evaluations)
