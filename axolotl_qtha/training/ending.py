"""How a training ends: once at its last step, and early by Ctrl-C or SIGTERM with a checkpoint and an exit code that says so."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from axolotl.utils.distributed import cleanup_distributed, is_distributed
from axolotl.utils.logging import get_logger
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..ibm.calls import CALLS

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = timedelta(hours=6)  # for a rank that evaluates or saves; one that has ended is noticed at once
AGAIN = 5.0  # seconds in which a launcher repeats a signal to its ranks, to which the terminal has sent it already
LOG = get_logger(__name__)


def guard_ending(trainer: Trainer) -> None:
    """Have the trainer not train on from a checkpoint of the last step, and stop at a signal with a checkpoint."""
    train = trainer.train

    def until_the_end(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, str) and has_ended(Path(resume_from_checkpoint), trainer.args):
            LOG.info(f"{resume_from_checkpoint} is of the last step: nothing is trained, its adapter is saved.")
            trainer._run_epoch, trainer.args.eval_on_start = _no_epoch(trainer), False  # type: ignore[method-assign]
        stop = Stop(trainer)
        trainer.add_callback(stop)
        try:
            with stop.listening():
                result = train(resume_from_checkpoint, *args, **kwargs)
        finally:
            trainer.remove_callback(stop)
            trainer.__dict__.pop("_run_epoch", None)
        if stop.stopped:
            cleanup_distributed()
            _leave(stop.stopped, f"step {trainer.state.global_step} has a checkpoint, from which the run can go on.")
        return result

    trainer.train = until_the_end  # type: ignore[method-assign]


def has_ended(folder: Path, arguments: TrainingArguments) -> bool:
    """Return whether a checkpoint is of the last step that the settings allow.

    Where they count epochs and not steps, the checkpoint knows how many steps its epochs were to have.
    """
    state = json.loads((folder / "trainer_state.json").read_text())
    step, epochs = state["global_step"], state.get("epoch") or 0
    if arguments.max_steps > 0:
        return bool(step >= arguments.max_steps)
    return bool(step >= state["max_steps"] and epochs + 1e-6 >= arguments.num_train_epochs)


def _no_epoch(trainer: Trainer) -> Any:
    """Stand in for an epoch: the host prepares, loads, compares and saves as ever, and takes no step."""

    def run(*_: Any, **__: Any) -> None:
        trainer.control.should_training_stop = True

    return run


class Stop(TrainerCallback):
    """Turns the first signal into a checkpoint at the end of the step, on all ranks at the same one; a second ends at once.

    With `quantum_backend: ibm` a step may wait for the device for hours: its jobs are cancelled at once, and what has come back
    is in the journal, from which the same command takes it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._process = os.getpid()
        self._asked: int | None = None
        self._since = 0.0
        self._group: Any = None
        self.stopped: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals meanwhile; afterwards they do what they did before, but for Axolotl's own handler."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                hosts = getattr(handler, "__module__", None) == "axolotl.train"  # saves, and ends with exit code 0
                signal.signal(number, signal.default_int_handler if hosts else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # one that loads data, which a terminal interrupts with us, and only we end
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        now = time.monotonic()
        if self._asked is None and not CALLS.waiting:
            self._asked, self._since = number, now
            if self._trainer.is_world_process_zero():
                _say(f"{signal.Signals(number).name}: stops after this step, with a checkpoint. Once more: at once, without.")
        elif self._asked is None or now - self._since > AGAIN or "TORCHELASTIC_RUN_ID" not in os.environ:
            _leave(number, "stopped at once: the last checkpoint is the one to go on from.")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make the group in which ranks agree: of the CPU's, so that no step waits for a GPU."""
        if is_distributed() and distributed.get_world_size() > 1 and self._group is None:
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have all ranks save and stop, if one of them was asked to; unless this is the last step anyway."""
        asked = self._asked or 0
        if self._group is not None:
            told = torch.tensor(asked, dtype=torch.int32)
            distributed.all_reduce(told, op=distributed.ReduceOp.MAX, group=self._group)
            asked = int(told)
        if asked:
            self.stopped = asked
            control.should_save = control.should_training_stop = True


def _say(text: str) -> None:
    """Write a line from inside a signal's handler, where logging could wait for itself."""
    os.write(2, f"\n{text}\n".encode())


def _leave(number: int, why: str) -> None:
    """End the process with the code that shells give a signal, 128 more than its number; nothing is saved any more."""
    _say(f"{signal.Signals(number).name}: {why} Exit code {128 + number}.")
    raise SystemExit(128 + number)
