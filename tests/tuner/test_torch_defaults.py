"""PyTorch's defaults (dtype, device) change nothing about an adapter."""

from contextlib import contextmanager

import pytest
import torch

from axolotl_qtha.circuit import program, triton_kernel
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.tuner import join

from ..models import VARIANTS, adapted, gradients, llama, logits, trainable

CASES = [*VARIANTS, {"angle_scale": "learned"}, {"share": {"layers": 2, "inputs": True}}]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fresh():
    """Forget what was computed under other defaults."""
    for cached in (program.tables, triton_kernel._constants, triton_kernel.plan, join._zeros):
        cached.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", CASES, ids=str)
def test_the_default_dtype_changes_no_value(variant, dtype):
    base = llama()
    expected = {name: tensor.detach().clone() for name, tensor in trainable(adapted(llama(), **variant)).items()}
    fresh()
    with default_dtype(dtype):
        model = adapted(base, **variant)
        found = trainable(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) and tensor.dtype == torch.float32 for name, tensor in found.items())
        logits(model)
        assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


@pytest.mark.parametrize("variant", CASES, ids=str)
def test_the_default_device_moves_no_tensor(variant):
    base = llama()
    expected = logits(adapted(llama(), **variant))
    fresh()
    with torch.device("meta"):
        model = adapted(base, **variant)
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
        empty = adapted(llama(), **variant)
        assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
    assert torch.equal(logits(model), expected)


def test_the_tables_of_circuits_are_made_where_they_are_asked_for():
    fresh()
    with torch.device("meta"), default_dtype(torch.float64):
        made = program.tables(Ansatz(4, 2), torch.device("cpu"), torch.float32)
        tensors = [made.signs, *made.phases.values(), *made.generators]
        tensors.append(triton_kernel._constants(Ansatz(4, 2), torch.device("cpu"), torch.float32).select)
        tensors.append(join._zeros(4, torch.float32, torch.device("cpu")))
        assert triton_kernel.plan(Ansatz(4, 2), torch.device("cpu")).device.type == "cpu"
    fresh()
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("cpu", torch.float32)}
