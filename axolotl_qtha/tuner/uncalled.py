"""Layers that are never called: the module around them reads their weight and multiplies by itself.

An adapter on one would change nothing and get no gradient, or only on some machines: with the `mamba-ssm` kernels a Mamba hands
`out_proj.weight` to a kernel, without them it calls `out_proj`. `tests/tuner/test_uncalled.py` compares this list with the source
of the installed transformers. What no list can know, `training/reached.py` finds in the first step.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# The layers by the name of the class that has them: transformers' own, which code from the Hub keeps.
READ = {
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "Gemma3nTextAltUp": ("correction_coefs",),  # in training
    "LongcatFlashTopkRouter": ("classifier",),
    "LSHSelfAttention": ("query_key", "value"),  # Reformer, while it generates
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "Gemma4AssistantForCausalLM": ("lm_head",),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias",),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "TDNNLayer": ("kernel",),  # speaker heads of Wav2Vec2 and its kin
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def reader(model: nn.Module, name: str) -> str | None:
    """Return the name of the class that reads the weight of a layer in place of calling it, None if none is known to.

    Args:
        model: the base.
        name: of the layer, in the base.
    """
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(parent, nn.TransformerEncoderLayer):  # in eval mode without gradients, in one fused operator
        return "TransformerEncoderLayer" if leaf in ("linear1", "linear2") else None
    if isinstance(parent, nn.MultiheadAttention) and isinstance(getattr(parent, leaf), NonDynamicallyQuantizableLinear):
        return "MultiheadAttention"
    return next((kind.__name__ for kind in type(parent).__mro__ if leaf in READ.get(kind.__name__, ())), None)
