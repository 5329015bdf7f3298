"""Layers that no forward pass calls: refused by name, left out of all-linear, and all that transformers has are known."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.uncalled import READ

from ..models import VOCABULARY, adapted, adapters, gradients, llama, trainable

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
JAMBA = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False}


def hybrid(kind):
    """Return a tiny state-space model, or one with attention beside it."""
    torch.manual_seed(0)
    made = {
        "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=8)),
        "falcon_mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**SMALL, state_size=8)),
        "mamba2": lambda: Mamba2ForCausalLM(
            Mamba2Config(**SMALL, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8)
        ),
        "jamba": lambda: JambaForCausalLM(JambaConfig(**SMALL, **HEADS, **JAMBA)),
        "bamba": lambda: BambaForCausalLM(BambaConfig(**SMALL, **HEADS, **MAMBA2, attn_layer_indices=[1])),
        "falcon_h1": lambda: FalconH1ForCausalLM(FalconH1Config(**SMALL, **HEADS, **MAMBA2, mamba_d_ssm=64, head_dim=8)),
    }
    return made[kind]().eval()


# what each of them reads, and what all-linear then takes, by the last part of the name
FAMILIES = {
    "mamba": ({"x_proj", "dt_proj", "out_proj"}, {"in_proj"}),
    "falcon_mamba": ({"x_proj", "dt_proj", "out_proj"}, {"in_proj"}),
    "mamba2": ({"out_proj"}, {"in_proj"}),
    "jamba": ({"dt_proj"}, {"in_proj", "x_proj", "out_proj", "q_proj", "o_proj", "gate_proj"}),
    "bamba": ({"out_proj"}, {"in_proj", "q_proj", "o_proj", "gate_proj"}),
    "falcon_h1": ({"out_proj"}, {"in_proj", "q_proj", "o_proj", "gate_proj"}),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_linear_leaves_out_what_is_never_called(kind):
    read, called = FAMILIES[kind]
    model = adapted(hybrid(kind), target_modules="all-linear")
    leaves = {name.rsplit(".", 1)[-1] for name in adapters(model)}
    assert called <= leaves
    assert not read & leaves


def test_every_adapter_of_all_linear_gets_a_gradient_in_a_mamba():
    model = adapted(hybrid("mamba"), target_modules="all-linear").train()
    assert gradients(model).keys() == trainable(model).keys()  # torch.autograd.grad refuses a tensor that was not used


@pytest.mark.parametrize(("kind", "leaf"), [(kind, leaf) for kind, (read, _) in FAMILIES.items() for leaf in sorted(read)])
def test_a_layer_that_is_read_is_refused_by_name(kind, leaf):
    base = hybrid(kind)
    message = (
        rf"qtha.target_modules: '.*\.{leaf}' is a layer whose weight \w+ reads.*What works: `all-linear`.*\[{leaf}\].*`in_proj`"
    )
    with pytest.raises(ValueError, match=message):
        adapted(base, target_modules=["in_proj", leaf])
    assert not any("qtha" in name for name, _ in base.named_modules())


def test_what_is_excluded_is_not_refused():
    model = adapted(hybrid("mamba"), target_modules=r".*_proj", exclude_modules=["x_proj", "dt_proj", "out_proj"])
    assert {name.rsplit(".", 1)[-1] for name in adapters(model)} == {"in_proj"}


def test_the_same_name_elsewhere_is_taken():
    assert len(adapters(adapted(llama(), target_modules=["o_proj", "q_proj"]))) == 4


# ---- PyTorch's own ----


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.decoder(x, self.encoder(x)))


def on_encoder(target_modules):
    return get_peft_model(Encoder(), QTHAConfig(rank=2, bond_dim=2, mid_dim=4, target_modules=target_modules))


@pytest.mark.parametrize("leaf", ["linear1", "linear2"])
def test_the_fast_path_of_torchs_encoder_is_refused(leaf):
    with pytest.raises(ValueError, match=rf"qtha.target_modules: 'encoder.layers.0.{leaf}' .*TransformerEncoderLayer reads"):
        on_encoder([leaf])


def test_all_linear_on_torchs_layers_acts_in_eval_mode_as_in_training():
    model = on_encoder("all-linear")
    assert set(adapters(model)) == {"decoder.linear1", "decoder.linear2", "linear"}
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.stored("mpo_b_1"), std=0.3)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in adapters(model):
            with_all = model.eval()(x)
            layer = model.get_submodule(f"base_model.model.{name}")
            layer.enable_adapters(False)
            assert not torch.equal(model(x), with_all), name
            layer.enable_adapters(True)


def test_a_model_without_any_layer_left_is_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"qtha.target_modules: 'all-linear' finds no linear layer"):
        get_peft_model(model, QTHAConfig(rank=2, bond_dim=2, mid_dim=4, target_modules="all-linear"))


# ---- the list, against transformers' sources ----

LOOKED_AT = ("dtype", "device", "shape", "SCB", "quant_state")  # of a weight that is not multiplied
# Read as well, but in ways that leave an adapter in its place.
CALLED_ALL_THE_SAME = {
    "BloomAttention.dense": "only with slow_but_exact and pretraining_tp above 1, which no published model has in training",
    "BloomMLP.dense_4h_to_h": "the same",
    "DisentangledSelfAttention.in_proj": "only for queries of another sequence, which nothing in transformers passes",
    "Gemma3nTextAltUp.prediction_coefs": "the weight is clamped in place, and the layer called",
    "RwkvModel.output": "the weight is scaled in place, and the layer called",
    "RwkvModel.value": "the same",
}


def reads(source: str) -> Iterator[str]:
    """Yield `Class.layer` for each linear layer whose weight a class of this source uses outside what makes it."""
    linear = set(re.findall(r"self\.(\w+) = nn\.Linear\(", source))
    if not re.search(rf"\.({'|'.join(linear)})\.weight\b", source) or not linear:
        return
    for kind in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for function in (node for node in kind.body if isinstance(node, ast.FunctionDef)):
            if re.search(r"__init__|init\w*_weights|tie_weights", function.name):
                continue
            for node in ast.walk(function):
                of_tests = isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "hasattr")
                if of_tests or (isinstance(node, ast.Attribute) and node.attr in LOOKED_AT):
                    for inner in ast.walk(node):
                        inner.looked_at = True
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and node.attr == "weight" and not hasattr(node, "looked_at"):
                    layer = node.value
                    if isinstance(layer, ast.Attribute) and layer.attr in linear:
                        yield f"{kind.name}.{layer.attr}"


@pytest.mark.slow
def test_every_weight_that_transformers_reads_is_known():
    found = {
        name for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py") for name in reads(path.read_text())
    }
    known = {f"{kind}.{layer}" for kind, layers in READ.items() for layer in layers}
    assert found - known == set(CALLED_ALL_THE_SAME)
    assert known <= found
