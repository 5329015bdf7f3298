"""`axolotl qtha-export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shown import errors_shown


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
    with errors_shown():
        from ..export.command import ExportOptions, export
        from ..terminal import console

        export(ExportOptions(**options), console())
