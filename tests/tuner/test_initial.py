"""What an adapter starts with, where the base gives it."""

import json
import math

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.initial import values
from axolotl_qtha.tuner.sizes import adapter_shape
from axolotl_qtha.tuner.table import table

from ..models import adapted, adapters, config, llama, logits, train


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tt_svd_names_the_layer_whose_weight_is_no_number(value):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"qtha.init: 'tt_svd' .*model.layers.1.self_attn.v_proj, which has NaN.*What works"):
        get_peft_model(model, QTHAConfig(init="tt_svd", target_modules=["q_proj", "v_proj"]))


def drawn(seed=7, **settings):
    """Return the initial values of an adapter on a layer of 24 to 32 numbers, those with all random numbers before the angles."""
    config = QTHAConfig(rank=4, bond_dim=2, mid_dim=4, **settings)
    shape = adapter_shape(config, 24, 32)
    return values(config, shape, table(config, shape), seed)


LADDER = "axolotl_qtha.circuit.examples:cz_ladder"
CIRCUITS = [{}, {"quantum": "frozen"}, {"quantum": "product"}, {"quantum": "qwthn"}, {"circuit": LADDER}]


@pytest.mark.parametrize("settings", CIRCUITS, ids=str)
def test_angles_start_uniform_up_to_init_angles(settings):
    """The same random numbers, scaled; rounded to float32, whose steps are 6e-8 of a number. The rest is as it was."""
    small, usual = drawn(**settings, init_angles=0.01), drawn(**settings)
    assert small.keys() == usual.keys()
    assert all(torch.equal(small[name], usual[name]) for name in usual if name != "angles")
    assert torch.allclose(small["angles"] / 0.01, usual["angles"] / math.pi, rtol=3e-7, atol=0)
    assert 0.008 < float(small["angles"].abs().max()) <= 0.01 * (1 + 1e-7)
    assert float(small["angles"].min()) < 0 < float(small["angles"].max())


def test_the_default_is_a_whole_turn_bit_for_bit():
    """The angles come last, after the numbers of two cores each, W_A, W_B, W_C and W_Q: as adapters have always started."""
    found, generator = drawn(), torch.Generator().manual_seed(7)
    for name in ("w_a", "w_b", "mpo_a_0", "mpo_a_1", "mpo_b_0", "mpo_b_1"):
        torch.randn(found[name].shape, generator=generator)
    for _ in range(2):
        torch.rand(4, 4, generator=generator)
    assert torch.equal(found["angles"], (2 * torch.rand(found["angles"].shape, generator=generator) - 1) * math.pi)
    assert QTHAConfig().init_angles == math.pi


def test_w_c_of_layers_that_share_is_orthogonal():
    """To float32's rounding; of the authors' variance, 2 / r. Each layer draws its own."""
    found = drawn(share={"layers": 2})["w_c"]
    assert torch.allclose(found @ found.T, 2 * torch.eye(4), atol=1e-5)
    assert not torch.equal(found, drawn(seed=8, share={"layers": 2})["w_c"])
    alone = drawn()["w_c"]
    assert not torch.allclose(alone @ alone.T, 2 * torch.eye(4), atol=0.1)


@pytest.mark.parametrize("quantum", ["qtha", "frozen", "product", "silu"])
def test_a_branch_that_starts_at_zero(quantum):
    """Only W_Q differs; it gets a gradient from the first step that moves B, and with it the branch."""
    zero, usual = drawn(quantum=quantum, branch_init="zero"), drawn(quantum=quantum)
    assert not zero["w_q"].any()
    assert all(torch.equal(zero[name], usual[name]) for name in usual if name != "w_q")
    model = train(adapted(llama(), quantum=quantum, branch_init="zero"))
    assert all(adapter.stored("w_q").any() for adapter in adapters(model).values())


def test_a_product_of_paths_does_not_start_at_zero():
    with pytest.raises(ValueError, match=r"qtha\.branch_init: 'zero' would leave nothing to train.*What works: `branch_init: k"):
        QTHAConfig(quantum="qwthn", branch_init="zero")
    with pytest.raises(ValueError, match=r"qtha\.branch_init: 'zero' has no effect with `quantum: none`"):
        QTHAConfig(quantum="none", branch_init="zero")


def test_init_angles_is_saved_and_earlier_files_have_the_whole_turn(tmp_path):
    model = adapted(llama(), rank=4, init_angles=0.25)
    assert all(float(each.effective("angles").detach().abs().max()) <= 0.25 for each in adapters(model).values())
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert loaded.peft_config["default"].init_angles == 0.25
    assert torch.equal(logits(loaded), logits(model.eval()))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    del saved["init_angles"]
    path.write_text(json.dumps(saved))
    assert PeftConfig.from_pretrained(str(tmp_path)).init_angles == math.pi


@pytest.mark.parametrize("value", [0, -0.1, 3.2, float("nan"), float("inf"), True, "small"])
def test_no_other_init_angles(value):
    with pytest.raises(ValueError, match=r"qtha.init_angles: .*is not a number of radians in \(0, pi\].*`init_angles: 0.1`"):
        config(init_angles=value)
