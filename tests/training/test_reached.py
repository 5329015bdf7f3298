"""Adapters that the first step of a training does not reach are named once, before the optimiser's step; others are not."""

import logging

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

from axolotl_qtha.training import reached
from axolotl_qtha.training.reached import Reached, warning

from ..models import VOCABULARY, adapted, adapters, config, llama, trainable

ROWS = torch.randint(VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(1)).tolist()


class Mlp(nn.Module):
    """A Llama's MLP that treats `up_proj` in its own way."""

    def __init__(self, mlp, way):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.way = mlp.gate_proj, mlp.up_proj, mlp.down_proj, way

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.way(self, x))


WAYS = {
    "read": lambda mlp, x: F.linear(x, mlp.up_proj.weight),
    "left out": lambda mlp, x: 1.0,
    "cut off": lambda mlp, x: mlp.up_proj(x).detach(),
}


def base(way, layers=2):
    model = llama(layers)
    for layer in model.model.layers:
        layer.mlp = Mlp(layer.mlp, way)
    return model


class Seen(logging.Handler):
    """Keeps what is logged, and how many of the optimiser's steps were done by then."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer, self.warnings, self.steps = trainer, [], []

    def emit(self, record):
        self.warnings.append(record.getMessage())
        self.steps.append(len(self.trainer.optimizer.optimizer.state))


def run(tmp_path, model, watch=True, **arguments):
    """Train a model for three steps of two micro-batches; return what was logged, and how many tensors had been stepped."""
    arguments = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **arguments}
    arguments |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), **arguments), train_dataset=rows)
    if watch:
        trainer.add_callback(Reached())
    seen, log = Seen(trainer), reached.LOG.logger
    log.addHandler(seen)
    try:
        trainer.train()
    finally:
        log.removeHandler(seen)
    return seen.warnings, seen.steps


NAMED = "2 of 14 adapters were not reached by the first step, on model.layers.*.mlp.up_proj (2): they learn nothing"


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_reached_is_named_once_before_the_first_optimiser_step(tmp_path, way):
    warnings, steps = run(tmp_path, adapted(base(WAYS[way])))
    assert len(warnings) == 1
    assert warnings[0].startswith(NAMED)
    assert "What works: `exclude_modules`" in warnings[0]
    assert steps == [0]


@pytest.mark.parametrize(
    "settings", [{}, {"quantum": "none"}, {"quantum": "frozen"}, {"share": {"layers": 2, "inputs": True}}], ids=str
)
def test_nothing_is_said_where_all_are_reached(tmp_path, settings):
    assert run(tmp_path, adapted(llama(), **settings)) == ([], [])


@pytest.mark.parametrize("shared", [{"layers": 2}, {"inputs": True}], ids=str)
def test_tensors_of_a_layer_that_is_reached_do_not_speak_for_another(tmp_path, shared):
    """A and B, or the circuit, get their gradient by way of the others that share them."""
    warnings, _ = run(tmp_path, adapted(base(WAYS["left out"]), share=shared))
    assert warnings[0].startswith(NAMED)


def test_nor_for_the_one_that_has_them(tmp_path):
    """The first layer's tensors get their gradient by way of the second."""
    model = llama()
    model.model.layers[0].mlp = Mlp(model.model.layers[0].mlp, WAYS["left out"])
    warnings, _ = run(tmp_path, adapted(model, share={"layers": 2, "inputs": True}))
    assert warnings[0].startswith("1 of 14 adapters were not reached by the first step, on model.layers.*.mlp.up_proj: ")


def test_a_layer_that_one_of_the_micro_batches_reaches_is_reached(tmp_path):
    def second(mlp, x):
        mlp.calls = getattr(mlp, "calls", 0) + 1
        return mlp.up_proj(x) if mlp.calls % 2 == 0 else 1.0

    assert run(tmp_path, adapted(base(second))) == ([], [])
    assert len(run(tmp_path, adapted(base(second)), gradient_accumulation_steps=1)[0]) == 1  # its first step has the first alone


class Mixture(nn.Module):
    """A shared expert, and two of which the second gets no token."""

    def __init__(self, named):
        super().__init__()
        self.shared_expert = nn.ModuleDict({"up_proj": nn.Linear(48, 48)})
        experts = [nn.ModuleDict({"up_proj": nn.Linear(48, 48)}) for _ in range(2)]
        self.experts = nn.ModuleDict({f"expert_{k}": e for k, e in enumerate(experts)}) if named else nn.ModuleList(experts)
        self.use_shared = True

    def forward(self, x):
        first = next(iter(self.experts.children()))
        return first["up_proj"](x) + (self.shared_expert["up_proj"](x) if self.use_shared else 0.0)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("use_shared", [False, True])
def test_an_expert_without_tokens_is_not_named_a_shared_one_is(tmp_path, named, use_shared):
    model = llama(1)
    model.model.layers[0].mlp = Mixture(named)
    model = get_peft_model(model, config(target_modules=["q_proj", "up_proj"]))
    assert len(adapters(model)) == 4
    model.get_submodule("base_model.model.model.layers.0.mlp").use_shared = use_shared
    warnings, _ = run(tmp_path, model)
    expected = (
        [] if use_shared else ["1 of 4 adapters were not reached by the first step, on model.layers.*.mlp.shared_expert.up_proj"]
    )
    assert [text.split(":")[0] for text in warnings] == expected


def test_an_adapter_that_is_not_trained_is_not_named(tmp_path):
    model = adapted(base(WAYS["left out"]))
    for name, parameter in model.named_parameters():
        if "up_proj" in name:
            parameter.requires_grad_(False)
    assert run(tmp_path, model) == ([], [])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(tmp_path, use_reentrant):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    assert run(tmp_path, adapted(llama()), **checkpointing) == ([], [])
    model = adapted(base(WAYS["left out"]))
    assert run(tmp_path, model, **checkpointing)[0][0].startswith(NAMED)


@pytest.mark.slow
def test_a_compiled_training_is_compiled_as_often_as_without(tmp_path):
    graphs = {}
    for watch in (False, True):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = adapted(base(WAYS["left out"], layers=1))
        model.compile(backend=counter)
        warnings, _ = run(tmp_path, model, watch)
        assert [text.split(",")[0] for text in warnings] == ["1 of 7 adapters were not reached by the first step"] * watch
        graphs[watch] = counter.frame_count
    assert graphs[True] == graphs[False] > 0


def test_no_hook_is_left_after_the_first_step(tmp_path):
    hooks = []

    class Count(Reached):
        def on_step_end(self, args, state, control, model=None, **_):
            hooks.append(sum(len(tensor._backward_hooks or ()) for tensor in trainable(model).values()))

        def on_substep_end(self, args, state, control, model=None, **_):
            hooks.append(sum(len(tensor._backward_hooks or ()) for tensor in trainable(model).values()))

    model = adapted(llama())
    adapted_layers = len(adapters(model))
    arguments = {"max_steps": 2, "gradient_accumulation_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=rows, callbacks=[Count()])
    trainer.train()
    assert hooks == [adapted_layers, 0, 0, 0]


def test_layers_of_one_kind_are_named_together():
    missed = [f"default.base_model.model.layers.{k}.mixer.dt_proj" for k in range(24)] + ["default.base_model.model.head"]
    assert warning(missed, 73).startswith(
        "25 of 73 adapters were not reached by the first step, on layers.*.mixer.dt_proj (24), head:"
    )
