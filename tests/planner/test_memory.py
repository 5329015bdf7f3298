"""The planned memory against what the allocator hands out in a real step on this CPU."""

import copy

import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from axolotl_qtha.circuit import native
from axolotl_qtha.circuit.ansatz import Ansatz
from axolotl_qtha.circuit.torch_engine import chunk_tokens, expectation_values
from axolotl_qtha.planner.estimate import make_plan
from axolotl_qtha.planner.memory import weight_bytes, workspace_bytes
from axolotl_qtha.settings.meta_base import QuantisedLinear
from axolotl_qtha.timing import peak_bytes

from .bases import CONFIGS, SIZES, run_on

CPU = torch.device("cpu")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
BITS = {16: {}, 4: NF4, 8: {"load_in_8bit": True}}


def tensors_of(model):
    """Return the bytes of every tensor a model holds, scales of quantised weights too; tied ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        nested = getattr(state, "state2", None)
        found = [scales] + [getattr(state, name, None) for name in ("absmax", "code", "offset")]
        found += [getattr(nested, name, None) for name in ("absmax", "code")]
        tensors |= {id(t): t for t in found if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def loaded(folder, bits):
    """Write random weights for the base in `folder` and load them."""
    torch.manual_seed(0)
    base = folder / "base"
    if not (base / "model.safetensors").exists():
        from transformers import AutoConfig

        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32).save_pretrained(base)
    settings = {"quantization_config": {"quant_method": "bitsandbytes", **BITS[bits]}} if bits != 16 else {}
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa", **settings)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "phi"])
def test_weights_take_what_they_take(name, bits, tmp_path):
    run = run_on(tmp_path, CONFIGS[name], **({} if bits == 16 else {f"load_in_{bits}bit": True}))
    planned = run.base()
    real = loaded(tmp_path, bits)
    # the code books are shared between layers, in some versions; they are 1 KiB a layer
    assert weight_bytes(planned) == pytest.approx(tensors_of(real), rel=0.02)
    stand_ins = {n for n, m in planned.named_modules() if isinstance(m, QuantisedLinear)}
    assert stand_ins == {n for n, m in real.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    assert bool(stand_ins) == (bits != 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantisation", "bits"),
    [
        ({"quant_method": "bitsandbytes", **NF4}, 4.13),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, 4.16),  # 16-bit scales, 4-bit zero points
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4.31),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_checkpoints_quantised_already(quantisation, bits, tmp_path):
    config = copy.deepcopy(CONFIGS["llama"])
    config.quantization_config = quantisation
    run = run_on(tmp_path, config)
    layers = [module for module in run.base().modules() if isinstance(module, QuantisedLinear)]
    assert len(layers) == 21
    entries = sum(layer.in_features * layer.out_features for layer in layers)
    assert 8 * sum(layer.stored_bytes for layer in layers) / entries == pytest.approx(bits, abs=0.2)
    assert quantisation["quant_method"] in make_plan(run, []).quantisation or bits == 4.13


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "bits"), [("llama", 16), ("llama", 4), ("qwen3", 16), ("gemma", 4), ("phi", 16), ("gpt2", 16), ("glm", 16)]
)
def test_a_training_step_peaks_where_the_plan_says(name, bits, checkpointing, tmp_path):
    changes = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 1}
    run = run_on(tmp_path, CONFIGS[name], **({} if bits == 16 else {f"load_in_{bits}bit": True}), **changes)
    plan = make_plan(run, [])
    base = loaded(tmp_path, bits)
    frozen = tensors_of(base)
    model = get_peft_model(base, run.adapter).train()
    base.enable_input_require_grads()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(3, 1000, (4, 128))
    mask = torch.ones_like(ids)
    mask[0, -9:] = 0  # a padded sequence, as without sample packing

    def step():
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = peak_bytes(step, CPU)  # the first step makes the optimiser's states
    measured = frozen + sum(p.numel() * p.element_size() for p in trained) + peak
    print(f"{name}, {bits} bits, checkpointing {checkpointing}: planned {plan.memory.total:,}, measured {measured:,} bytes")
    # the bound; small temporaries of single kernels are not planned
    assert plan.memory.total == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("qubits", "tokens"), [(4, 2048), (5, 20_000), (8, 300), (8, 2048), (10, 512), (12, 64)])
def test_circuit_workspace(qubits, tokens, monkeypatch):
    monkeypatch.setattr(native, "runs", lambda z: False)  # as on a GPU; the compiled engine needs a few hundred KiB
    ansatz = Ansatz(qubits, 2)
    z = torch.randn(tokens, qubits, requires_grad=True)
    angles = torch.randn(ansatz.rows, qubits, requires_grad=True)

    def run():
        expectation_values(z, angles, ansatz).sum().backward()

    run()  # fills the tables, which are kept
    # inputs, outputs and gradients, (tokens, qubits) each, come on top: up to 12 % for few qubits
    assert workspace_bytes(qubits, tokens, chunk_tokens(qubits)) == pytest.approx(peak_bytes(run, CPU), rel=0.15)


def test_quantised_experts_are_counted_as_stored(tmp_path):
    """Against the tensors that bitsandbytes holds for them; in full precision they are counted as any weight."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts_per_tok": 2}
    config = Qwen2MoeConfig(**SIZES, **sizes)
    runs = (run_on(tmp_path, config, bf16=True, load_in_4bit=True, quantize_moe_experts=experts) for experts in (None, True))
    plain, quantised = (weight_bytes(run.base()) for run in runs)
    whole = stored = 0
    model = Qwen2MoeForCausalLM(config).to(torch.bfloat16)
    for name, weight in list(model.named_parameters()):
        if ".experts." in name:
            owner, _, leaf = name.rpartition(".")
            whole += weight.nbytes
            replace_parameter_4bit(model.get_submodule(owner), leaf, compress_statistics=True, quant_type="nf4")
            kept = model.get_submodule(owner).parametrizations[leaf]
            state = kept[0].quant_state
            tensors = (kept.original, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            stored += sum(tensor.nbytes for tensor in tensors)
    assert whole > 3.5 * stored
    assert plain - quantised == whole - stored
