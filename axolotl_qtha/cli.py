"""Commands added to `axolotl` (entry point group `axolotl.cli_commands`)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import PrivateSettings, refusal

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault

    from .circuit.ansatz import Ansatz
    from .planner.scaling import Scaling
    from .tuner.config import QTHAConfig

EXAMPLES = {"global_batch": 256, "tflops": 400, "bandwidth": 300, "network": 50, "latency": 10, "gpus_per_node": 8}


@click.command("qtha-config-schema")
@click.option("--format", "output_format", type=click.Choice(["json", "yaml"]), default="yaml", show_default=True)
@click.option("--field", help="Show one key of the `qtha:` block only, e.g. `rank`.")
def config_schema(output_format: str, field: str | None) -> None:
    """Describe every key of the `qtha:` block.

    Axolotl's own `config-schema` shows Axolotl's keys only: it loads no plugin.
    """
    from .errors import close_names
    from .settings.args import QTHABlock

    schema = QTHABlock.model_json_schema()
    if field is not None:
        properties = schema["properties"]
        if field not in properties:
            close = close_names(field, properties) or sorted(properties)
            raise click.BadParameter(f"{field!r} is not a key of the `qtha:` block. What works: {', '.join(close)}.")
        schema = {field: properties[field]}
    if output_format == "json":
        click.echo(json.dumps(schema, indent=2))
        return
    import yaml

    click.echo(yaml.safe_dump(schema, sort_keys=False, width=110, allow_unicode=True).rstrip())


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
    from .planner.estimate import find_settings, local_gpus, make_plan
    from .planner.show import console, show_plan, show_scaling, show_settings
    from .settings.args import adapter_config
    from .settings.meta_base import read_config

    with _errors():
        _check_plan(find_budget, gpu_memory, ranks, scaling, predicted)
        cfg = read_config(config)
        if find_budget is not None:
            settings = find_settings(cfg, find_budget)
            show_settings(settings, find_budget, adapter_config(cfg).rank, console())
            content: object = [dataclasses.asdict(row) for row in settings]
        elif scaling is not None:
            table = _predict(cfg, scaling, predicted)
            show_scaling(table, console())
            content = dataclasses.asdict(table)
        else:
            gpus = [("a GPU", int(gpu_memory * 2**30))] if gpu_memory else local_gpus()
            result = make_plan(cfg, gpus, ranks=ranks)
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


def _predict(cfg: DictDefault, ranks: int, given: dict[str, float | None]) -> Scaling:
    """Return the strong-scaling table of the options given, in their units."""
    from .planner.scaling import Network, predict

    units = {"bandwidth": 1e9, "network": 1e9, "latency": 1e-6, "gpus_per_node": 1}
    chosen = {key: value * units[key] for key, value in given.items() if key in units and value is not None}
    batch = given["global_batch"]
    return predict(cfg, ranks, Network(**chosen), given["tflops"], None if batch is None else int(batch))  # type: ignore[arg-type]


@click.command("qtha-draw")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write a picture to FILE (.png, .pdf, .svg)."
)
@click.option(
    "--backend",
    default=None,
    help="Gates to count in: `simulator` (RY, RZ, CX) or an IBM device as `fake:NAME`, e.g. fake:torino.  [default: that of "
    "noise_model, else simulator]",
)
def draw(config: Path, output: Path | None, backend: str | None) -> None:
    """Draw the circuit of CONFIG, and count its gates before and after transpiling."""
    with _errors():
        from .circuit.draw import SIMULATOR, costs, picture, table, text
        from .planner.show import console

        settings, circuit = _circuit(config)
        out = console()
        if backend is None:
            backend = settings.noise_model if settings.noise_model.startswith("fake:") else SIMULATOR
        rows = costs(circuit, backend)
        out.print(text(circuit, out.width), markup=False, highlight=False, soft_wrap=True)
        out.print(table(rows))
        if output:
            picture(circuit, output)
            out.print(f"{output} written.", markup=False, highlight=False)


@click.command("qtha-export")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; it must not exist, or be empty.")
@click.option(
    "--format",
    type=click.Choice(["lora", "merged"]),
    default="lora",
    show_default=True,
    help="`lora`: a LoRA adapter for PEFT, vLLM and llama.cpp; `merged`: the whole model.",
)
@click.option("--lora-model-dir", type=click.Path(path_type=Path), help="The trained adapter.  [default: output_dir]")
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="Text to fit to (.txt, .jsonl).  [default: the config's data]"
)
@click.option("--tokens", type=int, default=32768, show_default=True, help="Tokens of text to fit to.")
@click.option(
    "--surrogate",
    type=click.Choice(["linear", "wide", "distilled"]),
    default="linear",
    show_default=True,
    help="What stands in for the circuit: least squares in its r inputs; in all inputs of a layer; or the first, trained on "
    "until the model predicts the same.",
)
@click.option(
    "--constant",
    type=click.Choice(["auto", "bias", "drop"]),
    default="auto",
    show_default=True,
    help="Where the fit's constants go: `auto` into what vLLM and llama.cpp can read, `bias` into LoRA biases, which only PEFT "
    "can, `drop` nowhere.",
)
@click.option("--max-kl", type=float, default=0.1, show_default=True, help="Fail above this KL(QTHA || export), nats per token.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
def export(**options: Any) -> None:
    """Write the trained adapter of CONFIG as a plain LoRA or a merged model, and what that costs on held-out text."""
    with _errors():
        from .export.command import Options, export
        from .planner.show import console

        export(Options(**options), console())


@click.command("qtha-verify")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", type=click.IntRange(min=1), default=4, show_default=True, help="Random inputs.")
@click.option("--tolerance", type=click.FloatRange(min=0, min_open=True), default=1e-5, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random angles.")
def verify(config: Path, tokens: int, tolerance: float, seed: int) -> None:
    """Compare every circuit engine of this machine with Qiskit, on the circuit of CONFIG; exits with 1 if one is off."""
    with _errors():
        from .bench.verify import compare, table, verdict
        from .planner.show import console

        settings, circuit = _circuit(config)
        rows = list(compare(circuit, settings.simulation, tokens, tolerance, seed))
        out = console()
        out.print(table(rows, circuit))
        out.print(verdict(rows, tolerance), markup=False, highlight=False)
    if not all(row.passed for row in rows):
        raise SystemExit(1)


@click.command("qtha-estimate")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--steps", type=click.IntRange(min=1), help="Training steps.  [default: max_steps]")
@click.option("--tokens", type=click.IntRange(min=1), default=100, show_default=True, help="Tokens of inference.")
def estimate(config: Path, steps: int | None, tokens: int) -> None:
    """Say what CONFIG will cost on IBM Quantum: circuits, jobs, QPU seconds. Nothing is submitted. Exits with 1 above the cap."""
    with _errors():
        from .ibm.cost import estimate_config, explain, table
        from .planner.show import console
        from .settings.meta_base import read_config

        result = estimate_config(read_config(config), steps, tokens)
        out = console()
        out.print(table(result))
        out.print(explain(result), markup=False, highlight=False)
    if result.over is not None:
        raise SystemExit(1)


@click.command("qtha-hardware-eval")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--samples", type=int, default=8, show_default=True, help="Prompts and answers of the evaluation data.")
@click.option("--tokens", type=int, help="Run the circuits of the last this many tokens of each sample.  [default: all]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to.  [default: output_dir/hardware-eval]")
@click.option("--lora-model-dir", type=click.Path(path_type=Path), help="The trained adapter.  [default: output_dir]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier evaluation.")
def hardware_eval(**options: Any) -> None:
    """Evaluate the trained adapter of CONFIG on its `ibm:` device, beside exact circuits, shots alone, and a noise model.

    The answers are those of the data; circuits are run for every token in every adapted layer. The cost is shown first, and
    nothing is submitted above max_qpu_seconds.
    """
    with _errors():
        from .hardware_eval.command import Options, hardware_eval
        from .ibm.runner import JobFailed
        from .planner.show import console

        try:
            hardware_eval(Options(**options), console())
        except JobFailed as error:
            raise click.ClickException(str(error)) from error


@click.command("qtha-bench")
@click.argument("suite", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at a time.  [default: the suite's]")
@click.option("--dry-run", is_flag=True, help="List what would be run, with the parameters of each adapter.")
@click.option("--summary-only", is_flag=True, help="Write the summary of the results that are there.")
@click.option("--overwrite", is_flag=True, help="Run all again.")
def bench(suite: Path, jobs: int | None, dry_run: bool, summary_only: bool, overwrite: bool) -> None:
    """Train LoRA, QTHA and its controls as SUITE says, and compare them: summary.md, a JSON file for each run, pictures.

    What was done is not done again: the same line goes on after a stop. Exits with 1 if a run failed.
    """
    with _errors():
        from .bench.suite.command import Options, bench
        from .planner.show import console

        complete = bench(Options(suite, jobs, dry_run, summary_only, overwrite), console())
    if not complete:
        raise SystemExit(1)


@click.command("qtha-report")
@click.argument("folder", metavar="OUTPUT_DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Picture to write.  [default: qtha-report.png there]"
)
def report(folder: Path, output: Path | None) -> None:
    """Draw what the adapters did in a training, from the log in OUTPUT_DIR or its last checkpoint."""
    with _errors():
        from .planner.show import console
        from .training.diagnostics_report import draw, read_log, table

        rows = read_log(folder)
        path = output or folder / "qtha-report.png"
        draw(rows, path)
        out = console()
        out.print(table(rows))
        out.print(f"{path} written.", markup=False, highlight=False)


def _circuit(config: Path) -> tuple[QTHAConfig, Ansatz]:
    """Return the adapter of a configuration and its circuit."""
    from .settings.args import adapter_config
    from .settings.meta_base import read_yaml
    from .tuner.sizes import ansatz

    settings = adapter_config(read_yaml(config))
    if not settings.has_circuit:
        raise refusal("quantum", settings.quantum, "runs no circuit", "`quantum: qtha`, `frozen` or `qwthn`")
    return settings, ansatz(settings)


@contextmanager
def _errors() -> Iterator[None]:
    """Show what is wrong with a configuration, without a traceback."""
    try:
        yield
    except (ValueError, PrivateSettings) as error:
        raise click.ClickException(str(error)) from error
