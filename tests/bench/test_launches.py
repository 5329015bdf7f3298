"""The counts of launches count what they say, and hold the layer to a bound beside LoRA."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from axolotl_qtha import QTHAConfig
from axolotl_qtha.bench import launches, layer, step
from axolotl_qtha.bench.launches import Counter, Launches, kernel_seconds, measured

CPU = torch.device("cpu")
X = torch.randn(6, 8)


def counted(run):
    """Return the operators of a run, with our custom ones as the table says, and as one."""
    with Counter() as counter:
        run()
    return counter.operators, counter.custom_as_one


def accumulated(model, x):
    """Return the launches of a forward and backward that adds to gradients that exist."""
    grad = torch.ones_like(model(x))
    layer.step(model, x, grad)
    return measured(lambda: layer.accumulating(model, x, grad), CPU)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        (False, 1 + 2 + 1),  # a product; the gradients of x and the weight; the weight's is added to what was there
        (True, 1 + 3 + 2),  # a product with the bias; the bias has a sum over tokens, added, too
    ],
)
def test_a_linear_layer(bias, expected):
    found = accumulated(nn.Linear(8, 4, bias=bias), X.clone().requires_grad_())
    assert (found.operators, found.custom_as_one) == (expected, expected)


def test_a_lora_layer():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 4, bias=False)), LoraConfig(r=2, target_modules=["0"]))
    found = accumulated(model, X.clone().requires_grad_())
    frozen = 1 + 1
    forward = 4  # two products, alpha / r, the sum of the two paths
    backward = 1 + 4 + 1 + 2  # alpha / r, four products, the sum of x's gradients, those of A and B added to what was there
    assert found.operators == frozen + forward + backward


@pytest.mark.parametrize(
    "run",
    [
        lambda: X.view(48)[4:].reshape(4, 11),
        lambda: X.t().unsqueeze(0).expand(3, 8, 6).permute(1, 2, 0).squeeze(),
        lambda: [part.detach() for part in (*X.split(2), *X.unbind(1), *X.chunk(2))],
        lambda: (torch.empty(3), torch.empty_like(X), X.new_empty(2), torch.empty_strided((2, 2), (2, 1))),
        lambda: X.detach().unsqueeze_(0).squeeze_().t_(),
        lambda: (X.shape, X.stride(), X.is_contiguous(), X.is_same_size(X)),
    ],
)
def test_views_new_memory_and_metadata_are_free(run):
    assert counted(run) == (0, 0)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X + 1, 1),
        (lambda: X.clone().add_(1), 2),
        (lambda: X.t().contiguous(), 1),
        (lambda: X.t().reshape(48), 1),  # a copy, seen through a view
        (lambda: X.to(torch.bfloat16), 1),
        (lambda: X.to(torch.float32), 0),  # as it was
        (lambda: torch.zeros(3), 1),  # filled
        (lambda: X.sum().item(), 1),  # the number is copied, not computed
        (lambda: torch.cat([X, X]), 1),
    ],
)
def test_what_computes_or_writes_counts(run, expected):
    assert counted(run) == (expected, expected)


@pytest.fixture
def twice():
    """Return an operator in our namespace that is made of two others."""
    library = torch.library.Library("axolotl_qtha", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: (x * 2).clone(), "CompositeExplicitAutograd")
    yield torch.ops.axolotl_qtha.twice
    library._destroy()


def test_custom_operators_count_by_the_table_and_as_one(twice, monkeypatch):
    monkeypatch.setitem(launches.CUSTOM, "axolotl_qtha::twice", 3)
    assert counted(lambda: twice(X) + twice(X)) == (7, 3)


def test_a_custom_operator_that_the_table_does_not_know_stops(twice):
    with pytest.raises(KeyError, match="axolotl_qtha::twice: say in `CUSTOM`"):
        counted(lambda: twice(X))


def test_a_run_without_a_gpu_has_no_gpu_figures():
    calls = []
    found = measured(lambda: calls.append(X @ X.T), CPU)
    assert found == Launches(1, 1, None, None)
    assert len(calls) == 1
    assert launches.cells(found, CPU) == ("1.0", "1.0")
    assert "no GPU" in launches.legend(CPU)
    assert found.beyond(Launches(0, 0, None, None), 2) == Launches(0.5, 0.5, None, None)


def test_a_share_of_what_was_measured():
    found = Launches(50, 30, 40, 0.5).beyond(Launches(10, 10, 12, 0.25), 4)
    assert found == Launches(10, 5, 7, 0.0625)
    assert launches.cells(found, torch.device("cuda")) == ("7.0", "62.500")


def test_a_trace_of_the_cpu_has_no_kernels(tmp_path):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        X @ X.T
    seen.export_chrome_trace(str(tmp_path / "trace"))
    trace = json.loads((tmp_path / "trace").read_text())
    assert any(event.get("cat") == "cpu_op" for event in trace["traceEvents"])
    assert kernel_seconds(trace) == []
    on_device = [{"cat": "kernel", "dur": 2.5}, {"cat": "gpu_memcpy", "dur": 9}, {"cat": "kernel", "dur": 1}]
    assert kernel_seconds({"traceEvents": trace["traceEvents"] + on_device}) == pytest.approx([2.5e-6, 1e-6])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_are_seen_on_a_gpu():
    x = torch.randn(512, 512, device="cuda")
    found = measured(lambda: (x + 1).mul_(2), x.device)
    assert (found.operators, found.kernels) == (2, 2)
    assert 0 < found.gpu_seconds < 1


@pytest.fixture(scope="module")
def lora_and_qtha():
    """Return what each adapted layer launches beyond the base, by adapter, in a small Llama."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    base = step.random_base(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes), 16, CPU)
    base.enable_input_require_grads()
    ids = torch.randint(64, (2, 16))
    everywhere = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    forms = {"tt": {"mpo": "tt"}, "shared": {"mpo": "none", "share": {"layers": 2, "inputs": True}}}
    configs = {
        f"{name}, {quantum}": QTHAConfig(rank=8, quantum=quantum, **form, **everywhere)
        for name, form in forms.items()
        for quantum in ("none", "qtha")
    }
    configs["lora"] = LoraConfig(r=8, **everywhere)
    runs = {name: step.AdaptedBase(base, config, ids) for name, config in configs.items()}
    frozen, found = step.accumulating(base, ids), {}
    for name, run in runs.items():
        run.attach()
        found[name] = run.launches(frozen)
        run.detach()
    return found


def test_loras_share_is_that_of_a_layer_alone(lora_and_qtha):
    assert lora_and_qtha["lora"] == Launches(12, 12, None, None)  # as above, without the frozen layer's


# In launches: 13 and 17 by the table for tensor networks, 12.3 and 17.3 for layers that share; 12 and 15, 11.3 and 13.1 with each
# custom operator for one.
@pytest.mark.parametrize("form", ["tt", "shared"])
@pytest.mark.parametrize(
    ("quantum", "figure", "bound"),
    [("none", "operators", 1.1), ("none", "custom_as_one", 1.0), ("qtha", "operators", 1.45), ("qtha", "custom_as_one", 1.3)],
)
def test_a_layer_launches_about_what_lora_launches(lora_and_qtha, form, quantum, figure, bound):
    assert getattr(lora_and_qtha[f"{form}, {quantum}"], figure) <= bound * getattr(lora_and_qtha["lora"], figure)
