"""Whether a training trains: each tensor of the adapter is in the optimiser and moves, and the loss stays a number.

Optimisers choose what they update by shape, name and dtype, and say nothing of the rest: Muon skips every tensor with fewer than
two dimensions. A run could end normally and save an adapter that is still the base. Checked are, in order:

1. once the optimiser exists, before DeepSpeed and FSDP2 take it over: each trainable tensor of the adapter is in one group, at a
   learning rate above 0, the circuit's at `circuit_lr`;
2. at the first log after eight steps that could change a tensor: it has changed. Steps at less than half the learning rate do
   not count (a warm-up), nor those whose gradient is so small that they round to nothing, or that fp16's loss scale skips.
   Under ZeRO, which keeps gradients to itself, only 3 is checked;
3. before the first save: the adapter is no longer what it started as, which is nothing;
4. at each log: loss and gradient norm are finite.

On a GPU nothing is read until the trainer has read its loss, and once all tensors have moved nothing is done but 4.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import Diverged
from ..settings.optimisers import WORKS
from ..tuner.adapter import QTHAAdapter
from ..tuner.table import CIRCUIT
from .checkpoints import of_run
from .guards import is_no_op

if TYPE_CHECKING:
    from transformers import Trainer

SLOW = 1e-6  # the learning rate to reckon with, of optimisers that choose their own
TRIES = 8  # steps that could change a tensor, and do not: RAdam waits for five
LOOKS = 20  # steps in which tensors are watched: an expert of a mixture may get no token for long


class NotTrained(RuntimeError):
    """A part of the adapter would stay, or has stayed, as it was.

    No ValueError, which transformers takes for a setting of DeepSpeed's when it saves, and goes on.
    """


def watch(trainer: Trainer, optimiser: str, circuit_lr: float | None) -> Learning:
    """Have a trainer check its optimiser once it has one, and return the callback that checks the rest.

    Args:
        trainer: before its training.
        optimiser: value of `optimizer`, for messages.
        circuit_lr: value of `circuit_lr`.
    """
    create = trainer.create_optimizer

    def create_checked(*args: Any, **kwargs: Any) -> Any:
        made = create(*args, **kwargs)
        check_groups(trainer.optimizer, cast(nn.Module, trainer.model), optimiser, circuit_lr)
        return made

    trainer.create_optimizer = create_checked  # type: ignore[method-assign]
    trainer.args.logging_nan_inf_filter = False  # it would log the mean of earlier losses in the place of NaN
    return Learning(trainer, optimiser)


def check_groups(optimizer: Any, model: nn.Module, optimiser: str, circuit_lr: float | None) -> None:
    """Check that an optimiser has every tensor of the adapters that is to be trained, once, and at which learning rate.

    Raises:
        NotTrained: naming the tensors, the optimiser and what works.
    """
    groups = getattr(optimizer, "param_groups", [])
    held = Counter(id(tensor) for group in groups for tensor in group["params"])
    rates = {id(tensor): group.get("lr") for group in groups for tensor in group["params"]}
    tensors = _tensors(model)
    if missing := [name for name, tensor in tensors.items() if not held[id(tensor)]]:
        raise _untrained(optimiser, missing, len(tensors), "are not among the tensors it trains")
    if twice := [name for name, tensor in tensors.items() if held[id(tensor)] > 1]:
        raise _untrained(optimiser, twice, len(tensors), "are trained more than once")
    if still := [name for name, tensor in tensors.items() if (rate := rates[id(tensor)]) is not None and not float(rate) > 0]:
        where = "`learning_rate:`, `circuit_lr:`, `embedding_lr:` and `lr_groups:` above 0"
        raise _untrained(optimiser, still, len(tensors), "have a learning rate of 0", where)
    for name, tensor in tensors.items() if circuit_lr is not None else ():
        rate = rates[id(tensor)]
        if name.rsplit(".", 1)[-1] in CIRCUIT and rate is not None and not math.isclose(float(rate), circuit_lr or 0):
            raise NotTrained(
                f"qtha.circuit_lr: {circuit_lr!r} does not reach {name}, which would train at {rate}: Axolotl puts "
                f"it into another group. What works: `target_modules` without that layer, or no `circuit_lr`."
            )


def _tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors of adapters that are trained, each once, by name."""
    adapters = [(path, module) for path, module in model.named_modules() if isinstance(module, QTHAAdapter)]
    return {f"{path}.{name}": tensor for path, adapter in adapters for name, tensor in adapter.trained().items()}


def _untrained(optimiser: str, names: list[str], of: int, why: str, works: str = WORKS) -> NotTrained:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return NotTrained(f"optimizer: {optimiser!r}: {len(names)} of {of} tensors of the adapter {why} ({shown}). Works: {works}.")


class Learning(TrainerCallback):
    """Stops a training that changes nothing, or whose loss is no number; made by `watch`."""

    def __init__(self, trainer: Trainer, optimiser: str) -> None:
        """Take over the trainer's `log`, where its numbers have just been read."""
        self._optimiser = optimiser
        self._pending: dict[str, nn.Parameter] | None = None
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # values, and whether the step can change them
        self._seen: list[tuple[list[str], Tensor]] = []  # names; could have changed and has (2, names)
        self._left, self._all, self._tries = LOOKS, 0, Counter[str]()
        self._stepped, self._rate, self._saved = False, 0.0, False
        self._log, self._trainer = trainer.log, trainer
        trainer.log = self._check_log  # type: ignore[method-assign]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Note the learning rate of the step: DeepSpeed has moved it on by the time others could."""
        rates = [group.get("lr") for group in _groups(optimizer)]
        self._rate = max((math.inf if rate is None else float(rate) for rate in rates), default=math.inf)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Copy the tensors that have not been seen to move, if this step can move them."""
        if self._pending is None and model is not None:
            self._pending = _tensors(model)
            self._all = len(self._pending)
        if self._left == 0 or not self._pending:
            return
        ready = {id(p): group.get("lr") for group in _groups(optimizer) if _warm(group) for p in group["params"]}
        for name, parameter in self._pending.items():
            gradient, value = _local(parameter.grad), _local(parameter.detach())
            if gradient is not None and gradient.numel() and id(parameter) in ready:
                self._before[name] = value.clone(), _can_move(value, gradient, ready[id(parameter)])
        self._left -= bool(self._before)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Compare them with what they were."""
        if self._before and self._pending:
            device = next(iter(self._before.values()))[0].device
            could = [can.to(device) for _, can in self._before.values()]
            moved = [_local(self._pending[name].detach()).ne(old).any().to(device) for name, (old, _) in self._before.items()]
            self._seen.append((list(self._before), torch.stack([torch.stack(could), torch.stack(moved)])))
        self._before = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Before the first save, refuse an adapter that is still nothing."""
        self._stepped |= self._rate > 0
        if control.should_save and model is not None:
            self._check_no_op(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: Any
    ) -> None:
        """The same before the trained adapter is saved."""
        self._check_seen()
        if model is not None:
            self._check_no_op(model)

    def _check_no_op(self, model: nn.Module) -> None:
        if self._saved or not self._stepped:
            return
        self._saved = True
        adapters = [module for module in model.modules() if isinstance(module, QTHAAdapter) and _gathers(module)]
        still = [is_no_op(adapter) for adapter in adapters]  # gathered on every rank: no early end
        steps = self._trainer.state.global_step
        if still and all(still):
            raise NotTrained(
                f"optimizer: {self._optimiser!r}: after {steps} steps the adapter is as it started, and changes nothing. Nothing "
                f"was saved. What works: data that leave tokens to learn from (labels that are not masked), {WORKS}."
            )

    def _check_seen(self) -> None:
        """Read which tensors have moved, now that the device has been waited for."""
        for names, (could, moved) in ((names, seen.tolist()) for names, seen in self._seen):
            self._tries.update(name for name, can, has in zip(names, could, moved, strict=True) if can and not has)
            if stuck := [name for name in names if self._tries[name] >= TRIES]:
                works = f"{WORKS}; with 16-bit adapters a larger learning_rate, or no `peft_autocast_adapter_dtype: false`"
                why = f"did not change in {TRIES} steps that had a gradient for them"
                raise _untrained(self._optimiser, stuck, self._all, why, works)
            for name, has in zip(names, moved, strict=True):
                if has and self._pending:
                    self._pending.pop(name, None)
                    self._tries.pop(name, None)
        self._seen = []

    def _check_log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._log(logs, *args, **kwargs)
        self._check_seen()
        for key in ("loss", "grad_norm"):
            value = logs.get(key)
            if value is not None and not math.isfinite(float(value)) and not _scaled(self._trainer, key):
                raise _diverged(key, self._trainer)


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return getattr(optimizer, "param_groups", None) or []


def _warm(group: dict[str, Any]) -> bool:
    """Return whether a group's learning rate is at least half of what it started with; some optimisers choose their own."""
    rate, initial = group.get("lr"), group.get("initial_lr")
    return rate is None or (float(rate) > 0 and float(rate) >= 0.5 * float(initial or 0))


def _can_move(value: Tensor, gradient: Tensor, rate: float | None) -> Tensor:
    """Return whether a step of plain descent would change an entry, which others exceed where it rounds to nothing."""
    moves = (gradient * (SLOW if rate is None else float(rate))).abs() > torch.finfo(value.dtype).eps * value.abs()
    return moves.any() & gradient.isfinite().all()  # else fp16's loss scale skips the step


def _local(tensor: Tensor | None) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathers(adapter: QTHAAdapter) -> bool:
    """Return whether an adapter is trained, and not in FSDP2's parts: those show their gradients, so 2 has checked them."""
    return any(parameter.requires_grad and not isinstance(parameter, DTensor) for parameter in adapter.parameters())


def _scaled(trainer: Trainer, key: str) -> bool:
    """Return whether fp16's loss scale is what makes gradients infinite: its first steps may be skipped."""
    return key == "grad_norm" and trainer.accelerator.scaler is not None


def _diverged(key: str, trainer: Trainer) -> Diverged:
    folder, step = Path(str(trainer.args.output_dir)), trainer.state.global_step
    kept, args = [path.name for path in of_run(folder)], trainer.args
    last = f"The checkpoints of {str(folder)!r} are as they were, the last is {kept[-1]}" if kept else "No checkpoint was written"
    return Diverged(
        f"{key}: not a finite number at step {step}; the training diverged and was stopped. {last}. What works: a smaller "
        f"`learning_rate:` (now {args.learning_rate:g}), `max_grad_norm:` at most 1 (now {args.max_grad_norm:g}), "
        f"a longer `warmup_steps:`, or `bf16` instead of `fp16`."
    )
