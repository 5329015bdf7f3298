"""summary.md: what was run, and what it shows, in tables and sentences; and the files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import tidy
from .adapters import ADAPTERS, CONTROLS, EQUAL, LORA
from .comparisons import Comparison, comparisons
from .execution import Execution, without_paths
from .plots import PICTURES, draw
from .statistics import LEVEL
from .table import Entry, differences, entries

FILE = "summary.md"
SHARE = 0.24  # of LoRA's parameters: the paper's claim
MIB = 2**20


def write_summary(execution: Execution, command: str) -> Path:
    """Write summary.md, the pictures and what `tidy` writes, and return the summary's path.

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
    tidy.write(execution, comparisons(found, execution.suite.equivalence_margin), command)
    draw(found, execution)
    return path


def summary(execution: Execution, found: list[Entry], command: str) -> str:
    """Return the text of summary.md."""
    made = comparisons(found, execution.suite.equivalence_margin)
    parts = [f"# {Path(command.split()[-1]).stem}", _made(execution, command), _goal(found)]
    for task in execution.suite.task_names:
        of_task = [entry for entry in found if entry.task == task]
        parts += [
            f"## {task}: {execution.prepared(task).title}",
            _table(execution, task, of_task),
            _notes(execution, task, of_task),
        ]
        parts += [_differences([each for each in made if each.difference.ours.task == task])]
        parts += [_by_step(of_task), f"![{task}](curves-{task}.png)"]
    parts += [_adds(made), _tests(made), "## Sizes, time and memory", *(f"![{name}.png]({name}.png)" for name in PICTURES)]
    parts += [_adapters(execution), _files(execution)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(execution: Execution, command: str) -> str:
    suite = execution.suite
    by = tidy.versions(tidy.runs_of(execution))
    system = by[0]["system_info"]
    rates = ", ".join(f"{rate:g}" for rate in suite.learning_rates)
    at = f"at seed {suite.seeds[0]}" if suite.select == "first_seed" else "over all seeds"
    done, total = execution.progress()
    unfinished = "" if done == total else f"**Not finished: {done} of {total} runs are done.**\n\n"
    several = f"\n\n**The runs were not all made alike**; {tidy.ALL} has how many by what:\n\n" if len(by) > 1 else ""
    others = "\n".join(f"- {each['runs']} runs: {_versions(each)}" for each in by) if several else ""
    return (
        f"{unfinished}Made by `{command}` on {system['accelerator']} ({system['cores']} cores, {system['machine']}), "
        f"{_versions(by[0])}."
        f"{several}{others}\n\n"
        f"{suite.max_steps} steps each. Every adapter had the same learning rates ({rates}); the one with the least validation "
        f"loss {at} was run at {len(suite.seeds)} seeds. Test sets chose nothing. Figures are means over "
        "seeds ± half the 95 % interval (Student's t); losses in nats a token, lower is better. The training loss is "
        "that of the last tenth of the steps."
    )


def _versions(made_by: dict[str, Any]) -> str:
    """Return packages and commit in words."""
    words = [f"{name} {version}" for name, version in made_by["package_info"].items()]
    if source := made_by["source_info"]:
        changed = ", with changes that are not in it" if source["dirty"] else ""
        words.append(f"this project's commit {source['commit']}{changed}")
    return ", ".join(words)


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
    head = ["adapter", "parameters", "of LoRA's", "learning rate", "validation loss", "test loss", *metrics]
    head += ["training loss", "seconds", "MiB"]
    rows = []
    for entry in found:
        share = f"{entry.parameters / lora[entry.method.rank]:.1%}" if entry.method.rank in lora else ""
        rate = "" if entry.learning_rate is None else f"{entry.learning_rate:g}{' (edge)' if entry.at_edge else ''}"
        figures = [entry.mean(key) for key in ("valid loss", "test loss", *metrics, "train loss")]
        losses = (0, 1, len(figures) - 1)
        texts = ["" if value is None else value.text(3 if i in losses else 2) for i, value in enumerate(figures)]
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


def _differences(made: list[Comparison]) -> str:
    equivalent = any(each.margin is not None for each in made)
    rows = []
    for each in made:
        ours, other = each.difference.ours.method.label, each.difference.other.method.label
        losses = [each.difference.value, each.test]
        texts = ["" if value is None else value.text(sign=True) for value in losses]
        tests = [_p(each.p), _p(each.p_holm), *([_p(each.p_equivalent), each.equivalent] if equivalent else [])]
        rows.append([f"{ours} - {other}", *texts, *tests, each.verdict])
    same = ["p equivalent", "equivalent"] if equivalent else []
    head = ["paired by seed", "validation loss", "test loss", "p", "p Holm", *same, "validation loss is"]
    return markdown(head, rows) if rows else ""


def _p(value: float | None) -> str:
    """Return a p-value as people write it."""
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _tests(made: list[Comparison]) -> str:
    """Say what the p-values of the tables are, and over how many Holm's correction is."""
    known = [each for each in made if each.p is not None]
    if not known:
        return ""
    margin = known[0].margin
    text = (
        f"## The tests\n\np: of no difference in validation loss (paired by seed, Student's t, two-sided). p Holm: corrected by "
        f"Holm's method for the {len(known)} paired differences of this suite, over all tasks. A difference whose interval "
        "excludes zero and whose corrected p does not go below 0.05 may be one of those that chance makes among so many. "
        "*Not told apart* means that: it does not say that two are the same."
    )
    if margin is None:
        return f"{text} For that, `equivalence_margin` in the suite's YAML asks for a test."
    return (
        f"{text}\n\np equivalent: of a difference of {margin:g} nats a token or more, the suite's `equivalence_margin` (two "
        "one-sided t-tests at 5 %: equivalent where the 90 % interval lies within it), corrected in the same way. "
        f"{sum(each.equivalent.startswith('yes') for each in known)} of {len(known)} pairs are equivalent, "
        f"{sum(each.equivalent == 'yes' for each in known)} of them after Holm's correction."
    )


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


def _adds(made: list[Comparison]) -> str:
    """Say what the circuit adds."""
    both = [(each, each.difference.ours.method.adapter, each.difference.other.method.adapter) for each in made]
    ours = [each for each, mine, its in both if mine == "qtha" and its in CONTROLS]
    if not ours:
        return ""
    text = "## What the circuit adds\n\n" + "\n".join(f"- {_sentence(each)}" for each in ours)
    known = sum(each.p is not None for each in ours)
    chance = f"\n\nOf {known} such intervals {known * (1 - LEVEL):.1f} would exclude zero by chance if nothing differed."
    return text + (chance if known > 1 else "")


def _sentence(made: Comparison) -> str:
    difference, value = made.difference, made.difference.value
    control = difference.other.method.adapter
    ours, its = (f"{entry.parameters:,}" for entry in (difference.ours, difference.other))
    head = f"{difference.ours.task}, {difference.ours.method.label} ({ours} parameters) against {control} ({ADAPTERS[control]}; "
    head += f"{its} parameters): "
    if value is None or value.half is None:
        return head + difference.verdict + "."
    corrected = f" (p {_p(made.p)}, after Holm's correction {_p(made.p_holm)})"
    verdict = "the two are **not told apart**"
    if value.below_zero or value.above_zero:
        verdict = f"the trained circuit **{'lowers' if value.below_zero else 'raises'}** it"
        verdict += "" if made.sure else ", not after the correction"
    same = f", and **equivalent** within {made.margin:g}" if made.equivalent == "yes" else ""
    return f"{head}validation loss {value.text(sign=True)}{corrected}; {verdict}{same}."


def _adapters(execution: Execution) -> str:
    meanings = {name: ADAPTERS[name] for name in execution.suite.adapters}
    common = execution.suite.qtha
    meanings |= {name: f"QTHA with {json.dumps(without_paths(block))}" for name, block in execution.suite.variants.items()}
    every = f" QTHA, its controls and variants have {json.dumps(without_paths(common))}." if common else ""
    return "Adapters: " + "; ".join(f"`{name}` {meaning}" for name, meaning in meanings.items()) + "." + every


def _files(execution: Execution) -> str:
    answers = any((execution.folder / "predictions").glob("*.jsonl"))
    kept = "; `predictions/`: what each run answered to the test set, with the scores of each answer" if answers else ""
    return (
        f"Beside this: `{tidy.RUNS}` (a row for each run and figure), `{tidy.PAIRS}` (the paired differences and their tests), "
        f"`{tidy.ALL}` (both, with settings and versions){kept}; every picture as PNG, PDF and SVG."
    )


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
