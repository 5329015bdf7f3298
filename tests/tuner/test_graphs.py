"""What takes a model apart to make something else of it: torch.compile without a break, torch.export, tracing, torch.func."""

import pytest
import torch
from torch import nn

from ..models import adapted, adapters, llama, logits, tokens, train, trainable

pytestmark = pytest.mark.slow

QUANTUM = ["none", "qtha", "silu"]


def gradients(run, model):
    model.zero_grad()
    run(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


@pytest.mark.parametrize("share", [None, {"layers": 2, "inputs": True}], ids=str)
@pytest.mark.parametrize("quantum", QUANTUM)
def test_the_whole_model_is_one_graph(quantum, share):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = train(adapted(llama(), quantum=quantum, share=share)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, theirs = gradients(compiled, model), gradients(model, model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 5e-6 * theirs[name].norm() + 1e-9  # the same operators in another order
    with torch.no_grad():
        found = compiled(input_ids=tokens()).logits
    assert (found - logits(model)).norm() <= 1e-6 * found.norm()
    torch._dynamo.reset()


class Layer(nn.Module):
    """An adapter alone, as a module of a tensor."""

    def __init__(self, quantum):
        super().__init__()
        self.adapter = adapters(train(adapted(llama(1), quantum=quantum)))["model.layers.0.mlp.up_proj"]

    def forward(self, x):
        return self.adapter(x)


@pytest.fixture(params=QUANTUM)
def layer(request):
    return Layer(request.param).eval()


X = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))


def test_export_and_trace(layer):
    expected = layer(X)
    exported = torch.export.export(layer, (X,)).module()
    assert torch.equal(exported(X), expected)
    assert torch.equal(torch.jit.trace(layer, (X,))(X), expected)
    with torch.no_grad():
        expected = layer(2 * X)  # from what is kept while nothing is trained: rounded in another order
        assert (torch.jit.trace(layer, (X,))(2 * X) - expected).norm() <= 1e-6 * expected.norm()


def test_gradients_of_each_sample(layer):
    """`vmap(grad)`, in x and in the parameters."""
    values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    function = lambda values, x: torch.func.functional_call(layer, values, (x,)).square().sum()  # noqa: E731
    of_x = torch.func.vmap(torch.func.grad(function, argnums=1), (None, 0))(values, X)
    of_values = torch.func.vmap(torch.func.grad(function), (None, 0))(values, X)
    for k, x in enumerate(X):
        x = x.clone().requires_grad_()
        given = {name: value.clone().requires_grad_() for name, value in values.items()}
        wanted = torch.autograd.grad(function(given, x), [x, *given.values()])
        for found, exact in zip([of_x[k], *(of_values[name][k] for name in given)], wanted, strict=True):
            assert (found - exact).norm() <= 1e-5 * exact.norm() + 1e-7  # float32, in batches of another size


@pytest.mark.parametrize("layer", ["qtha", "silu"], indirect=True)  # without a branch there is none
def test_second_derivatives_are_refused(layer):
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
