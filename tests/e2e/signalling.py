"""An Axolotl plugin for the tests: raises, or sends this process a signal, at the beginning of a step."""

import os
import signal

from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

PLUGIN = "tests.e2e.signalling.At"


class Stumbled(RuntimeError):
    """A run ends here, as by a kill: nothing is saved."""


class At(BasePlugin):
    """QTHA_AT=<step>:<SIGINT, SIGTERM or raise>[,<the same>...]: what comes in which step, the first of which is 1."""

    def add_callbacks_pre_trainer(self, cfg, model):
        return [_Callback(os.environ.get("QTHA_AT", ""))]


class _Callback(TrainerCallback):
    def __init__(self, text):
        self._plan = [part.split(":") for part in text.split(",") if part]

    def on_step_begin(self, args, state, control, **_):
        for step, what in self._plan:
            if int(step) == state.global_step + 1:
                if what == "raise":
                    raise Stumbled
                os.kill(os.getpid(), getattr(signal, what))
