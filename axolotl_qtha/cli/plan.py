"""`axolotl qtha-plan`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import refusal
from .shown import errors_shown

if TYPE_CHECKING:
    from ..planner.scaling import Scaling
    from ..settings.training_run import TrainingRun

EXAMPLES = {"global_batch": 256, "tflops": 400, "bandwidth": 300, "network": 50, "latency": 10, "gpus_per_node": 8}


@click.command("qtha-plan")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write what is printed to FILE.")
@click.option("--find-budget", type=float, help="Print rank, bond and mid settings within this share of LoRA, e.g. 0.24.")
@click.option("--gpu-memory", type=click.FloatRange(min=0, min_open=True), help="Plan for a GPU of this many GiB.")
@click.option("--ranks", type=int, help="Plan for this many GPUs that share the run.  [default: those here]")
@click.option("--scaling", type=int, help="Predict the step time on 1, 2, 4, ... up to this many ranks, of one global batch.")
@click.option("--global-batch", type=int, help="--scaling: sequences of a step.  [default: the YAML's on the most ranks]")
@click.option("--tflops", type=float, help="--scaling: TFLOP/s one rank achieves.  [default: a matmul measured here]")
@click.option("--bandwidth", type=float, help="--scaling: GB/s per GPU inside a node.  [default: 300, NVLink of an H100]")
@click.option("--network", type=float, help="--scaling: GB/s per GPU between nodes.  [default: 50, 400 Gb/s InfiniBand]")
@click.option("--latency", type=float, help="--scaling: microseconds of one step of a ring.  [default: 10]")
@click.option("--gpus-per-node", type=int, help="--scaling: GPUs of a node.  [default: 8]")
def plan(
    config: Path,
    json_file: Path | None,
    find_budget: float | None,
    gpu_memory: float | None,
    ranks: int | None,
    scaling: int | None,
    **predicted: float | None,
) -> None:
    """Say what training CONFIG will need: parameters, memory, circuits. No weights are downloaded or loaded."""
    from ..planner.estimate import find_settings, local_gpus, make_plan
    from ..planner.show import show_plan, show_scaling, show_settings
    from ..settings.training_run import read_run
    from ..terminal import console

    with errors_shown():
        _check_plan(find_budget, gpu_memory, ranks, scaling, predicted)
        run = read_run(config)
        if find_budget is not None:
            settings = find_settings(run, find_budget)
            show_settings(settings, find_budget, run.adapter.rank, console())
            content: object = [dataclasses.asdict(row) for row in settings]
        elif scaling is not None:
            table = _predict(run, scaling, predicted)
            show_scaling(table, console())
            content = dataclasses.asdict(table)
        else:
            gpus = [("a GPU", int(gpu_memory * 2**30))] if gpu_memory else local_gpus()
            result = make_plan(run, gpus, ranks=ranks)
            show_plan(result, console())
            content = result.as_dict()
    if json_file:
        json_file.write_text(json.dumps(content, indent=2))


def _check_plan(
    find_budget: float | None,
    gpu_memory: float | None,
    ranks: int | None,
    scaling: int | None,
    predicted: dict[str, float | None],
) -> None:
    """Refuse options that are out of range, or have no effect together."""
    most = 1024
    for name, value, limit in (("--ranks", ranks, None), ("--scaling", scaling, most)):
        if value is not None and not 1 <= value <= (limit or value):
            raise refusal(name, value, "is no number of ranks", f"1 to {limit}, such as 8" if limit else "1 or more, such as 8")
    for key, given in predicted.items():
        name = "--" + key.replace("_", "-")
        if given is not None and scaling is None:
            raise refusal(name, given, "has no effect without --scaling", f"`--scaling 64 {name} {given:g}`")
        if given is not None and (given < 0 or (given == 0 and key != "latency") or not math.isfinite(given)):
            raise refusal(name, given, "is not positive", f"leave it out, or a number such as {EXAMPLES[key]}")
    others = {"--ranks": ranks, "--find-budget": find_budget, "--gpu-memory": gpu_memory}
    for name, other in others.items():
        if other is not None and scaling is not None:
            raise refusal(name, other, "does not go with --scaling", "one of them")
    if find_budget is not None and ranks is not None:
        raise refusal("--ranks", ranks, "does not go with --find-budget", "one of them")


def _predict(run: TrainingRun, ranks: int, given: dict[str, float | None]) -> Scaling:
    """Return the strong-scaling table of the options given, in their units."""
    from ..planner.scaling import Network, predict

    units = {"bandwidth": 1e9, "network": 1e9, "latency": 1e-6, "gpus_per_node": 1}
    chosen = {key: value * units[key] for key, value in given.items() if key in units and value is not None}
    batch = given["global_batch"]
    return predict(run, ranks, Network(**chosen), given["tflops"], None if batch is None else int(batch))  # type: ignore[arg-type]
