"""A training with `quantum_backend: ibm`: its steps alone use the device, and log how far it is from the exact simulator."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import refusal
from ..ibm import engine
from ..ibm.calls import CALLS, Difference, pool
from ..ibm.runner import Runner
from ..planner.qpu import estimate, verdict
from ..tuner.sizes import ansatz
from .diagnostics import active_adapters

if TYPE_CHECKING:
    from transformers import Trainer

    from ..tuner.config import QTHAConfig

LOG = logging.getLogger(__name__)
LOG.setLevel(logging.INFO)  # Axolotl shows warnings only; jobs cost money
GENERATING = ("grpo", "gdpo", "ebft")  # values of `rl` whose steps write answers, each token a circuit of its own per layer


def refuse_untrainable(config: QTHAConfig, rl: str | None) -> None:
    """Refuse trainings that could not take a step, or whose circuits nobody can count.

    Raises:
        ValueError: naming the key.
    """
    options = config.ibm
    if options is not None and options.gradient == "none":
        works = "`gradient: parameter_shift` or `spsa`; `axolotl evaluate` and `inference` need none"
        raise refusal("ibm.gradient", "none", "trains nothing", works)
    if options is not None and rl in GENERATING:
        why = f"with `rl: {rl}` would write each answer on the device, token by token, and no estimate counts that"
        raise refusal("quantum_backend", "ibm", why, "train with `quantum_backend: torch`, then evaluate on the device")


def show_inference_cost(config: QTHAConfig, layers: int) -> None:
    """Say what answers will cost before the first is written; above the cap the circuits of a token are refused.

    Args:
        config: the adapter.
        layers: adapted layers: each has a circuit per token.
    """
    run = _runner(config)
    price, left = run.cost(1) * layers, run.remaining()
    assert config.ibm is not None
    prompt = run.cost(config.ibm.tokens_per_step) * layers
    text = (
        f"Each written token takes {price.circuits:,} circuits in {price.jobs:,} jobs on {run.service.name} (one a layer), by "
        f"IBM's formula {price.qpu_seconds:,.1f} QPU seconds; reading a prompt at most {prompt.circuits:,} circuits, "
        f"{prompt.qpu_seconds:,.1f} seconds. "
    )
    if math.isinf(left):
        text += "The device is simulated here, free of charge."
    else:
        text += f"max_qpu_seconds: {config.ibm.max_qpu_seconds:g}, {max(left, 0):,.1f} left: "
        text += f"enough for about {int(max(left - prompt.qpu_seconds, 0) / price.qpu_seconds):,} tokens; then the run stops."
    LOG.info(text)


def _runner(config: QTHAConfig) -> Runner:
    options = config.ibm
    assert options is not None
    return engine.runner(ansatz(config), options, config.simulation.seed)


class TrainOnDevice(TrainerCallback):
    """Lets the device run the steps of a training, and logs QPU - exact with the loss.

    Everything between the steps, evaluations above all, runs on the exact simulator: it costs nothing, and its loss is the exact
    one. `axolotl evaluate` is no training: it runs on the device, and its metrics get the differences.

    The values are pooled over all calls since the last log (layers, micro-batches, steps), each call with its tokens:

    * `qpu_bias`: mean over tokens and qubits of <Z> on the device less the exact <Z>;
    * `qpu_variance`: of the same differences around that mean;
    * `qpu_standard_error`: root mean square of what the device states; its square is the part of the variance due to shots;
    * `qpu_tokens`: tokens run on the device, once for each adapted layer;
    * `qpu_seconds`: used so far by the journal, in all.
    """

    def __init__(self, trainer: Trainer, config: QTHAConfig, tokens: int) -> None:
        """Take over the trainer's `log`: what a callback adds in `on_log` comes too late for `log_history`.

        Args:
            trainer: the one the callback is added to.
            config: the adapter.
            tokens: of a micro-batch, at most.
        """
        self._config, self._tokens, self._parts = config, tokens, list[Difference]()
        self._log = trainer.log
        trainer.log = self._log_differences  # type: ignore[method-assign]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Say what the run will cost, and turn to the exact simulator until the first step."""
        CALLS.take()
        CALLS.on_device = False
        if model is not None:
            self._show_cost(args, state, model)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Turn to the device."""
        CALLS.on_device = CALLS.waiting = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Turn to the exact simulator, and keep the step's differences until they are logged."""
        CALLS.on_device = CALLS.waiting = False
        self._parts += CALLS.take()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Turn to the device again: what comes now was asked for by itself."""
        CALLS.on_device = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the differences of `axolotl evaluate` to its metrics, with their prefix; a training's evaluations have none."""
        if metrics is None or not (parts := CALLS.take()):
            return
        prefix = next((name.removesuffix("loss") for name in metrics if name.endswith("_loss")), "eval_")
        metrics |= {prefix + name: value for name, value in self._values(parts).items()}

    def _log_differences(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._parts:  # the row of the steps
            logs |= self._values(self._parts)
            self._parts = []
        self._log(logs, *args, **kwargs)

    def _values(self, parts: list[Difference]) -> dict[str, float]:
        pooled = pool(parts)
        return {
            "qpu_bias": pooled.mean,
            "qpu_variance": pooled.variance,
            "qpu_standard_error": pooled.standard_error,
            "qpu_tokens": pooled.tokens,
            "qpu_seconds": _runner(self._config).used(),
        }

    def _show_cost(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        run = _runner(self._config)
        layers = sum(adapter.shape.owned.runs for _, adapter in active_adapters(model))
        result = estimate(
            self._config,
            layers,
            run.isa,
            run.service.backend,
            run.service.calibration,
            tokens=self._tokens,
            micro_batches=args.gradient_accumulation_steps,
            steps=state.max_steps - state.global_step,
            used=run.used() + run.journal.under_way(run.service.local),
            evaluated=0,
            asked=0,
        )
        cost = result.run
        assert cost is not None
        LOG.log(
            logging.INFO if result.over is None else logging.WARNING,
            f"{result.steps} steps on {result.backend}: at most {cost.circuits:,} circuits in {cost.jobs:,} jobs, by IBM's "
            f"formula {cost.qpu_seconds:,.1f} QPU seconds. {verdict(result)} Evaluations run on the exact simulator.",
        )
