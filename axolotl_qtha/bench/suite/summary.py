"""summary.md: what was run, and what it shows, in tables and sentences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .adapters import ADAPTERS, CONTROLS, EQUAL, LORA
from .execution import Execution
from .plots import PICTURES, draw
from .statistics import LEVEL
from .table import Difference, Entry, differences, entries

FILE = "summary.md"
SHARE = 0.24  # of LoRA's parameters: the paper's claim
MIB = 2**20


def write_summary(execution: Execution, command: str) -> Path:
    """Write summary.md and the pictures, and return its path.

    Args:
        execution: the suite.
        command: that made the results.

    Raises:
        ValueError: if there are no results.
    """
    found = entries(execution)
    if not any(entry.runs for entry in found):
        raise ValueError(f"output_dir: {execution.folder} holds no results. What works: the command without --summary-only.")
    path = execution.folder / FILE
    path.write_text(summary(execution, found, command))
    draw(found, execution)
    return path


def summary(execution: Execution, found: list[Entry], command: str) -> str:
    """Return the text of summary.md."""
    parts = [f"# {Path(command.split()[-1]).stem}", _made(execution, found, command), _goal(found)]
    for task in execution.suite.task_names:
        of_task = [entry for entry in found if entry.task == task]
        parts += [
            f"## {task}: {execution.prepared(task).title}",
            _table(execution, task, of_task),
            _notes(execution, task, of_task),
        ]
        parts += [_differences(of_task), _by_step(of_task), f"![{task}](curves-{task}.png)"]
    parts += [_adds(found), "## Sizes, time and memory", *(f"![{name}]({name})" for name in PICTURES), _adapters(execution)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(execution: Execution, found: list[Entry], command: str) -> str:
    suite = execution.suite
    meta = next(run["meta_info"] for entry in found for run in entry.runs.values())
    versions = ", ".join(f"{name} {version}" for name, version in meta["package_info"].items())
    system = meta["system_info"]
    rates = ", ".join(f"{rate:g}" for rate in suite.learning_rates)
    at = f"at seed {suite.seeds[0]}" if suite.select == "first_seed" else "over all seeds"
    return (
        f"Made by `{command}` on {system['accelerator']} ({system['cores']} cores, {system['machine']}), {versions}.\n\n"
        f"{suite.max_steps} steps each. Every adapter had the same learning rates ({rates}); the one with the least validation "
        f"loss {at} was run at {len(suite.seeds)} seeds. Test sets chose nothing. Figures are means over "
        "seeds ± half the 95 % interval (Student's t); losses in nats a token, lower is better."
    )


def _goal(found: list[Entry]) -> str:
    """Return whether QTHA is as good as LoRA of its rank, and better than LoRA of its size, by task."""
    rows, better = [], []
    for difference in differences(found):
        if difference.ours.method.adapter != "qtha":
            continue
        ours, other = difference.ours, difference.other
        if other.method.adapter == EQUAL and difference.value is not None and difference.value.below_zero:
            better.append(ours.task)
        if other.method.adapter != LORA:
            continue
        share = ours.parameters / other.parameters
        if difference.value is None:
            verdict = "**not known**, runs are missing or diverged"
        else:
            fits = share <= SHARE
            met = fits and difference.value.mean <= 0
            verdict = f"**{'met' if met else 'not met'}**: {difference.value.text(sign=True)}"
            verdict += "" if fits else f", with more than {SHARE:.0%} of the parameters"
            sure = difference.value.below_zero or difference.value.above_zero
            verdict += "" if sure or difference.value.half is None else " (not told apart: the interval includes zero)"
        rows.append(
            f"- {ours.task}, {ours.method.label}: {share:.1%} of LoRA's parameters; validation loss less LoRA's {verdict}"
        )
    if not rows:
        return ""
    compared = any(difference.other.method.adapter == EQUAL for difference in differences(found))
    on = ", ".join(sorted(set(better))) or "no task"
    equal = f"\n\nLower than LoRA of the same size with an interval that excludes zero: {on}." if compared else ""
    head = f"## The goal: LoRA's validation loss with at most {SHARE:.0%} of its parameters, at the same rank, layers and steps"
    return f"{head}\n\n" + "\n".join(rows) + equal


def _table(execution: Execution, task: str, found: list[Entry]) -> str:
    scoring = execution.prepared(task).scoring
    metrics = list(scoring.metrics) if scoring else []
    lora = {entry.method.rank: entry.parameters for entry in found if entry.method.adapter == LORA}
    head = ["adapter", "parameters", "of LoRA's", "learning rate", "validation loss", "test loss", *metrics, "seconds", "MiB"]
    rows = []
    for entry in found:
        share = f"{entry.parameters / lora[entry.method.rank]:.1%}" if entry.method.rank in lora else ""
        rate = "" if entry.learning_rate is None else f"{entry.learning_rate:g}{' (edge)' if entry.at_edge else ''}"
        figures = [entry.mean(key) for key in ("valid loss", "test loss", *metrics)]
        texts = ["" if value is None else value.text(3 if i < 2 else 2) for i, value in enumerate(figures)]
        if entry.incomplete:
            texts[0] = entry.incomplete
        seconds = entry.largest("train_time")
        memory = entry.largest("accelerator_memory_max") or entry.largest("cpu_memory_max")
        costs = ["" if seconds is None else f"{seconds:.0f}", "" if memory is None else f"{memory / MIB:,.0f}"]
        rows.append([entry.method.label, f"{entry.parameters:,}", share, rate, *texts, *costs])
    return markdown(head, rows)


def _notes(execution: Execution, task: str, found: list[Entry]) -> str:
    notes = []
    if floor := execution.prepared(task).floor:
        notes.append(
            "No model can do better than the teacher: " + ", ".join(f"{name} {value:.3f}" for name, value in floor.items())
        )
    if any(entry.at_edge for entry in found):
        notes.append("(edge): the best rate of the grid is its first or last, another might be better still.")
    notes += [
        f"{entry.method.label}, learning rate {rate:g}: {words}; not chosen."
        for entry in found
        for rate, words in entry.lost.items()
    ]
    if scoring := execution.prepared(task).scoring:
        notes += [f"{name}: {metric.meaning} ({metric.unit})." for name, metric in scoring.metrics.items()]
    return "\n".join(f"- {note}" for note in notes)


def _differences(found: list[Entry]) -> str:
    rows = []
    tests = {(d.ours.method, d.other.method): d for d in differences(found, "test loss")}
    for difference in differences(found):
        test = tests[difference.ours.method, difference.other.method].value
        rows.append(
            [
                f"{difference.ours.method.label} - {difference.other.method.label}",
                "" if difference.value is None else difference.value.text(sign=True),
                "" if test is None else test.text(sign=True),
                difference.verdict,
            ]
        )
    head = ["paired by seed", "validation loss", "test loss", "validation loss is"]
    return markdown(head, rows) if rows else ""


def _by_step(found: list[Entry]) -> str:
    """Return the differences to LoRA while training goes on."""
    pairs = [(d, d.by_step()) for d in differences(found) if d.other.method.adapter == LORA and d.value]
    steps = sorted({step for _, each in pairs for step in each})
    rows = [
        [
            f"{d.ours.method.label} - {d.other.method.label}",
            *("" if step not in each else each[step].text(sign=True) for step in steps),
        ]
        for d, each in pairs
    ]
    return markdown(["validation loss after steps", *map(str, steps)], rows) if rows else ""


def _adds(found: list[Entry]) -> str:
    """Say what the circuit adds."""
    ours = [d for d in differences(found) if d.ours.method.adapter == "qtha" and d.other.method.adapter in CONTROLS]
    if not ours:
        return ""
    text = "## What the circuit adds\n\n" + "\n".join(f"- {_sentence(difference)}" for difference in ours)
    known = sum(difference.value is not None and difference.value.half is not None for difference in ours)
    chance = f"\n\nOf {known} such intervals {known * (1 - LEVEL):.1f} would exclude zero by chance if nothing differed."
    return text + (chance if known > 1 else "")


def _sentence(difference: Difference) -> str:
    control, value = difference.other.method.adapter, difference.value
    ours, its = (f"{entry.parameters:,}" for entry in (difference.ours, difference.other))
    head = f"{difference.ours.task}, {difference.ours.method.label} ({ours} parameters) against {control} ({ADAPTERS[control]}; "
    head += f"{its} parameters): "
    if value is None or value.half is None:
        return head + difference.verdict + "."
    text = f"validation loss {value.text(sign=True)}; "
    if value.below_zero:
        return head + text + "the trained circuit **lowers** it."
    return head + text + ("the trained circuit **raises** it." if value.above_zero else "the two are **not told apart**.")


def _adapters(execution: Execution) -> str:
    meanings = {name: ADAPTERS[name] for name in execution.suite.adapters}
    meanings |= {name: f"QTHA with {json.dumps(block)}" for name, block in execution.suite.variants.items()}
    return "Adapters: " + "; ".join(f"`{name}` {meaning}" for name, meaning in meanings.items()) + "."


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
