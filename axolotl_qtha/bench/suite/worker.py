"""The processes that run a suite's jobs: forked from one that has done the imports, or new ones where there is a GPU.

A process that has looked for GPUs cannot be forked into one that uses them; there the imports are a small part of a run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Generator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..tasks import TASKS, Prepared
from . import results
from .block import Block, ready

IMPORTS = ["axolotl.cli.train", "axolotl.train", "axolotl.core.builders", "axolotl.loaders", "axolotl.utils.data"]
IMPORTS += ["axolotl_qtha.plugin", "bitsandbytes", "peft", "transformers.trainer", "trl"]


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


class Processes:
    """Runs jobs in processes of their own, a number of them at a time."""

    def __init__(self, count: int, fork: bool) -> None:
        self.count, self.fork = count, fork
        self._running: dict[int, Job] = {}

    def run(self, jobs: list[Job]) -> Generator[Job]:
        """Do jobs, and yield each when its process has ended. Left early, those under way are killed."""
        waiting = list(jobs)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.count:
                    job = waiting.pop(0)
                    self._running[self._start(job)] = job
                yield self._ended()
        finally:
            for pid in self._running:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            self._running.clear()

    def _ended(self) -> Job:
        pid, status = 0, 0
        while pid not in self._running:
            pid, status = os.wait()
        job, code = self._running.pop(pid), os.waitstatus_to_exitcode(status)
        if not Path(job.result).exists():
            failed(job, f"its process ended with {f'signal {-code}' if code < 0 else f'code {code}'}, see {Path(job.log).name}")
        return job

    def _start(self, job: Job) -> int:
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        Path(job.result).unlink(missing_ok=True)
        if not self.fork:
            command = [sys.executable, "-m", "axolotl_qtha.bench.suite.worker", json.dumps(asdict(job))]
            with open(job.log, "w") as log:
                return subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                ).pid
        if child := os.fork():
            with contextlib.suppress(OSError):  # the child may have been faster, or be gone
                os.setpgid(child, child)
            return child
        code = 1
        try:
            os.setpgid(0, 0)  # what kills it kills its own processes; a terminal's Ctrl-C is the parent's to handle
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
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


def import_all() -> None:
    """Import what a run needs, before forking."""
    for name in IMPORTS:
        importlib.import_module(name)


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])))
