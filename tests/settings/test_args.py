"""The `qtha:` block: what it accepts, what it connects, and what it refuses."""

import subprocess
import sys
from importlib import metadata

import pytest
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_qtha.cli.schema import config_schema
from axolotl_qtha.errors import PrivateSettings
from axolotl_qtha.settings.args import QTHABlock

BASE = {
    "base_model": "some/model",
    "plugins": ["axolotl_qtha.QTHAPlugin"],
    "adapter": "qtha",
    "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "output_dir": "unused",
}


def validated(gpus=None, **changes):
    config = DictDefault({key: value for key, value in {**BASE, **changes}.items() if value is not None})
    prepare_plugins(config)
    if gpus is None:
        return validate_config(config)
    capabilities = {"bf16": True, "fp8": False, "tf32": False, "n_gpu": gpus, "n_node": 1, "compute_capability": "sm_90"}
    return validate_config(config, capabilities=capabilities, env_capabilities={"torch_version": "2.11.0"})


def test_no_block_means_defaults():
    assert validated().adapter == "qtha"
    assert validated(qtha={"rank": 4}).qtha.quantum == "qtha"


def test_circuit_lr_becomes_a_learning_rate_group():
    config = validated(qtha={"circuit_lr": "1e-2"}, lr_groups=[{"name": "mine", "modules": ["q_proj"], "lr": 1e-4}])
    groups = {group["name"]: group for group in config.lr_groups}
    assert list(groups) == ["qtha_circuit", "mine"]  # Axolotl gives a tensor to the first group whose text is in its name
    assert groups["qtha_circuit"]["lr"] == 0.01
    assert "qtha_adapter.default.angles" in groups["qtha_circuit"]["modules"]


def test_merge_method_is_the_one_that_cannot_write_an_unmerged_base():
    assert validated().merge_method == "legacy"


def test_modules_to_save_reaches_axolotl():
    assert validated(qtha={"modules_to_save": ["lm_head"]}).lora_modules_to_save == ["lm_head"]


AER = {"quantum_backend": "aer"}
DEPOLARIZING = {**AER, "noise_model": "depolarizing"}
# block -> what the message must hold: the key, the value and something that works
BAD_BLOCKS = [
    ({**DEPOLARIZING, "depolarizing_1q": 1.5}, ["qtha.depolarizing_1q", "1.5", "[0, 1]", "`depolarizing_1q: 0.01`"]),
    ({**DEPOLARIZING, "depolarizing_2q": -0.1}, ["qtha.depolarizing_2q", "-0.1", "[0, 1]"]),
    ({**DEPOLARIZING, "readout_error": [0.1]}, ["qtha.readout_error", "[0.1]", "two of them", "`readout_error: [0.01, 0.03]`"]),
    ({**DEPOLARIZING, "readout_error": [0.1, 2]}, ["qtha.readout_error", "2.0", "[0, 1]"]),
    ({**AER, "depolarizing_1q": 0.1}, ["qtha.depolarizing_1q", "0.1", "`noise_model: none`", "`noise_model: depolarizing`"]),
    ({**AER, "noise_model": "readout", "depolarizing_2q": 0.1}, ["qtha.depolarizing_2q", "`noise_model: readout`"]),
    ({**AER, "noise_model": "fake:manila", "readout_error": 0.1}, ["qtha.readout_error", "`noise_model: fake:manila`"]),
    ({"depolarizing_1q": 0.1}, ["qtha.depolarizing_1q", "0.1", "Aer's", "`quantum_backend: aer`"]),
    ({**AER, "noise_model": "no_such_module:model"}, ["no_such_module:model", "`import no_such_module` fails", "NoiseModel"]),
    ({**AER, "noise_model": "math:nothing"}, ["math:nothing", "`math` was imported and has no `nothing`", "BackendV2"]),
    ({**AER, "noise_model": "math:pi"}, ["math:pi", "gives no NoiseModel or BackendV2, but an object of builtins.float"]),
    ({"rnak": 4}, ["qtha.rnak: (int, value not shown)", "`rank`"]),
    ({"rank": 0}, ["qtha.rank", "0", "rank: 8"]),
    ({"rank": -3}, ["qtha.rank", "-3", "rank: 8"]),
    ({"rank": 13}, ["qtha.rank", "13", "`rank: 12` or `rank: 14`", "quantum: none"]),
    ({"rank": 17, "quantum": "frozen"}, ["qtha.rank", "17", "frozen", "`rank: 16` or `rank: 18`"]),
    ({"rank": 22}, ["qtha.rank", "22", "`rank: 21` or `rank: 24`", "`qubits: 11` with this rank"]),
    ({"rank": 32, "qubits": 5}, ["qtha.qubits", "5", "does not divide rank 32", "`qubits: 4`, `qubits: 8`"]),
    ({"rank": 32, "qubits": 0}, ["qtha.qubits", "0", "positive", "`qubits: 4`"]),
    ({"rank": 32, "qubits": 16}, ["qtha.qubits", "16", "more than the 12", "`qubits: 8`"]),
    ({"rank": 32, "qubits": 16, "quantum": "silu"}, ["qtha.qubits", "16", "more than the 12"]),
    ({"rank": 32, "qubits": 64, "quantum": "none"}, ["qtha.qubits", "64", "does not divide"]),
    ({"rank": 12, "qubits": True}, ["qtha.qubits"]),
    ({"rank": True}, ["qtha.rank", "True", "integer"]),
    ({"rank": "eight"}, ["qtha.rank", "eight", "integer"]),
    ({"num_cores": 13}, ["qtha.num_cores", "13", "num_cores: 2"]),
    ({"rank": 100000, "quantum": "none"}, ["qtha.rank", "100000", "more than 16,384", "rank: 8"]),
    ({"rank_pattern": {"q_proj": 100000}, "quantum": "none"}, ["qtha.rank_pattern", "100000"]),
    ({"circuit_layers": 10**9}, ["qtha.circuit_layers", "1000000000", "more than 1,000", "circuit_layers: 2"]),
    ({"mid_dim": 10**9}, ["qtha.mid_dim", "more than 65,536"]),
    ({"bond_dim": 10**9}, ["qtha.bond_dim", "more than 1,000,000"]),
    ({"modules_to_save": ["norm\n\n# A heading"]}, ["qtha.modules_to_save", "is no name of a module"]),
    ({"target_modules": [""]}, ["qtha.target_modules", "is no name of a module"]),
    ({"layers_to_transform": [-1]}, ["qtha.layers_to_transform", "[-1]", "index"]),
    ({"seed": -1}, ["qtha.seed", "-1", "seed: 42"]),
    ({"alpha": float("nan")}, ["qtha.alpha", "nan", "finite"]),
    ({"alpha": 0}, ["qtha.alpha", "0", "alpha: 16"]),
    ({"dropout": 1.0}, ["qtha.dropout", "1.0", "0.05"]),
    ({"param_budget": 0}, ["qtha.param_budget", "0", "0.24"]),
    ({"param_budget": 24}, ["qtha.param_budget", "24", "0.24"]),
    ({"bond_dim": 0}, ["qtha.bond_dim", "0"]),
    ({"mid_dim": 3}, ["qtha.mid_dim", "3", "mid_dim: 8"]),
    ({"num_cores": 0}, ["qtha.num_cores", "0"]),
    ({"circuit_layers": 0}, ["qtha.circuit_layers", "0"]),
    ({"r": 8}, ["qtha.r", "8", "is LoRA's", "`qtha:` block", "`rank: 8`"]),
    ({"lora_alpha": 32}, ["qtha.lora_alpha", "32", "`alpha: 32`"]),
    ({"bias": "all"}, ["qtha.bias: (str, value not shown)", "biases stay frozen"]),
    (
        {"quantum": "none", "circuit_layers": 4},
        ["qtha.circuit_layers", "4", "no effect", "`quantum: none`", "leave circuit_layers out"],
    ),
    ({"quantum": "none", "angle_scale": "raw"}, ["qtha.angle_scale", "'raw'", "no effect"]),
    ({"quantum": "none", "qubits": 4}, ["qtha.qubits", "4", "no effect"]),
    ({"quantum": "silu", "gate_order": "2025-05"}, ["qtha.gate_order", "'2025-05'", "no effect", "`quantum: silu`"]),
    ({"quantum": "sine", "angle_scale": "raw"}, ["qtha.angle_scale", "'raw'", "no effect", "`quantum: sine`"]),
    ({"quantum": "product", "qubits": 4}, ["qtha.qubits", "4", "no effect", "`quantum: product`", "leave qubits out"]),
    ({"quantum": "product", "gate_order": "2025-05"}, ["qtha.gate_order", "no effect", "`quantum: product`"]),
    ({"rank_pattern": {"q_proj": 22}}, ["qtha.rank_pattern", "22", "`rank: 21` or `rank: 24`"]),
    ({"rank_pattern": {"q_proj": True}}, ["rank_pattern"]),
    ({"circuit_lr": 0}, ["qtha.circuit_lr", "0", "greater than 0"]),
    ({"circuit_lr": 0.1, "quantum": "none"}, ["qtha.circuit_lr", "0.1", "leave it out"]),
    ({"quantum": "qbit"}, ["qtha.quantum", "qbit", "'qtha'", "'silu'"]),
    ({"mpo": "mps"}, ["qtha.mpo", "mps", "'tt'"]),
    ({"angle_scale": "pi"}, ["qtha.angle_scale", "pi", "'tanh'"]),
    ({"init_angles": 0}, ["qtha.init_angles", "0", "(0, pi]", "`init_angles: 0.1`"]),
    ({"init_angles": 3.5}, ["qtha.init_angles", "3.5", "(0, pi]"]),
    ({"quantum": "silu", "init_angles": 0.1}, ["qtha.init_angles", "0.1", "no effect", "leave init_angles out"]),
    ({"gate_order": "2024"}, ["qtha.gate_order", "2024", "'2025-06'"]),
    ({"init": "zeros"}, ["qtha.init", "zeros", "'kaiming'"]),
    ({"quantum_backend": "aergpu"}, ["qtha.quantum_backend: (str, value not shown)", "`torch`", "`aer_gpu`"]),
    ({"quantum_backend": "aer", "quantum": "none"}, ["qtha.quantum_backend", "aer", "quantum: none", "leave it out"]),
    ({**AER, "shots": 0}, ["qtha.shots", "0", "shots: 1024"]),
    ({**AER, "shots": -5}, ["qtha.shots", "-5", "shots: 1024"]),
    ({**AER, "shots": 10**7}, ["qtha.shots", "10000000", "1 to 1,000,000"]),
    ({**AER, "shots": 10.5}, ["qtha.shots", "10.5", "integer"]),
    ({**AER, "seed_simulator": -1}, ["qtha.seed_simulator", "-1", "seed_simulator: 42"]),
    ({**AER, "precision": "half"}, ["qtha.precision", "half", "'single'"]),
    ({**AER, "gradient": "spsa"}, ["qtha.gradient", "spsa", "'parameter_shift'", "'adjoint'"]),
    ({**AER, "noise_model": "bitflip"}, ["qtha.noise_model", "bitflip", "`depolarizing`", "`fake:`"]),
    ({**AER, "noise_model": "fake:manilla"}, ["qtha.noise_model", "fake:manilla", "`fake:manila`"]),
    ({**AER, "noise_model": "fake:manila", "rank": 6}, ["qtha.noise_model", "5 qubits", "`qubits:`", "`fake:torino`"]),
    ({"shots": 100}, ["qtha.shots", "100", "is Aer's", "`quantum_backend: aer`"]),
    ({"noise_model": "depolarizing"}, ["qtha.noise_model", "is Aer's", "leave noise_model out"]),
    ({"gradient": "adjoint"}, ["qtha.gradient", "is Aer's"]),
    ({"in_factors": {3584: [3, 5]}}, ["qtha.in_factors", "3584: [3, 5]", "[64, 56]"]),
    ({"out_factors": {8: [100, 100]}}, ["qtha.out_factors", "10000", "leave 8 out"]),
    ({"mpo": "none", "bond_dim": 4}, ["qtha.bond_dim", "4", "mpo: tt"]),
    ({"mpo": "none", "init": "tt_svd"}, ["qtha.init", "tt_svd", "mpo: tt"]),
    ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, ["qtha.layers_to_transform", "[0]", "list"]),
]


@pytest.mark.parametrize(("block", "words"), BAD_BLOCKS, ids=lambda value: str(value)[:40] if isinstance(value, dict) else "")
def test_bad_block(block, words):
    with pytest.raises((ValueError, PrivateSettings), match="qtha") as error:
        validated(qtha=block)
    for word in words:
        assert word in str(error.value)


BAD_COMBINATIONS = [
    ({"lora_r": 8}, "qtha: {rank: 8}"),
    ({"lora_alpha": 16}, "qtha: {alpha: 16}"),
    ({"lora_dropout": 0.1}, "qtha: {dropout: 0.1}"),
    ({"lora_target_modules": ["q_proj"]}, "target_modules: ['q_proj']"),
    ({"lora_target_linear": True}, "target_modules: all-linear"),
    ({"lora_modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"lora_mlp_kernel": True}, "leave it out"),
    ({"lora_qkv_kernel": True}, "leave it out"),
    ({"lora_o_kernel": True}, "leave it out"),
    ({"relora": True}, "adapter: lora"),
    ({"peft_use_dora": True}, "adapter: lora"),
    ({"loraplus_lr_ratio": 16}, "circuit_lr"),
    ({"flash_attn_fuse_mlp": True}, "leave it out"),
    ({"qat": {"weight_dtype": "int4"}}, "leave it out"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size: 1"),
    ({"unfrozen_parameters": ["lm_head"]}, "modules_to_save"),
    ({"load_in_4bit": True, "load_in_8bit": True}, "one of them"),
    ({"load_in_4bit": True, "gptq": True}, "one of them"),
    ({"load_in_8bit": True, "model_kwargs": {"quantization_config": {"quant_method": "hqq"}}}, "one of them"),
    ({"bnb_config_kwargs": {"bnb_4bit_quant_typ": "fp4"}, "load_in_4bit": True}, "`bnb_4bit_quant_type`"),
    ({"bnb_config_kwargs": {"blocksize": 128}, "load_in_4bit": True}, "`llm_int8_skip_modules`"),
    ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "nf5"}, "load_in_4bit": True}, "`nf4`"),
    ({"bnb_config_kwargs": {"bnb_4bit_compute_dtype": "float99"}, "load_in_4bit": True}, "`bnb_4bit_compute_dtype: bfloat16`"),
    ({"bnb_config_kwargs": {"load_in_8bit": True}, "load_in_4bit": True}, "only one can be used"),
    ({"model_kwargs": {"quantization_config": {"nf": 4}}, "load_in_4bit": True}, "`bnb_4bit_quant_type`"),
]


@pytest.mark.parametrize(
    ("changes", "works"), BAD_COMBINATIONS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_bad_combination(changes, works):
    with pytest.raises(ValueError, match=next(iter(changes))) as error:
        validated(**changes)
    assert works in str(error.value)


@pytest.mark.parametrize("place", ["model_kwargs", "overrides_of_model_kwargs"])
def test_quantisation_reaches_axolotl_beside_other_model_kwargs(place):
    config = validated(load_in_4bit=True, **{place: {"use_cache": False}}, bnb_config_kwargs={"bnb_4bit_quant_type": "fp4"})
    assert config.overrides_of_model_kwargs == {
        "use_cache": False,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": True,
        },
    }
    assert validated(**{place: {"use_cache": False}}).overrides_of_model_kwargs == {"use_cache": False}


@pytest.mark.parametrize(("found", "words"), [(None, "not installed"), ("0.43.0", "version 0.43.0 is here")])
def test_bitsandbytes_missing_or_too_old(monkeypatch, found, words):
    def version(name, real=metadata.version):
        if name != "bitsandbytes":
            return real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ValueError, match=rf"load_in_8bit: true needs bitsandbytes.*{words}.*What works: `pip install 'bitsandb"):
        validated(load_in_8bit=True)
    assert validated().adapter == "qtha"  # not needed without


def test_reentrant_checkpointing_of_dpo_on_several_gpus():
    keys = {"rl": "dpo", "gradient_checkpointing": True, "datasets": [{"path": "data.jsonl", "split": "train", "type": "chatml"}]}
    reentrant = {**keys, "load_in_4bit": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    message = r"gradient_checkpointing_kwargs: \{'use_reentrant': True\}.*`rl:`.*on 2 GPUs.*What works:.*use_reentrant: false"
    with pytest.raises(ValueError, match=message):
        validated(gpus=2, **reentrant)
    # one of the three alone is no reason
    assert validated(gpus=1, **reentrant).rl == "dpo"
    assert validated(gpus=2, **{**reentrant, "load_in_4bit": None}).rl == "dpo"
    assert validated(gpus=2, **{**reentrant, "gradient_checkpointing_kwargs": {"use_reentrant": False}}).rl == "dpo"


def test_block_without_the_adapter():
    with pytest.raises(ValueError, match=r"qtha: the block has no effect with `adapter: lora`.*`adapter: qtha`"):
        validated(adapter="lora", qtha={"rank": 8})


def test_lora_beside_the_plugin_is_untouched():
    assert validated(adapter="lora", lora_r=8).merge_method == "memory_efficient"


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from([*QTHABlock.model_fields, "junk"]), st.none() | st.booleans() | st.integers() | st.text()))
@settings(max_examples=200, deadline=None)
def test_any_block_is_accepted_or_refused_with_a_value_error(block):
    try:
        accepted = QTHABlock.model_validate(block).adapter_settings()
    except (ValueError, PrivateSettings):  # pydantic's ValidationError is one; anything else fails the test
        return
    assert all(value is not None for value in accepted.values())


def test_every_key_is_described():
    result = CliRunner().invoke(config_schema, ["--format", "json"])
    assert result.exit_code == 0
    for key, field in QTHABlock.model_fields.items():
        assert field.description
        assert f'"{key}"' in result.output
        one = CliRunner().invoke(config_schema, ["--field", key])
        assert one.exit_code == 0
        assert "description" in one.output
    assert "rank" in CliRunner().invoke(config_schema, ["--field", "rnk"]).output


@pytest.mark.slow
def test_import_starts_neither_qiskit_nor_axolotl_nor_cuda():
    code = (
        "import sys, torch, axolotl_qtha; "
        "loaded = [m for m in ('qiskit', 'qiskit_aer', 'axolotl', 'tensorly') if m in sys.modules]; "
        "assert not loaded, loaded; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantize_moe_experts": True}, ["quantize_moe_experts: true", "`load_in_4bit: true`"]),
        ({"nvfp4_merge_aware": True}, ["nvfp4_merge_aware: True", "4-bit grid"]),
        ({"ple_cpu_offload": True}, ["ple_cpu_offload: True", "leave it out"]),
        ({"optimizer": "polora"}, ["optimizer: 'polora'", "`optimizer: adamw_torch`"]),
        ({"optimizer": "muon"}, ["optimizer: 'muon' skips every tensor with fewer than two", "`optimizer: adamw_torch`"]),
        ({"lora_rank_pattern": {"q_proj": 4}}, ["lora_rank_pattern", "`qtha: {rank_pattern: {'q_proj': 4}}`"]),
        ({"lora_alpha_pattern": {"q_proj": 4}}, ["lora_alpha_pattern", "`qtha: {alpha_pattern: {'q_proj': 4}}`"]),
        ({"rl": "gdpo"}, ["rl: 'gdpo'", "`rl: grpo`"]),
        ({"rl": "grpo", "trl": {"use_vllm": True}}, ["trl.use_vllm: True", "`quantum: qtha`", "`use_vllm: false`"]),
        (
            {"rl": "grpo", "trl": {"use_vllm": True}, "load_in_4bit": True, "qtha": {"quantum": "none"}},
            ["trl.use_vllm: True", "`load_in_4bit: true`", "`use_vllm: false`"],
        ),
        ({"rl": "grpo", "trl": {"vllm_lora_sync": True}}, ["trl.vllm_lora_sync: True", "leave it out"]),
        ({"rl": "simpo"}, ["simpo_gamma: None", "`simpo_gamma: 0.5`"]),
        ({"relora": True, "jagged_restart_steps": 10}, ["relora: True", "LoRA's matrices"]),
        ({"qat": {"weight_dtype": "int4"}, "optimizer": "q_galore_adamw8bit"}, ["qat:"]),
    ],
)
def test_our_refusals_speak_before_axolotls(changes, words):
    """Axolotl's own checks would advise `adapter: lora`, or speak of ReLoRA's restarts."""
    with pytest.raises(ValueError, match=r"adapter|What works") as error:
        validated(**changes)
    for word in words:
        assert word in str(error.value)
    for word in ("requires adapter: lora", "must support ReLoRA", "requires qlora"):
        assert word not in str(error.value)


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("gpus", [None, 2])
def test_experts_may_be_quantised(key, gpus):
    """Axolotl's check wants `adapter: lora`; its loader quantises the experts of any base whose configuration has the key."""
    config = validated(gpus=gpus, quantize_moe_experts=True, **{key: True})
    assert config.quantize_moe_experts is True
    assert validated(adapter="lora", qtha=None, quantize_moe_experts=True, **{key: True}).quantize_moe_experts is True
    assert not validated(**{key: True}).quantize_moe_experts
