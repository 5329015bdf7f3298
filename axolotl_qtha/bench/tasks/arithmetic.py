"""Word problems of addition and subtraction with a chain of thought, made here; scored as the paper scores its maths set."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answers import prompts, together, write_answers
from .task import Metric, Row, Scored, Scores, Scoring, Task, write_rows

SEED = 42
COUNTS = {"train": 2000, "validation": 80, "test": 80}
MOST = 9  # no number of a problem, nor result of a step, is larger
NEW_TOKENS = 48
NAMES = ("Ann", "Ben", "Eva", "Max", "Tom", "Sue")
THINGS = ("apples", "books", "cards", "eggs", "keys", "pens")
MORE = ("gets {} more", "buys {} more", "finds {} more")
LESS = ("loses {}", "sells {}", "gives away {}")
STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
ANSWER = re.compile(r"The answer is (\d+)\.")


@dataclass(frozen=True)
class Problem:
    """A number, and what is added to it or taken away."""

    start: int
    changes: tuple[int, ...]  # in their order, those taken away negative

    @property
    def steps(self) -> list[tuple[int, str, int, int]]:
        """Return the steps of the chain: left, sign, right, result."""
        steps, value = [], self.start
        for change in self.changes:
            steps.append((value, "+" if change > 0 else "-", abs(change), value + change))
            value += change
        return steps

    @property
    def answer(self) -> int:
        """Return the result of the last step."""
        return self.start + sum(self.changes)

    @property
    def solution(self) -> str:
        """Return the whole answer as it is to be written."""
        chain = " ".join(f"{left} {sign} {right} = {result}." for left, sign, right, result in self.steps)
        return f"{chain} The answer is {self.answer}."


def problems() -> list[Problem]:
    """Return all problems of one or two steps, no number below 1."""
    values = range(1, MOST + 1)
    one = [Problem(a, (b - a,)) for a in values for b in values if a != b]
    two = [Problem(a, (b - a, c - b)) for a in values for b in values for c in values if a != b != c]
    return one + two


def row(problem: Problem, generator: random.Random) -> Row:
    """Return a problem in words (alpaca fields)."""
    name, thing = generator.choice(NAMES), generator.choice(THINGS)
    told = [generator.choice(MORE if change > 0 else LESS).format(abs(change)) for change in problem.changes]
    question = f"{name} has {problem.start} {thing} and {', then '.join(told)}. How many {thing} are left?"
    return {"instruction": question, "input": "", "output": problem.solution}


def write(base: Path, folder: Path) -> None:
    """Write the three sets. Problems held out have two steps and numbers of their own; those of the training set come up again in
    other words.
    """
    generator = random.Random(SEED)
    known = problems()
    held_out = generator.sample(
        [problem for problem in known if len(problem.changes) == 2], COUNTS["validation"] + COUNTS["test"]
    )
    chosen = {
        "train": generator.choices(sorted(set(known) - set(held_out), key=known.index), k=COUNTS["train"]),
        "validation": held_out[: COUNTS["validation"]],
        "test": held_out[COUNTS["validation"] :],
    }
    write_rows(folder, **{name: [row(problem, generator) for problem in each] for name, each in chosen.items()})


def score(model: Any, tokenizer: Any, rows: list[Row]) -> Scored:
    """Return the shares of answers that are right, and complete."""
    written, true = write_answers(model, tokenizer, rows, NEW_TOKENS), [row["output"] for row in rows]
    marked = [marks(answer, solution) for answer, solution in zip(written, true, strict=True)]
    return Scored(grade(written, true), together(prompts(rows), written, true, marked))


def grade(written: list[str], true: list[str]) -> Scores:
    """Return the means of what `marks` says of each answer."""
    marked = [marks(answer, solution) for answer, solution in zip(written, true, strict=True)]
    return {name: sum(mark[name] for mark in marked) / len(marked) for name in METRICS}


def marks(written: str, true: str) -> dict[str, bool]:
    """Return which of METRICS an answer fulfils, given the solution."""
    steps, answers = STEP.findall(written), ANSWER.findall(written)
    wanted, answer = STEP.findall(true), ANSWER.findall(true)[0]
    complete = len(answers) == 1 and written.rstrip().endswith(f"The answer is {answers[0]}.")
    numbers = re.findall(r"\d+", written)
    return {
        "strict_accuracy": complete and answers[0] == answer and steps == wanted,
        "accuracy": bool(numbers) and numbers[-1] == answer,
        "answer_completeness": complete,
        "chain_of_thought_completeness": len(steps) >= len(wanted),
    }


METRICS = {
    "strict_accuracy": Metric("answers whose every step and final line are those of the solution", "share of 1"),
    "accuracy": Metric("answers whose last number is the right one", "share of 1"),
    "answer_completeness": Metric("answers that end with one line 'The answer is N.', right or wrong", "share of 1"),
    "chain_of_thought_completeness": Metric(
        "answers with at least as many equations as the solution, right or wrong", "share of 1"
    ),
}
ARITHMETIC = Task(
    "arithmetic",
    "word problems with a chain of thought",
    {"ds_type": "json", "type": "alpaca"},
    {"sequence_len": 192, "train_on_inputs": False},
    write,
    Scoring(METRICS, score),
)
