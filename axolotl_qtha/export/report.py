"""The report of an export: as a table, as JSON, and as a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .measure import Measured, ModuleError
from .written import Written

JSON, PICTURE = "export.json", "export.png"
MODULES_SHOWN = 12  # the worst ones; export.json has all


@dataclass
class Report:
    """What was exported, how, and what it cost."""

    format: str
    surrogate: str
    constant: str  # what became of the fitted constants
    rank: int
    text: str  # where the text came from
    fitted_tokens: int
    measured: Measured
    written: Written | None = None  # of the folder, opened again

    def as_dict(self) -> dict[str, Any]:
        """Return what export.json holds; units are in the names or shares of 1."""
        measured = self.measured
        return {
            "format": self.format,
            "surrogate": self.surrogate,
            "constant": self.constant,
            "rank": self.rank,
            "text": self.text,
            "fitted_tokens": self.fitted_tokens,
            "held_out_tokens": measured.tokens,
            "predicted_tokens": measured.predicted,
            "perplexity": {name: model.perplexity for name, model in measured.models.items()},
            "kl_nats_per_token": {name: model.kl for name, model in measured.models.items()},
            "top1_agreement": {name: model.top1 for name, model in measured.models.items()},
            "perplexity_gain_kept": measured.gain_kept,
            "as_written": self.written
            and {
                "model": self.written.base,
                "perplexity": self.written.model.perplexity,
                "kl_nats_per_token": self.written.model.kl,
                "top1_agreement": self.written.model.top1,
                "kl_to_export": self.written.kl,
                "largest_difference": self.written.largest,
            },
            "modules": [dataclasses.asdict(module) for module in measured.modules],
        }

    def write(self, folder: Path) -> None:
        """Write export.json and export.png."""
        (folder / JSON).write_text(json.dumps(self.as_dict(), indent=2) + "\n")
        draw(self.measured.modules, folder / PICTURE)


def model_table(report: Report) -> Table:
    """Return the figures of the whole model."""
    measured = report.measured
    table = Table(
        title=f"{measured.predicted:,} held-out tokens of {report.text}",
        caption=f"KL(QTHA || model) in nats per token. {_verdict(measured)}",
        caption_justify="left",
    )
    for head in ("model", "perplexity", "KL to QTHA", "same first choice as QTHA"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for name, model in measured.models.items():
        table.add_row(name, f"{model.perplexity:,.3f}", f"{model.kl:.2g}", f"{model.top1:.1%}")
    return table


def written_line(written: Written) -> str:
    """Return what the written folder gives, in words."""
    return (
        f"Opened again from its files, {written.base} has a perplexity of {written.model.perplexity:,.3f}; KL(export || it) is "
        f"{written.kl:.2g} nats per token, no log-probability is off by more than {written.largest:.2g}."
    )


def module_table(report: Report) -> Table:
    """Return the layers with the largest errors."""
    modules = sorted(report.measured.modules, key=lambda module: -module.export)
    shown = modules[:MODULES_SHOWN]
    rest = "" if len(modules) == len(shown) else f" The worst {len(shown)} of {len(modules)}; all are in {JSON}."
    table = Table(
        title="error of the adapters' outputs",
        caption=f"Relative to the output. circuit left out: error of the linear part W_C alone.{rest}",
        caption_justify="left",
    )
    for head in ("layer", "export", "circuit left out"):
        table.add_column(head, justify="left" if head == "layer" else "right")
    for module in shown:
        table.add_row(module.name, f"{module.export:.1%}", f"{module.linear_part:.1%}")
    return table


def _verdict(measured: Measured) -> str:
    if measured.gain_kept is None:
        return "The adapter did not lower the perplexity of this text: there is no gain to keep."
    return f"The export keeps {measured.gain_kept:.1%} of the perplexity gained over the base."


def draw(modules: list[ModuleError], path: Path) -> None:
    """Draw the error of every layer: a line for each kind of layer, over the model's depth."""
    from matplotlib.figure import Figure  # with a canvas of its own: pyplot's state is the caller's
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, list[tuple[float, ModuleError]]] = {}
    for module in modules:
        index = re.search(r"\.(\d+)\.", module.name)
        kinds.setdefault(module.name.rsplit(".", 1)[-1], []).append((int(index.group(1)) if index else math.nan, module))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, found in kinds.items():
        depths = [depth if math.isfinite(depth) else i for i, (depth, _) in enumerate(found)]
        (line,) = axes.plot(depths, [module.export for _, module in found], marker="o", label=kind)
        axes.plot(depths, [module.linear_part for _, module in found], marker="x", linestyle=":", color=line.get_color())
    axes.plot([], [], marker="o", color="grey", label="export")
    axes.plot([], [], marker="x", linestyle=":", color="grey", label="circuit left out")
    axes.set(xlabel="layer of the model", ylabel="relative error of the adapter's output", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
