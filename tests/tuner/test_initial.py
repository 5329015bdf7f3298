"""What an adapter starts with, where the base gives it."""

import pytest
import torch
from peft import get_peft_model

from axolotl_qtha import QTHAConfig

from ..models import llama


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tt_svd_names_the_layer_whose_weight_is_no_number(value):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"qtha.init: 'tt_svd' .*model.layers.1.self_attn.v_proj, which has NaN.*What works"):
        get_peft_model(model, QTHAConfig(init="tt_svd", target_modules=["q_proj", "v_proj"]))
