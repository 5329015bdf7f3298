"""What the scripts that run in the clients' environments share: `python in_CLIENT.py JOB ANSWERS`, see clients.py."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

JOB = json.loads(Path(sys.argv[1]).read_text())


def answer(run: Callable[..., list[list[float]]]) -> None:
    """Write what `run(name, **options)` returns for each of the job's runs, or the error it raises."""
    answers = {}
    for name, options in JOB["runs"].items():
        try:
            answers[name] = {"logprobs": run(name, **options)}
        except Exception as error:  # whatever a client says is what the test is about
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(answers))
