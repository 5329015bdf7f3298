"""`axolotl qtha-from-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import refusal
from .shown import errors_shown

if TYPE_CHECKING:
    from ..planner.estimate import Plan


@click.command("qtha-from-lora")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write to FILE.  [default: NAME-qtha.yml beside CONFIG]")
@click.option(
    "--param-budget",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.24,
    show_default=True,
    help="Trainable parameters, as a share of LoRA's of the same rank.",
)
@click.option("--force", is_flag=True, help="Write it even so: what has no counterpart stays as a comment.")
def from_lora(config: Path, out: Path | None, param_budget: float, force: bool) -> None:
    """Write CONFIG, a LoRA or QLoRA YAML, again with `adapter: qtha`. Comments and order stay.

    It says what became of each of LoRA's keys, and ends with parameters and memory of the training.
    """
    import yaml

    from ..planner.show import show_in_short
    from ..settings.from_lora import translate
    from ..terminal import console

    with errors_shown():
        out = out or config.with_name(f"{config.stem}-qtha{config.suffix}")
        _check_out(out)
        try:
            with config.open(encoding="utf-8-sig", newline="") as file:  # line ends as they are
                text = file.read()
            made = translate(text, force, param_budget)
        except UnicodeDecodeError as error:
            raise ValueError(f"{config}: is not text in UTF-8 ({error.reason}). What works: an Axolotl YAML.") from error
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from error
        plan, warning = _tried(yaml.safe_load(text), yaml.safe_load(made.text), force)
        try:
            out.write_text(made.text, encoding="utf-8", newline="")
        except OSError as error:
            raise refusal("--out", str(out), f"cannot be written ({error.strerror})", "a folder you may write to") from error
    click.echo(f"{out}: {config.name} with `adapter: qtha`.")
    for line in (", ".join(made.renamed), *made.notes):
        click.echo(f"  - {line}")
    if warning:
        click.echo(warning)
    if plan:
        show_in_short(plan, console())


def _check_out(out: Path) -> None:
    if out.exists():
        raise refusal("--out", str(out), "exists already", "another name, or remove it first")
    if not out.parent.is_dir():
        raise refusal("--out", str(out), "is in no folder that exists", "a folder that does")


def _tried(old: dict[str, Any], new: dict[str, Any], force: bool) -> tuple[Plan | None, str]:
    """Return the plan of the new YAML, or why there is none.

    Raises:
        ValueError: if the new YAML is refused and the old one was not.
    """
    from ..planner.estimate import local_gpus, make_plan
    from ..settings.meta_base import UnknownBase
    from ..settings.training_run import checked, run_of

    valid, why = checked(new)
    if valid is None:
        if also := checked(old)[1]:
            both = why if why == also else f"{why}\nThe one with LoRA: {also}"
            return None, f"Written, but `axolotl train` refuses it here, as it does the YAML with LoRA: {both}"
        if not force:
            raise ValueError(f"with `adapter: qtha` it would be refused: {why}\nTo write it even so, use --force.")
        return None, f"As it is, it is refused: {why}"
    try:
        return make_plan(run_of(valid), local_gpus(), advise=False), ""
    except UnknownBase as error:
        return None, f"No plan: {error}"
    except ValueError as error:
        if not force:
            raise ValueError(f"{error}\nFor another param_budget, use --param-budget; to write it even so, --force.") from error
        return None, f"As it is, it is refused: {error}"
