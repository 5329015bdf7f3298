"""What is seen while jobs are waited for."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from .service import LocalService

LOG = logging.getLogger(__name__)
AGAIN_SECONDS = 600  # after which the log says the same again


@contextlib.contextmanager
def progress(service: LocalService, jobs: dict[str, Any]) -> Iterator[Callable[[dict[str, str], float], None]]:
    """Yield what shows the states of jobs, by tag, and the seconds waited: a line that changes in a terminal, else the log.

    Args:
        service: where they run.
        jobs: the jobs, by tag.
    """
    console, last, told = Console(stderr=True), "", 0.0
    with console.status("") if console.is_terminal else contextlib.nullcontext() as status:

        def show(states: dict[str, str], elapsed: float) -> None:
            nonlocal last, told
            text = f"{service.name}: " + ", ".join(f"{n} {name.lower()}" for name, n in sorted(Counter(states.values()).items()))
            if queued := [tag for tag, name in states.items() if name == "QUEUED"]:
                with contextlib.suppress(Exception):  # it is only shown
                    if (place := service.queue_position(jobs[queued[0]])) is not None:
                        text += f", place {place} in the queue"
            if status is not None:
                status.update(f"{text}, {elapsed:,.0f} s")
            elif not service.local and (text != last or elapsed - told >= AGAIN_SECONDS):
                LOG.info(f"{text}, after {elapsed:,.0f} s")
                last, told = text, elapsed

        yield show
