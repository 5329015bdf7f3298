"""The processes that run a suite's jobs: forked from one that has done the imports, or new ones where there is a GPU.

A process that has looked for GPUs cannot be forked into one that uses them; there the imports are a small part of a run.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..tasks import TASKS, Prepared
from . import results
from .block import Block, ready

IMPORTS = ["axolotl.cli.train", "axolotl.train", "axolotl.core.builders", "axolotl.loaders", "axolotl.utils.data"]
IMPORTS += ["axolotl_qtha.plugin", "bitsandbytes", "peft", "transformers.trainer", "trl"]
POLL_SECONDS = 0.1
STOPS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Job:
    """One run, in words that another process understands."""

    cell: dict[str, Any]  # task, adapter, rank, budget, learning_rate, seed
    task: str | dict[str, Any]  # name, or block
    base: str
    data: str  # folder of the tasks' data
    keys: dict[str, Any]  # Axolotl's, without those of the task
    settings: str  # fingerprint
    config: dict[str, Any]  # `keys` and those of the task, without paths
    scratch: str
    result: str
    predictions: str  # file of the answers
    log: str
    threads: int | None

    def prepared(self) -> Prepared:
        """Return the task; its data are made if they are not there."""
        return ready(TASKS[self.task] if isinstance(self.task, str) else Block(**self.task), self.base, Path(self.data))


def run(job: Job) -> None:
    """Do a job; its result is a file."""
    from .cell import run_cell

    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    task = job.prepared()
    info = run_cell({**job.keys, **task.keys()}, task, Path(job.scratch), job.threads)
    if info["error_msg"]:
        print(info["error_msg"])
    if answers := info.pop("answers", None):  # first: where there is a result, they are there
        results.write_lines(answers, Path(job.predictions))
    results.write(results.make(job.cell, job.settings, job.config, info, created), Path(job.result))


def failed(job: Job, why: str) -> None:
    """Write the result of a job whose process left none."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    info = {"status": "failed", "metrics": [], "error_msg": why}
    results.write(results.make(job.cell, job.settings, job.config, info, created), Path(job.result))


def has_gpu() -> bool:
    """Return whether there is a GPU, without starting CUDA in this process."""
    import torch

    return bool(torch.cuda.device_count())


@dataclass
class Running:
    """A job under way: a process that was forked, or a new one."""

    job: Job
    pid: int
    started: float  # by time.monotonic
    process: subprocess.Popen[bytes] | None = None  # kept: once forgotten, subprocess itself may take its exit code

    def code(self, wait: bool = False) -> int | None:
        """Return the exit code, negative for a signal; None while it runs, unless it is waited for."""
        if self.process is not None:
            return self.process.wait() if wait else self.process.poll()
        ended, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    def kill(self) -> None:
        """End it, and the processes it has started."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(self.pid, signal.SIGKILL)
        self.code(wait=True)


class Processes:
    """Runs jobs in processes of their own, a number of them at a time.

    Args:
        count: of jobs at a time; it may be changed between two of them.
        fork: whether a process is forked or a new one.
        end: when jobs under way are stopped, as `time.monotonic` has it.
        expected: how long a job is expected to take at least, in seconds; the longest of those done here counts, too.
    """

    def __init__(self, count: int, fork: bool, end: float = math.inf, expected: float = 0.0) -> None:
        self.count, self.fork, self.end, self.expected = count, fork, end, expected
        self.stopped = 0  # jobs that were under way at the end
        self._running: list[Running] = []

    def run(self, jobs: list[Job]) -> Generator[Job]:
        """Do jobs, and yield each when its process has ended. Left early, or at `end`, those under way are killed.

        A job that is not expected to have ended by then is not started.
        """
        waiting = list(jobs)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.count and self.may_start():
                    with held():
                        self._running.append(self._start(waiting.pop(0)))
                if (job := self._ended()) is None:
                    self.stopped += len(self._running)
                    return
                yield job
        finally:
            for each in self._running:
                each.kill()
            self._running.clear()

    def may_start(self) -> bool:
        """Return whether a job is expected to end in time."""
        return time.monotonic() + self.expected < self.end

    def _ended(self) -> Job | None:
        """Wait for one of the jobs to end, and leave other children alone. None at `end`, or if there is none."""
        while self._running:
            for each in self._running:
                if (code := each.code()) is None:
                    continue
                self._running.remove(each)
                self.expected = max(self.expected, time.monotonic() - each.started)
                job = each.job
                if not Path(job.result).exists():
                    how = f"signal {-code}" if code < 0 else f"code {code}"
                    failed(job, f"its process ended with {how}, see {Path(job.log).name}")
                return job
            if time.monotonic() >= self.end:
                return None
            time.sleep(POLL_SECONDS)
        return None

    def _start(self, job: Job) -> Running:
        started = time.monotonic()
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        for file in (job.result, job.predictions):
            Path(file).unlink(missing_ok=True)
        if not self.fork:
            command = [sys.executable, "-m", "axolotl_qtha.bench.suite.worker", json.dumps(asdict(job))]
            with open(job.log, "w") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            return Running(job, process.pid, started, process)
        if child := os.fork():
            with contextlib.suppress(OSError):  # the child may have been faster, or be gone
                os.setpgid(child, child)
            return Running(job, child, started)
        code = 1
        try:
            os.setpgid(0, 0)  # what kills it kills its own processes; a terminal's Ctrl-C is the parent's to handle
            end_with_parent()
            for number in STOPS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
                os.dup2(os.open(job.log if descriptor else os.devnull, flags, 0o644), descriptor)
            os.dup2(1, 2)
            run(job)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold back what stops a suite, so that no process is started and forgotten."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone, were it by SIGKILL; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def import_all() -> None:
    """Import what a run needs, before forking."""
    for name in IMPORTS:
        importlib.import_module(name)


if __name__ == "__main__":
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    run(Job(**json.loads(sys.argv[1])))
