"""The programs that read exports, each a Python process in an environment of its own, and what they are asked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..e2e.commands import QUICKSTART
from .models import VOCABULARY

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "axolotl-qtha" / "clients"
ENVIRONMENTS = Path(os.environ.get("QTHA_CLIENTS") or CACHE).expanduser()  # as environments.sh has it
PRINTABLE = 32  # a token that is a character, ">"
# Float32 with sums in another order: log-probabilities of -10 to -20 have steps of 1e-6, and each of some 20 products of matrices
# adds a few. Seen: at most 2e-5. An adapter left out, or scaled by 1.01, is far above.
TOLERANCE = 1e-4

Answers = dict[str, dict[str, Any]]


def interpreter(client: str) -> Path:
    """Return the Python of a client's environment, and skip the test where there is none.

    PEFT is in this environment as well: in_peft.py keeps this package from being imported.
    """
    python = ENVIRONMENTS / client / "bin" / "python"
    if (ENVIRONMENTS / client / "complete").exists():
        return python
    if client == "peft":
        return Path(sys.executable)
    pytest.skip(f"no {ENVIRONMENTS / client}: make it with `bash tests/clients/environments.sh {client}` (needs pip's index)")


def whole_table() -> bool:
    """Return whether all exports are made: where PEFT has its environment; elsewhere, as in `.ci/run`, one adapter's."""
    return (ENVIRONMENTS / "peft" / "complete").exists()


def ask(client: str, runs: dict[str, dict[str, Any]], prompts: list[list[int]], folder: Path) -> Answers:
    """Have a client compute log-probabilities.

    Args:
        client: `peft`, `vllm` or `llamacpp`.
        runs: by a name, `model` and `lora`: folders, `lora` may be None; further options of that client's script.
        prompts: token ids.
        folder: an empty one for its files.

    Returns:
        By the same names, `logprobs`: of each prompt those of its tokens but the first; or `error`, the client's words.
    """
    python = interpreter(client)
    job, answers = folder / "job.json", folder / "answers.json"
    job.write_text(json.dumps({"runs": runs, "prompts": prompts, "vocabulary": VOCABULARY, "printable": PRINTABLE}))
    done = subprocess.run(
        [str(python), str(HERE / f"in_{client}.py"), str(job), str(answers)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return json.loads(answers.read_text())


def difference(one: list[list[float]], other: list[list[float]]) -> float:
    """Return the largest difference of two answers' log-probabilities, in nats."""
    return max(abs(x - y) for row, others in zip(one, other, strict=True) for x, y in zip(row, others, strict=True))


def prompts(count: int = 2, length: int = 20) -> list[list[int]]:
    """Return the beginnings of some texts that the quickstart holds out, as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    rows = (QUICKSTART / "data" / "validation.jsonl").read_text().splitlines()
    return [tokenizer(json.loads(row)["output"])["input_ids"][:length] for row in rows[:count]]
