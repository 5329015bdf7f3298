"""Work in a process of its own, and what stops a suite."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .worker import end_with_parent


@contextmanager
def stoppable() -> Iterator[None]:
    """Have SIGTERM stop what is done here as Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def apart(work: Callable[[], None], log: Path) -> str | None:
    """Do work in a process of its own, since one that has computed with several threads cannot be forked; return its error."""
    log.parent.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        try:
            with os.fdopen(reader) as pipe:
                why = pipe.read()
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            _, status = os.waitpid(child, 0)
        return why or (f"its process ended with status {status}" if status else None)
    try:
        end_with_parent()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
    except BaseException as error:
        os.write(writer, str(error).encode()[:4000] or type(error).__name__.encode())
    finally:
        os._exit(0)
