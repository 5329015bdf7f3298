"""A batch that mixes adapters: each sequence as if it ran alone with its own."""

import re

import pytest
import torch
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from axolotl_qtha import QTHAConfig
from axolotl_qtha.tuner.mixed import BASE

from ..models import BASES, adapted, config, llama, train

NAMES = ["second", BASE, "default", "second"]
IDS = torch.randint(97, (4, 6), generator=torch.Generator().manual_seed(5))
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def two(base, **settings):
    """Return a model with two trained adapters, on other layers and of other kinds."""
    model = train(
        adapted(base, target_modules=["c_attn"] if "GPT2" in type(base).__name__ else ["q_proj", "k_proj", "down_proj"])
    )
    second = {"target_modules": ["c_attn", "c_fc"] if "GPT2" in type(base).__name__ else ["q_proj", "up_proj"], "seed": 3}
    model.add_adapter("second", config(**{**second, **settings}))
    model.set_adapter("second")
    train(model, 5)
    model.set_adapter("default")
    return model.eval()


def alone(model, run):
    """Return what each adapter gives for the whole batch, by its name."""
    found = {}
    with model.disable_adapter():
        found[BASE] = run()
    for name in ("second", "default"):
        model.set_adapter(name)
        found[name] = run()
    return found


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("settings", [{"quantum": "none", "modules_to_save": ["lm_head"]}, {"quantum": "silu"}], ids=str)
def test_each_sequence_has_the_logits_of_its_own_adapter(base, settings):
    model = two(BASES[base](), **settings)
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=NAMES).logits
        each = alone(model, lambda: model(input_ids=IDS).logits)
    for row, name in enumerate(NAMES):
        # a product of fewer rows may round differently
        assert (mixed[row] - each[name][row]).abs().max() <= 1e-5, name
    assert (each["second"] - each["default"]).abs().max() > 1e-3
    assert (each["second"] - each[BASE]).abs().max() > 1e-3
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generate_mixes_adapters(how):
    model = two(llama(), share={"inputs": True}, target_modules=["q_proj", "k_proj", "up_proj"])
    mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **GREEDY, **how)
    each = alone(model, lambda: model.generate(input_ids=IDS, **GREEDY, **how))
    returned = how.get("num_return_sequences", 1)
    for row, name in enumerate(name for name in NAMES for _ in range(returned)):
        assert torch.equal(mixed[row], each[name][row]), name
    assert not torch.equal(each["second"], each["default"])


def test_an_encoder_is_not_given_the_beams_names():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 1, "decoder_start_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    settings = {"rank": 4, "bond_dim": 4, "mid_dim": 8, "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(base, QTHAConfig(target_modules=["q", "wi", "wo"], **settings)).eval()
    model.add_adapter("second", QTHAConfig(target_modules=["q", "v"], seed=3, **settings))
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "QTHAAdapter":
                module.cores.normal_(generator=torch.Generator().manual_seed(1))
    for how in ({}, {"num_beams": 2}):
        mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **GREEDY, **how)
        each = alone(model, lambda how=how: model.generate(input_ids=IDS, **GREEDY, **how))
        assert all(torch.equal(mixed[row], each[name][row]) for row, name in enumerate(NAMES))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("default", "adapter_names='default' is no list. What works: a list with one of .*'__base__', 'default', 'second'"),
        (["default", "thrid", BASE, BASE], "adapter_names: .'thrid'. are no adapters of this model. What works: .*'second'"),
        (["default", BASE], "adapter_names: 2 names, and .*q_proj is given a batch of 4"),
    ],
)
def test_bad_names_are_refused(names, message):
    model = two(llama())
    with pytest.raises(ValueError, match=re.compile(message)):
        model(input_ids=IDS, adapter_names=names)
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(input_ids=IDS, adapter_names=NAMES)


def test_merged_adapters_do_not_mix():
    model = train(adapted(llama(), quantum="none"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj has .'default'. merged. What works: unmerge_adapter"):
        model(input_ids=IDS, adapter_names=["default"] * 4)
