"""Processes that fork commands, which saves them the imports: the tests' side of `server.py`."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from .commands import REPOSITORY, with_tools


class Server:
    """One process that forks others, started when it is first needed."""

    def __init__(self, **env: str) -> None:
        """Remember the environment variables that it is to have besides this process's."""
        self.env = env
        self.running: tuple[subprocess.Popen[str], TextIO] | None = None

    def run(self, command: list[str], cwd: Path, log: Path, processes: list[dict[str, str]], killed: bool = False) -> list[int]:
        """Run a command in one process or several, and return their exit codes.

        Args:
            command: `axolotl ...` or `python -m ...`, with no input.
            cwd: where.
            log: what they print is appended to it.
            processes: environment variables of each.
            killed: whether one of them is to be killed, and the others with it.
        """
        self.running = self.running or self._start()
        server, answers = self.running
        assert server.stdin
        job = {"command": command, "cwd": str(cwd), "log": str(log), "processes": processes, "killed": killed}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes: list[int] = json.loads(answers.readline())
        return codes

    def _start(self) -> tuple[subprocess.Popen[str], TextIO]:
        answers, write = os.pipe()
        command = [sys.executable, str(Path(__file__).with_name("server.py")), str(write)]
        server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            pass_fds=[write],
            cwd=REPOSITORY,
            env=with_tools(**self.env),
        )
        os.close(write)
        return server, os.fdopen(answers)

    def stop(self) -> None:
        """End the process."""
        if self.running:
            server, answers = self.running
            server.kill()
            server.wait()
            answers.close()


class Commands(Server):
    """Runs commands as `commands.run` does, forked."""

    def __call__(self, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run `axolotl ...` on one process, or `python -m ...`; its output is in `stdout`."""
        launched = command[1] in ("train", "evaluate", "inference")  # to run in the forked process itself
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            (code,) = self.run([*command, *(("--launcher", "python") if launched else ())], cwd, log, [{}])
            return subprocess.CompletedProcess(command, code, log.read_text())
