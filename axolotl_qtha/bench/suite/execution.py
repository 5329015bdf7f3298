"""A suite on disk: what each run is, what of it is done, and what is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...settings.args import QTHABlock
from ...tuner.config import QTHAConfig
from ...tuner.share import LayerSize
from ...tuner.sizes import count_lora_parameters, count_parameters, resolve
from ...tuner.targets import select_targets
from ..tasks import TASKS, Prepared
from . import results
from .adapters import EQUAL, equal_rank, has_budget, settings
from .block import Block, ready
from .spec import Cell, Method, Suite, checked, eval_steps, fingerprint, repeats, search
from .worker import Job

DEFAULTS = {"val_set_size": 0.0, "save_strategy": "no", "logging_steps": 1, "dataset_num_proc": 1, "use_wandb": False}
PAYS = ("instance",)  # keys of the `ibm:` block
TESTED = {"test", "score", "score_rows", "score_tokens"}  # keys of a block that decide on the test figures


@dataclass(frozen=True)
class Size:
    """What a method trains."""

    parameters: int
    rank: int  # of `lora-equal`, and a variant that has one, its own


class Execution:
    """A suite, and what its runs leave on disk.

    ```
    output_dir/results/CELL.json        a result
    output_dir/predictions/CELL.jsonl   what it answered to the test set, and the scores of each answer
    output_dir/logs/CELL.log            what the run printed
    output_dir/tasks/, prepared/        the tasks' data, and as Axolotl has tokenised them
    ```
    """

    def __init__(self, suite: Suite, jobs: int | None = None) -> None:
        self.suite, self.folder, self.count = suite, Path(suite.output_dir), jobs or suite.jobs
        base = read_base(suite)
        self.sizes = {method: size(suite, method, base) for method in suite.methods()}
        self._prepared: dict[str, Prepared] = {}

    def result_path(self, cell: Cell) -> Path:
        """Return where a run's result is."""
        return self.folder / "results" / f"{cell.name}.json"

    def predictions_path(self, cell: Cell) -> Path:
        """Return where a run's answers are, if it wrote any."""
        return self.folder / "predictions" / f"{cell.name}.jsonl"

    def results(self, cells: Iterable[Cell]) -> dict[Cell, dict[str, Any]]:
        """Return the results that are there."""
        return {cell: results.read(path) for cell in cells if (path := self.result_path(cell)).exists()}

    def found(self) -> dict[Cell, dict[str, Any]]:
        """Return every result that is there: of the grid, and of the other seeds at the rates that are best so far."""
        return self.results(dict.fromkeys([*search(self.suite), *repeats(self.suite, self.chosen())]))

    def chosen(self) -> dict[tuple[str, Method], float]:
        """Return the learning rate of each method on each task: that of the least validation loss, as `select` says.

        With `all_seeds` a rate at which fewer runs came to an end comes after all others.
        """
        losses: dict[tuple[str, Method], dict[float, list[float]]] = {}
        for cell, result in self.results(search(self.suite)).items():
            loss = results.final(result, "valid loss")
            if loss is not None:
                losses.setdefault((cell.task, cell.method), {}).setdefault(cell.learning_rate, []).append(loss)
        return {
            key: min(rates, key=lambda rate: (-len(rates[rate]), sum(rates[rate]) / len(rates[rate])))
            for key, rates in losses.items()
        }

    def unsearched(self) -> dict[tuple[str, Method], int]:
        """Return how many runs of the grid have no result, of each method on each task where there are such."""
        left: dict[tuple[str, Method], int] = {}
        for cell in search(self.suite):
            if not self.result_path(cell).exists():
                left[cell.task, cell.method] = left.get((cell.task, cell.method), 0) + 1
        return left

    def settled(self) -> dict[tuple[str, Method], float]:
        """Return the learning rates of those whose grid has been run whole: only they go on with the other seeds."""
        left = self.unsearched()
        return {key: rate for key, rate in self.chosen().items() if key not in left}

    def progress(self) -> tuple[int, int]:
        """Return how many runs are done, and of how many; one that failed is not done.

        A method none of whose rates came to an end has no other seeds to run.
        """
        done = sum(run["train_info"]["status"] != "failed" for run in self.found().values())
        seeds = len(self.suite.seeds) - len(self.suite.search_seeds)
        return done, len(search(self.suite)) + seeds * len({**self.chosen(), **self.unsearched()})

    def prepared(self, name: str) -> Prepared:
        """Return a task of the suite, its data made."""
        if name not in self._prepared:
            self._prepared[name] = ready(self._task(name), self.suite.base_model, self.folder / "tasks")
        return self._prepared[name]

    def _task(self, name: str) -> Any:
        blocks = {task.name: task for task in self.suite.tasks if isinstance(task, Block)}
        return blocks[name] if name in blocks else TASKS[name]

    def open(self, cells: list[Cell]) -> list[Cell]:
        """Return the runs that are to be done: those without a result, and those that failed.

        Raises:
            ValueError: if there is a result from other settings or from another version.
        """
        left = []
        for cell in cells:
            path = self.result_path(cell)
            found = results.read(path) if path.exists() else None
            if found is not None and found["settings"] != (wanted := self.settings(cell)[1]):
                raise ValueError(
                    f"output_dir: {path} was run with other settings, or other defaults of axolotl-qtha ({found['settings']}, "
                    f"now {wanted}). What works: another output_dir, or `--overwrite` to run all again."
                )
            if found is None or found["train_info"]["status"] == "failed":
                left.append(cell)
        return left

    def keys(self, cell: Cell) -> dict[str, Any]:
        """Return Axolotl's keys of a run, without those of the task."""
        suite, method = self.suite, cell.method
        block = suite.block(method.adapter, method.rank)
        rank = self.sizes[method].rank if block is None else method.rank
        adapter = settings(method.adapter, rank, method.budget, suite.target_modules, block)
        return {
            "base_model": suite.base_model,
            **DEFAULTS,
            **suite.settings,
            **adapter,
            "learning_rate": cell.learning_rate,
            "max_steps": suite.max_steps,
            "eval_steps": eval_steps(suite),
            "seed": cell.seed,
        }

    def settings(self, cell: Cell) -> tuple[dict[str, Any], str]:
        """Return the settings of a run without local paths, and what tells them from others."""
        config = without_paths({**self.keys(cell), **self.prepared(cell.task).keys()})
        task = self._task(cell.task)
        # A block's test set and scores decide on its result too, though the training never sees them. The built-in tasks have no
        # such keys: the version of their data is part of the paths that `keys` names.
        tested = without_paths(task.model_dump(include=TESTED)) if isinstance(task, Block) else {}
        # So do what it leaves to this package's defaults, and the sizes they lead to, which may be others in another version.
        left_out = {"defaults": defaults(), "parameters": self.sizes[cell.method].parameters} if "qtha" in config else {}
        return config, fingerprint({**config, **tested, **left_out})

    def job(self, cell: Cell, threads: int | None) -> Job:
        """Return a run as another process is told it, with so many threads of PyTorch."""
        task = self._task(cell.task)
        config, mark = self.settings(cell)
        method = cell.method
        return Job(
            cell={
                "task": cell.task,
                "adapter": method.adapter,
                "rank": method.rank,
                "budget": method.budget,
                "learning_rate": cell.learning_rate,
                "seed": cell.seed,
            },
            task=task.model_dump() if isinstance(task, Block) else cell.task,
            base=self.suite.base_model,
            data=str(self.folder / "tasks"),
            keys={**self.keys(cell), "dataset_prepared_path": str(self.folder / "prepared")},
            settings=mark,
            config=config,
            scratch=str(self.folder / "scratch" / cell.name),
            result=str(self.result_path(cell)),
            predictions=str(self.predictions_path(cell)),
            log=str(self.folder / "logs" / f"{cell.name}.log"),
            threads=threads,
        )


def defaults() -> dict[str, Any]:
    """Return what a `qtha:` block has where it says nothing."""
    return {name: field.default for name, field in QTHABlock.model_fields.items()}


def count(suite: Suite) -> int:
    """Return the number of runs of a suite."""
    each = len(suite.learning_rates) * len(suite.search_seeds) + len(suite.seeds) - len(suite.search_seeds)
    return len(suite.task_names) * len(suite.methods()) * each


def read_base(suite: Suite) -> nn.Module:
    """Return the base without weights.

    Raises:
        ValueError: if it cannot be read.
    """
    from axolotl.utils.dict import DictDefault

    from ...settings.meta_base import meta_base

    script = Path(suite.base_model).parent / "make_base.py"
    if script.is_file() and not Path(suite.base_model).exists():
        raise ValueError(
            f"base_model: {suite.base_model!r} has not been made. What works: `python {script}`, with the options that "
            "the suite's first lines may name."
        )
    return meta_base(DictDefault({"base_model": suite.base_model, "torch_dtype": None}))


def size(suite: Suite, method: Method, base: nn.Module) -> Size:
    """Return what a method trains.

    Raises:
        ValueError: if a budget cannot be met, or the base has no such layers.
    """
    rank, adapter = method.rank, method.adapter
    if (block := suite.block(adapter, rank)) is not None:
        return Size(_ours(suite, method, block, base), block.get("rank", rank))
    # Which layers these are is no matter of rank or budget, which QTHA might not allow.
    layers = _layers(QTHAConfig(target_modules=list(suite.target_modules), task_type="CAUSAL_LM"), base)
    if adapter == EQUAL:
        block = suite.block("qtha", rank) or {}
        qtha = dataclasses.replace(method, budget=method.budget or suite.budgets[0]) if has_budget(block) else method
        rank = equal_rank(_ours(suite, qtha, block, base), layers)
    parameters = count_lora_parameters(rank, layers)
    if adapter == "dora":
        parameters += sum(layer.outputs for layer in layers)
    return Size(parameters, rank)


def _ours(suite: Suite, method: Method, block: dict[str, Any], base: nn.Module) -> int:
    """Return the parameters of QTHA."""
    keys = settings(method.adapter, method.rank, method.budget, suite.target_modules, block)["qtha"]
    config = QTHAConfig(**checked(method.adapter, keys).adapter_settings(), task_type="CAUSAL_LM")
    layers = _layers(config, base)
    return count_parameters(resolve(config, layers), layers)


def _layers(config: QTHAConfig, base: nn.Module) -> list[LayerSize]:
    """Return the sizes of the layers that are adapted."""
    return list(select_targets(config, base).values())


def without_paths(value: Any) -> Any:
    """Return settings in which a local path is only its last two parts, and without what tells who pays."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items() if key not in PAYS}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if isinstance(value, str) and "/" in value and (value.startswith(("/", ".", "~")) or Path(value).exists()):
        return "/".join(Path(value).parts[-2:])
    return value
