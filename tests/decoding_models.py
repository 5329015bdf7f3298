"""What the tests of kept folds share."""

import torch
from torch import nn

from axolotl_qtha.tuner.fold_cache import folding_each_time

from .models import adapted, adapters, llama, logits, tokens, train


def trained(**settings):
    """Return a model with a trained adapter, in eval mode."""
    model = train(adapted(llama(), **settings))
    for module in adapters(model).values():
        if module.shape.learns_scale:
            nn.init.uniform_(module.scale, 0.5, 2.0)
    return model


def uncached(model):
    with folding_each_time():
        return logits(model)


def generated(model, count=12, ids=None):
    ids = tokens() if ids is None else ids
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)


def kept(model, name="default"):
    """Return how many adapters keep a fold."""
    return sum(bool(module.kept) for module in adapters(model, name).values())


def check(model):
    """Check that what is computed now is what folding afresh gives; 1e-5: float32 rounding through two layers."""
    assert (logits(model) - uncached(model)).abs().max() <= 1e-5


def one(**settings):
    """Return the adapter of a layer, in eval mode, and inputs for it."""
    module = adapters(trained(**settings))["model.layers.1.mlp.down_proj"]
    return module, torch.randn(1, 3, module.shape.in_features, generator=torch.Generator().manual_seed(0))
