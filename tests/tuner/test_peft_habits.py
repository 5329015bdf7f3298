"""What users of PEFT's LoRA are used to: done, or refused with what works."""

import dataclasses
import json
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model
from peft.tuners.lora import save_as_lora
from torch import nn

from axolotl_qtha import QTHAConfig

from ..models import BASES, adapted, adapters, config, gpt2, llama, logits, train


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"r": 8}, "qtha.r: 8 is LoRA's, and not known to QTHAConfig. What works: `rank: 8`"),
        ({"lora_alpha": 16}, "qtha.lora_alpha: 16 is LoRA's.*What works: `alpha: 16`"),
        ({"lora_dropout": 0.1}, "qtha.lora_dropout: 0.1 .*`dropout: 0.1`"),
        ({"bias": "all"}, r"qtha.bias: \(str, value not shown\) .*biases stay frozen"),
        ({"use_rslora": True}, "qtha.use_rslora: True .*`alpha`"),
        ({"use_dora": True}, "qtha.use_dora: True .*another method"),
        ({"megatron_core": "x"}, r"qtha.megatron_core: \(str, value not shown\) is LoRA's.*leave it out"),
        ({"rnak": 4}, r"qtha.rnak: \(int, value not shown\) is not known to QTHAConfig. What works: .*`rank`"),
    ],
)
def test_unknown_arguments_are_answered_with_what_to_write(argument, message):
    with pytest.raises(ValueError, match=message):
        QTHAConfig(**argument)


def test_every_name_of_loras_is_known_or_answered():
    ours = {field.name for field in dataclasses.fields(QTHAConfig)}
    for field in dataclasses.fields(LoraConfig):
        if field.name not in ours:
            with pytest.raises(ValueError, match=rf"qtha.{field.name}: 7 is LoRA's.*What works: ."):
                QTHAConfig(**{field.name: 7})


def test_a_file_of_a_later_version_loads_with_peft_s_warning(tmp_path):
    config(rank=2).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_tomorrow": 1}))
    with pytest.warns(UserWarning, match="of_tomorrow"):
        assert PeftConfig.from_pretrained(str(tmp_path)).rank == 2


IDLE = [
    *[
        {"quantum": "none", **more}
        for more in ({"qubits": 2}, {"circuit_layers": 3}, {"angle_scale": "raw"}, {"init_angles": 0.1})
    ],
    *[{"quantum": quantum, "gate_order": "2025-05"} for quantum in ("none", "silu")],
]


@pytest.mark.parametrize("settings", IDLE, ids=str)
def test_settings_of_a_circuit_that_is_not_there_are_refused_but_load_from_earlier_files(settings, tmp_path):
    *_, key = settings
    with pytest.raises(ValueError, match=rf"qtha.{key}: .*has no effect with `quantum: {settings['quantum']}`.*leave {key} out"):
        config(**settings)
    config(quantum=settings["quantum"]).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert dataclasses.replace(loaded, seed=1).quantum == settings["quantum"]  # and is a configuration like any other


def test_add_weighted_adapter_is_refused():
    model = adapted(llama())
    model.add_adapter("second", config(seed=3))
    with pytest.raises(ValueError, match=r"add_weighted_adapter: .*What works: .*set_adapter.*convert_to_lora"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("names", [["default"], ["default", "second"]])
def test_a_safe_merge_looks_at_all_layers_before_it_merges_one(how, names):
    model = train(adapted(llama(), quantum="none", target_modules=["q_proj", "down_proj"]))
    model.add_adapter("second", config(quantum="none", target_modules=["q_proj"]))
    last = "model.layers.1.mlp.down_proj" if names == ["default"] else "model.layers.1.self_attn.q_proj"
    with torch.no_grad():
        model.get_base_model().get_submodule(last).qtha_adapter[names[-1]].fusion.fill_(float("nan"))
    weights = {name: value.clone() for name, value in model.named_parameters() if "qtha" not in name}
    with pytest.raises(ValueError, match=r"gives NaN or infinite weights in .*_proj; nothing was merged") as caught:
        getattr(model, how)(safe_merge=True, adapter_names=names)
    assert last in str(caught.value)
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    assert not any(layer.merged for layer in model.modules() if hasattr(layer, "merged_adapters"))


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_without_a_circuit_converts_to_lora(base, tmp_path):
    model = train(adapted(BASES[base](), quantum="none", rank_pattern={"down_proj|c_fc": 2}))
    expected = logits(model)
    assert model.base_model.supports_lora_conversion()
    save_as_lora(tmp_path, model, rank=4)
    lora = PeftModel.from_pretrained(BASES[base](), tmp_path)
    assert lora.peft_config["default"].peft_type.value == "LORA"
    assert (logits(lora) - expected).abs().max() <= 1e-4  # rounding of the singular value decomposition
    settings, _ = convert_to_lora(model, rank=0.9999)  # as many as it takes
    assert max(settings.rank_pattern.values()) <= 4


def test_an_adapter_with_a_circuit_does_not_convert_and_says_why():
    model = adapted(llama())
    with pytest.warns(UserWarning, match="`quantum: qtha`, which is not linear.*qtha-export"), pytest.raises(TypeError):
        convert_to_lora(model, rank=4)


def test_no_target_modules_are_peft_s_default_for_lora():
    for base, settings in ((llama, {}), (gpt2, {})):
        ours = get_peft_model(base(), config(target_modules=None, **settings))
        loras = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM"))
        assert ours.peft_config["default"].target_modules == loras.peft_config["default"].target_modules
        assert adapters(ours)


def test_no_target_modules_are_refused_where_peft_has_no_default():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(16, 16)

    with pytest.raises(
        ValueError, match=r"qtha.target_modules: None .*`model_type: custom`. What works: `target_modules: all-lin"
    ):
        get_peft_model(Net(), QTHAConfig(target_modules=None))


def test_a_copy_of_a_configuration_is_equal():
    given = config(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3.0})
    assert deepcopy(given) == given == dataclasses.replace(given)
