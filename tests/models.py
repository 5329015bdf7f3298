"""Tiny random models of odd sizes, and what the tests do with them."""

import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.layer import QTHALinear

VOCABULARY = 97
# 48 and 24 (two of four heads) split evenly over two cores, 89 is a prime and is padded
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 89, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(layers=2, seed=0):
    """Return a Llama with grouped-query attention."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers, max_position_embeddings=64)).eval()


def qwen2(seed=0):
    """Return a Qwen2, whose q, k and v have biases, with tied embeddings."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_hidden_layers=2, max_position_embeddings=64, tie_word_embeddings=True))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def gpt2(seed=0):
    """Return a GPT-2, whose linear layers are transformers' Conv1D."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_inner=89, n_layer=2, n_head=4, n_positions=64)).eval()


def config(**settings):
    """Return a configuration for the models above; their layers are too small for a param_budget."""
    sizes = {} if settings.get("mpo") == "none" else {"bond_dim": 4, "mid_dim": 8}
    return QTHAConfig(task_type="CAUSAL_LM", **{"rank": 4, **sizes, **settings})


def adapted(model, **settings):
    """Return the model with an adapter, in eval mode."""
    return get_peft_model(model, config(**settings)).eval()


def tokens(seed=0):
    """Return token ids (2, 7)."""
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))


def logits(model, **inputs):
    """Return the logits of `tokens()`."""
    with torch.no_grad():
        return model(input_ids=tokens(), **inputs).logits


def trainable(model):
    """Return the trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model):
    """Return the gradient of the language-model loss for each trainable parameter."""
    parameters = trainable(model)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


def train(model, steps=3):
    """Take Adam steps and return the model, whose adapter is no longer a no-op."""
    parameters = trainable(model)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.02)
    for _ in range(steps):
        for name, gradient in gradients(model).items():
            parameters[name].grad = gradient
        optimizer.step()
    return model


BASES = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2}
FILE = "adapter_model.safetensors"
QUANTUM = ("qtha", "none", "silu", "frozen", "product", "qwthn")
VARIANTS = [{"quantum": quantum, **more} for quantum in QUANTUM for more in ({}, {"init": "tt_svd"}, {"mpo": "none"})]


def adapters(model, name="default"):
    """Return the adapter of every adapted layer, by the layer's name."""
    return {
        path.removeprefix("base_model.model."): layer.qtha_adapter[name]
        for path, layer in model.named_modules()
        if isinstance(layer, QTHALinear)
    }
