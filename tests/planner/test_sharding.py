"""What one rank keeps, against bytes counted by hand, DeepSpeed's own estimators, and what DeepSpeed was seen to gather."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import LlamaConfig

from axolotl_qtha.planner.estimate import ZERO3_SETTINGS, adapted, make_plan
from axolotl_qtha.planner.sharding import shards
from axolotl_qtha.planner.show import show_plan
from axolotl_qtha.terminal import console

from .bases import CONFIGS, RUN, SIZES, run_on

EXAMPLES = Path(__file__).parents[2] / "example_configs" / "deepspeed"
MATRICES = 2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 448  # of a block: q and o, k and v, gate, up and down
BLOCK = MATRICES + 2 * 192  # and its norms
ROOT = 2 * 1000 * 192 + 192  # embedding, head, the last norm
BASE = 3 * BLOCK + ROOT
TRAINED = 16992  # entries of the adapters
TABLES = 128  # bytes of the rotary embedding's two buffers, float32

ZERO = {"bf16": {"enabled": "auto"}}
FSDP = {
    "fsdp_version": 2,
    "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
}


def training(tmp_path, **changes):
    """Return a run whose layers share nothing, in any way of sharing it among ranks: what DeepSpeed was watched with."""
    return run_on(tmp_path, CONFIGS["llama"], **{"qtha": {**RUN["qtha"], "mpo": "tt"}, **changes})


def memory(tmp_path, ranks, **changes):
    plan = make_plan(training(tmp_path, bf16=True, **changes), [], ranks=ranks)
    assert plan.memory is not None, plan.memory_unknown
    assert plan.ranks == ranks
    return plan.memory, plan


def zero(stage, **more):
    return {"deepspeed": {**ZERO, "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, **more}}}


@pytest.mark.slow
def test_one_rank_and_ddp_keep_all(tmp_path):
    alone, plan = memory(tmp_path, 1)
    assert alone.weights == 2 * BASE + TABLES
    assert (alone.adapter, alone.gradients, alone.optimiser) == (4 * TRAINED, 4 * TRAINED, 8 * TRAINED)
    assert plan.sharing == "not shared"
    many, plan = memory(tmp_path, 8)
    assert many == alone
    assert plan.sharing == "DDP"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_zero1_and_2_share_states_and_gradients(tmp_path, stage):
    alone, _ = memory(tmp_path, 1)
    one, plan = memory(tmp_path, 4, **zero(stage))
    assert plan.sharing == f"ZeRO-{stage}"
    assert one.weights == alone.weights
    assert one.adapter == 2 * TRAINED  # cast to bfloat16
    assert one.gradients == (2 * TRAINED if stage == 1 else 2 * TRAINED // 4)
    assert one.optimiser == (4 + 8) * TRAINED // 4  # the master copy and AdamW's moments
    assert one.working == alone.working + 2 * 1000  # the bucket
    overlapping, _ = memory(tmp_path, 4, **zero(stage, overlap_comm=True))
    assert overlapping.working == alone.working + 2 * 2 * 1000


@pytest.mark.slow
def test_zero3_shares_all_but_what_is_small(tmp_path):
    one, plan = memory(tmp_path, 4, **zero(3, stage3_param_persistence_threshold=191))
    assert plan.sharing == "ZeRO-3"
    assert one.weights == 2 * BASE // 4 + TABLES
    small = one.adapter - 2 * TRAINED // 4  # the adapters' tensors of up to 191 entries stay whole
    assert 0 < small < 2 * TRAINED
    none, _ = memory(tmp_path, 4, **zero(3, stage3_param_persistence_threshold=0))
    assert (none.adapter, none.gradients, none.optimiser) == (2 * TRAINED // 4, 2 * TRAINED // 4, 12 * TRAINED // 4)
    norms, _ = memory(tmp_path, 4, **zero(3, stage3_param_persistence_threshold=192))
    assert norms.weights == one.weights + 2 * 7 * 192
    assert memory(tmp_path, 4, **zero(3, stage3_param_persistence_threshold="auto"))[0].adapter == 2 * TRAINED * 5 // 4


@pytest.mark.slow
def test_fsdp2(tmp_path):
    alone, _ = memory(tmp_path, 1)
    one, plan = memory(tmp_path, 4, **FSDP)
    assert plan.sharing == "FSDP2"
    assert one.weights == 2 * BASE // 4 + TABLES
    assert (one.adapter, one.gradients, one.optimiser) == (TRAINED, TRAINED, 2 * TRAINED)  # float32, a quarter of each
    block = 2 * (BLOCK + TRAINED // 3)
    assert one.working - alone.working == 2 * ROOT + max(2 * ROOT, 2 * block)
    kept, _ = memory(tmp_path, 4, fsdp_version=2, fsdp_config={**FSDP["fsdp_config"], "reshard_after_forward": False})
    assert kept.working - alone.working == 2 * (BASE + TRAINED) + max(2 * ROOT, block)


@pytest.mark.slow
def test_four_bits_share_weights_but_not_scales(tmp_path):
    whole, _ = memory(tmp_path, 1, load_in_4bit=True)
    full = 2 * (3 * 2 * 192 + ROOT)
    scales = whole.weights - full - 3 * MATRICES // 2 - TABLES
    # a byte for each 64 weights, a float32 for 256 of these, and tables of 1092 bytes a layer
    assert scales == pytest.approx(3 * MATRICES / 64 * (1 + 4 / 256) + 21 * 1092, rel=0.002)
    for changes in (zero(3, stage3_param_persistence_threshold=0), FSDP):
        one, plan = memory(tmp_path, 4, load_in_4bit=True, **changes)
        assert one.weights == (full + 3 * MATRICES // 2) // 4 + scales + TABLES
        assert plan.loading == whole.weights
        assert plan.needed > int(1.05 * plan.memory.total)
    assert memory(tmp_path, 4, load_in_4bit=True, **zero(2))[1].loading == 0
    assert memory(tmp_path, 4, **zero(3))[1].loading == 0


@pytest.mark.slow
def test_what_is_offloaded_is_off_the_gpu(tmp_path):
    cpu = {"device": "cpu"}
    one, plan = memory(tmp_path, 4, **zero(2, offload_optimizer=cpu))
    assert plan.sharing == "ZeRO-2, optimiser on the CPU"
    assert (one.gradients, one.optimiser) == (0, 0)
    away, plan = memory(tmp_path, 4, **zero(3, stage3_param_persistence_threshold=0, offload_optimizer=cpu, offload_param=cpu))
    assert plan.sharing == "ZeRO-3, optimiser on the CPU, parameters on the CPU"
    assert (away.weights, away.adapter, away.gradients, away.optimiser) == (TABLES, 0, 0, 0)
    fsdp, plan = memory(tmp_path, 4, fsdp_version=2, fsdp_config={**FSDP["fsdp_config"], "offload_params": True})
    assert "parameters on the CPU" in plan.sharing
    assert (fsdp.weights, fsdp.adapter, fsdp.gradients, fsdp.optimiser) == (TABLES, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_deepspeeds_own_estimators(tmp_path, ranks):
    """They take every parameter for a trained one, and count the float32 gradients of the optimiser's step."""
    two, _ = memory(tmp_path, ranks, **zero(2))
    _, estimated = estimate_zero2_model_states_mem_needs(TRAINED, ranks, 1, cpu_offload=False)
    assert two.adapter + two.gradients + two.optimiser == estimated - 4 * TRAINED // ranks
    three, _ = memory(tmp_path, ranks, **zero(3, stage3_param_persistence_threshold=0))
    _, estimated, _ = estimate_zero3_model_states_mem_needs(TRAINED, 0, ranks, 1, cpu_offload=False)
    assert three.adapter + three.gradients + three.optimiser == estimated - 2 * TRAINED // ranks  # 18 bytes there, 16 here
    offloaded, _ = memory(tmp_path, ranks, **zero(2, offload_optimizer={"device": "cpu"}))
    _, estimated = estimate_zero2_model_states_mem_needs(TRAINED, ranks, 1, cpu_offload=True)
    assert offloaded.adapter + offloaded.gradients + offloaded.optimiser == estimated


# Entries gathered, calls, and most entries alive, as counted in DeepSpeed 0.18.9's coordinator while it trained this model on two
# CPU ranks in float32, after its trace was complete: (settings, checkpointing, gathered, calls, alive).
SEEN = [
    ((0, 1000, 1_000_000, 300_000), False, 2_406_912, 40, 499_200),
    ((200_000, 10_000, 400_000, 300_000), False, 2_628_096, 27, 486_912),
    ((200_000, 10_000, 400_000, 300_000), True, 2_898_432, 29, 486_912),
    ((33_177, 1920, 900_000, 900_000), False, 2_038_272, 24, 1_089_024),
    ((33_177, 1920, 900_000, 900_000), True, 2_357_760, 30, 1_089_024),
]


@pytest.mark.parametrize(("settings", "checkpointing", "gathered", "calls", "alive"), SEEN)
def test_zero3_gathers_what_deepspeed_was_seen_to_gather(tmp_path, settings, checkpointing, gathered, calls, alive):
    names = ("prefetch_bucket_size", "param_persistence_threshold", "max_reuse_distance", "max_live_parameters")
    given = {f"stage3_{name}": value for name, value in zip(names, settings, strict=True)}
    run = training(tmp_path, gradient_checkpointing=checkpointing, **zero(3, **given))
    model, _ = adapted(run)
    found = shards(run, model)
    assert found.gathers.total == 4 * gathered
    assert found.gathers.calls == calls
    arriving = found.gathers.peak - 4 * alive  # a parameter is there twice while it arrives; the largest is the embedding
    assert 4 * 192_000 <= arriving <= 4 * 2 * 192_000
    assert (found.trained, found.frozen, found.buckets) == (TRAINED, 4 * BASE, 4 * 1000)
    assert found.persistent_frozen + found.persistent_trained == 4 * 18_336  # as DeepSpeed's ds_persist has it


@pytest.mark.slow
def test_ranks_are_those_that_run_else_one_for_each_gpu(tmp_path, monkeypatch):
    run = run_on(tmp_path, CONFIGS["llama"])
    gpu = ("large", 2**40)
    assert make_plan(run, []).ranks == 1
    assert make_plan(run, [gpu, gpu]).ranks == 2
    assert make_plan(run, [gpu, gpu], ranks=3).ranks == 3
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    assert make_plan(run, [gpu]).ranks == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3-offload"])
def test_the_example_files(tmp_path, name, capsys):
    plan = memory(tmp_path, 2, deepspeed=str(EXAMPLES / f"{name}.json"))[1]
    show_plan(plan, console())
    assert f"2 ranks, ZeRO-{name[4]}" in capsys.readouterr().out
    assert plan.as_dict()["ranks"] == 2
    assert plan.as_dict()["sharing"] == plan.sharing


@pytest.mark.slow
def test_zero3_is_advised_where_it_fits(tmp_path):
    settings = json.loads((EXAMPLES / "zero3.json").read_text())
    assert settings["zero_optimization"] == ZERO3_SETTINGS
    wide = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 12}
    base = LlamaConfig(**{**SIZES, **wide, "num_attention_heads": 32})
    keys = {"bf16": True, "gradient_checkpointing": True, "qtha": {"rank": 4, "mpo": "none", "target_modules": ["q_proj"]}}
    run = run_on(tmp_path, base, **keys)
    needed = make_plan(run, [], ranks=8).needed
    gpus = [("tight", needed - 2**29)] * 8
    assert any("zero3.json" in text for text in make_plan(run, gpus).advice)
    followed = run_on(tmp_path, base, **keys, deepspeed=str(EXAMPLES / "zero3.json"))
    assert make_plan(followed, gpus).fits
    assert not any("zero3.json" in text for text in make_plan(run, gpus[:1]).advice)
