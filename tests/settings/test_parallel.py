"""Ways to share a run among GPUs: what is refused before anything is loaded, and what is set where the YAML says nothing."""

import json

import pytest
from axolotl.utils.dict import DictDefault

from axolotl_qtha.settings.parallel import check_quant_storage, connect, deepspeed_settings, quant_storage, zero_stage

from ..e2e.ranks import FSDP2, ZERO

ON = {"enabled": True}
STAGE3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"tensor_parallel_size": 2}, ["tensor_parallel_size: 2", "`tensor_parallel_size: 1`", "ZeRO-1, 2, 3"]),
        ({"context_parallel_size": 4}, ["context_parallel_size: 4", "`context_parallel_size: 1`"]),
        ({"sequence_parallel_degree": 2}, ["sequence_parallel_degree: 2", "`sequence_parallel_degree: 1`"]),
        ({"expert_parallel_size": 8}, ["expert_parallel_size: 8", "`expert_parallel_size: 1`"]),
        ({"deepspeed": {"fp16": ON, "bf16": ON}}, ["fp16.enabled: true and bf16.enabled: true", "one of them", "`auto`"]),
        ({"deepspeed": {"tensor_parallel": {"autotp_size": 2}}}, ["tensor_parallel.autotp_size: 2", "leave it out"]),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, ["zero_optimization.stage is 4", "1, 2 or 3"]),
        ({"deepspeed": {"zero_optimization": {"stage": "three"}}}, ["zero_optimization.stage is 'three'"]),
        ({"deepspeed": STAGE3, "load_in_8bit": True}, ["load_in_8bit: true", "ZeRO-3", "`load_in_4bit: true`"]),
        ({"deepspeed": STAGE3, **FSDP2}, ["deepspeed:", "fsdp_config: both are set", "one of them"]),
        ({"fsdp_config": {"reshard_after_forward": True}}, ["fsdp_version: 1", "`fsdp_version: 2`"]),
        ({"fsdp": ["full_shard", "auto_wrap"]}, ["fsdp_version: 1", "`fsdp_version: 2`"]),
        ({"fsdp_config": {"fsdp_version": 1}}, ["fsdp_version: 1"]),
        ({**FSDP2, "load_in_8bit": True}, ["load_in_8bit: true", "FSDP2", "ZeRO-1 or 2"]),
        (
            {"fsdp_version": 2, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
            ["SHARDED_STATE_DICT", "FULL_STATE_DICT"],
        ),
        ({"fsdp_version": 2, "fsdp_config": {"fsdp_state_dict_type": "LOCAL_STATE_DICT"}}, ["LOCAL_STATE_DICT"]),
        ({**FSDP2, "fsdp_final_state_dict_type": "SHARDED_STATE_DICT"}, ["final_state_dict_type: SHARDED_STATE_DICT"]),
        (
            {"fsdp_version": 2, "fsdp_config": {"cpu_ram_efficient_loading": True}, "qtha": {"quantum": "frozen"}},
            ["cpu_ram_efficient_loading: true", "`quantum: frozen`", "`cpu_ram_efficient_loading: false`"],
        ),
    ],
    ids=str,
)
def test_refusals_name_key_value_and_what_works(data, words):
    with pytest.raises(ValueError, match="What works") as error:
        connect(data)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["is no file", "zero2.json"]),
        ("{'stage': 3}", ["is not JSON"]),
        ("[3]", ["holds a list"]),
    ],
)
def test_deepspeed_files_that_cannot_be_read(content, words, tmp_path):
    (tmp_path / "zero2.json").write_text("{}")
    file = tmp_path / "zero3.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match="What works") as error:
        connect({"deepspeed": str(file)})
    for word in [str(file), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"tensor_parallel_size": 1, "context_parallel_size": None},
        {"deepspeed": {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}},
        {"deepspeed": {"bf16": ON, "fp16": {"enabled": False}, "zero_optimization": {"stage": 2}}, "load_in_8bit": True},
        {"deepspeed": STAGE3, "load_in_4bit": True},
        *({"deepspeed": str(path)} for path in sorted(ZERO.glob("*.json"))),
    ],
    ids=str,
)
def test_what_works_is_let_through_as_it_is(data):
    before = json.dumps(data)
    connect(data)
    assert json.dumps(data) == before


def test_fsdp2_checkpoints_hold_whole_adapters():
    data = {**FSDP2}
    connect(data)
    assert data["fsdp_config"] == {**FSDP2["fsdp_config"], "state_dict_type": "FULL_STATE_DICT"}
    assert "state_dict_type" not in FSDP2["fsdp_config"]


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3-offload", 3)])
def test_stages_of_the_shipped_files(name, stage):
    assert zero_stage(deepspeed_settings(str(ZERO / f"{name}.json"))) == stage


@pytest.mark.parametrize(
    ("sharing", "storage"),
    [
        ({}, "uint8"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "uint8"),
        ({"deepspeed": STAGE3}, "bfloat16"),
        (FSDP2, "bfloat16"),
    ],
    ids=str,
)
def test_sharded_4_bit_weights_are_stored_in_the_dtype_of_the_rest(sharing, storage):
    cfg = DictDefault({"torch_dtype": "torch.bfloat16", **sharing})
    assert quant_storage(cfg, "uint8") == storage
    check_quant_storage(cfg, storage)


def test_zero3_refuses_4_bit_weights_of_another_dtype():
    with pytest.raises(ValueError, match=r"bnb_4bit_quant_storage: uint8} does not work with ZeRO-3.*quant_storage: bfloat16}`"):
        check_quant_storage(DictDefault({"torch_dtype": "torch.bfloat16", "deepspeed": STAGE3}), "uint8")
