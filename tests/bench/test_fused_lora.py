"""Axolotl's fused kernels for LoRA, put in place and taken away, train what PEFT's LoRA trains."""

import json

import pytest
import torch

from axolotl_qtha.bench import fused_lora

from .. import triton_runs

# In Triton's interpreter, which must be chosen before Triton is imported. Axolotl's activation asks for memory on a GPU by name.
INTERPRETED = """
import json, torch
from transformers import LlamaConfig, Qwen2Config
empty = torch.empty
torch.empty = lambda *sizes, device=None, **others: empty(*sizes, device="cpu" if device == "cuda" else device, **others)
from axolotl_qtha.bench import layer, step

sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
found = []
for kind in (LlamaConfig, Qwen2Config):
    base = step.random_base(kind(num_hidden_layers=2, **sizes), 16, torch.device("cpu"))
    base.enable_input_require_grads()
    ids = torch.randint(97, (2, 8))
    lora = step.adapters(4, "none")["qlora"]
    runs = [step.AdaptedBase(base, lora, ids, fused) for fused in (False, True)]
    losses, gradients = [], []
    for pair in zip(*(run.trained for run in runs), strict=True):
        torch.nn.init.normal_(pair[0], std=0.1)
        pair[1].data.copy_(pair[0])
    frozen = step.accumulating(base, ids)
    for run in runs:
        run.attach()
        losses.append(run.loss())
        losses[-1].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in run.trained]))
        run.detach()
    launched = []
    for run in runs:
        run.attach()
        launched.append(run.launches(frozen).operators)
        run.detach()
    left = [name for name, module in base.named_modules() if {"apply_qkv", "apply_o", "forward"} & module.__dict__.keys()]
    rows = [row["adapter"] for row in step.measure(base, 4, "none", ids, True, repeats=1, fused=True)]
    difference = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
    found.append([losses[0].item(), losses[1].item(), difference.item(), launched, left, rows])

models = layer.variants(torch.nn.Linear(96, 128, bias=False), 4, fused=True)
x, grad, gradients = torch.randn(1, 6, 96, requires_grad=True), torch.randn(1, 6, 128), []
for name in ("lora", "lora, fused"):
    torch.manual_seed(0)
    for parameter in models[name].parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    layer.step(models[name], x, grad)
    gradients.append(torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in models[name].parameters() if p.requires_grad)]))
found.append(((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_they_train_what_pefts_lora_trains():
    *decoders, one_layer = json.loads(triton_runs.interpreted(INTERPRETED).splitlines()[-1])
    for plain, fused, difference, launched, left, rows in decoders:
        assert fused == pytest.approx(plain, rel=1e-6)
        assert difference < 1e-5  # float32, other orders of sums
        assert launched[0] == 12
        assert launched[1] < 10  # so the kernels were in place
        assert left == []
        assert rows == ["qlora", "qtha, quantum: none", "qlora, fused"]
    assert one_layer < 1e-5


def test_where_they_cannot_run_it_says_why():
    cuda = torch.device("cuda")
    assert "Triton on a CUDA device" in fused_lora.why_not(torch.device("cpu"), 4)
    assert "8 bits" in fused_lora.why_not(cuda, 8)
    assert fused_lora.why_not(cuda, 4) == fused_lora.why_not(cuda, 16) == ""
