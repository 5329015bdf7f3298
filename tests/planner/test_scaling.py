"""The prediction against a ring that is simulated step by step, torch's own count of FLOPs, and bytes counted by hand."""

import json

import pytest
import torch
from axolotl.cli.main import cli
from click.testing import CliRunner
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MixtralConfig

from axolotl_qtha.planner.estimate import adapted, make_plan
from axolotl_qtha.planner.scaling import Network, communication, lora_model, measure_tflops, predict, rank_counts, step_flops
from axolotl_qtha.planner.sharding import shards

from .bases import CONFIGS, SIZES, run_on, write_run

NET = Network(bandwidth=10.0, network=4.0, latency=0.5, gpus_per_node=4)
PLAIN = {"rank": 4, "mpo": "none", "quantum": "none"}


def ring_all_reduce(values, seconds_per_entry, latency):
    """Sum a row of every rank around a ring, chunk by chunk; return the sums and the time. A step's messages go at once."""
    ranks = len(values)
    chunks = [list(row.chunk(ranks)) for row in values]
    time = 0.0
    for step in range(2 * (ranks - 1)):
        adding = step < ranks - 1  # then the sums go around
        sent = {}
        for rank in range(ranks):
            index = (rank - step + (0 if adding else ranks)) % ranks
            sent[(rank + 1) % ranks] = (index, chunks[rank][index].clone())
        for rank, (index, chunk) in sent.items():
            chunks[rank][index] = chunks[rank][index] + chunk if adding else chunk
        time += latency + max(len(chunk) for _, chunk in sent.values()) * seconds_per_entry
    return torch.stack([torch.cat(row) for row in chunks]), time


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_all_reduce_takes_the_steps_of_a_ring(ranks):
    values = torch.arange(24 * ranks, dtype=torch.float64).reshape(ranks, 24)
    speed = NET.bandwidth if ranks <= 4 else NET.network
    sums, seconds = ring_all_reduce(values, 8 / speed, NET.latency)
    assert torch.equal(sums, values.sum(0).expand(ranks, -1))
    assert NET.all_reduce(8 * 24, ranks) == pytest.approx(seconds)
    assert NET.gather(8 * 24, ranks) == pytest.approx(seconds / 2)  # either half of it
    assert NET.gather(8 * 24, ranks, calls=3) == pytest.approx(seconds / 2 + 2 * (ranks - 1) * NET.latency)


def test_a_fast_network_is_no_faster_than_the_gpus_links():
    assert Network(10, 400, 0, 4).gather(80, 8) == Network(10, 10, 0, 4).gather(80, 8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_torch_counts(tmp_path, checkpointing):
    run = run_on(tmp_path, CONFIGS["llama"], qtha=PLAIN, load_in_4bit=True)
    found = step_flops(adapted(run)[0], 128, checkpointing)
    base = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="eager")
    model = get_peft_model(base, run.adapter).train()
    base.enable_input_require_grads()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(2, 128, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    passes = 1 + checkpointing
    attention = 3 * 2 * 128 * 192 * 2 * (2 + passes)  # eager: the whole square, and twice in backward
    squares = 21 * 2 * 4 * 4 * (2 + passes)  # W_C
    counted = counter.get_total_flops() / 256 - attention - squares
    assert found.linear + found.adapter == pytest.approx(counted, rel=1e-3)  # the fusion's product with B is counted too
    assert found.attention == 3 * 2 * 128 * 192 * (2.5 + passes)
    assert found.circuit == 0


def test_flops_of_circuits_and_experts(tmp_path):
    model, _ = adapted(run_on(tmp_path, CONFIGS["llama"]))
    gates = 24 + 16  # RY and CRZ of two layers on four qubits
    assert step_flops(model, 128, False).circuit == 21 * gates * 6 * 2**4 * (1 + 3)
    model, _ = adapted(run_on(tmp_path, MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), qtha=PLAIN))
    attention = 2 * 192 * 192 + 2 * 192 * 64
    experts = 2 * 3 * 192 * 448  # two of four
    # the router, 4 x 192, is no linear layer and is left out
    assert step_flops(model, 128, False).linear == 4 * (3 * (attention + experts) + 192 * 1000)


def test_flops_without_attention(tmp_path):
    """As of a state-space model, which is planned too."""
    base = MambaConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, state_size=8)
    run = run_on(tmp_path, base, qtha={"rank": 4, "param_budget": 0.9, "target_modules": ["in_proj"]})
    found = step_flops(adapted(run)[0], 128, False)
    assert found.attention == 0
    assert found.circuit == 2 * (24 + 16) * 6 * 2**4 * (1 + 3)
    assert make_plan(run, []).circuits_share == found.circuit / found.total > 0


@pytest.mark.slow
def test_bytes_of_each_way_of_sharing(tmp_path):
    """Bandwidth 1 byte/s and no latency: seconds are bytes, times the ring's share."""
    net = Network(1.0, 1.0, 0.0)
    trained, base = 16992, 1454400
    zero = {"reduce_bucket_size": 10_000, "stage3_param_persistence_threshold": 0}

    def moved(micro_batches, **changes):
        run = run_on(tmp_path, CONFIGS["llama"], bf16=True, qtha={"rank": 4, "param_budget": 0.5, "mpo": "tt"}, **changes)
        model, _ = adapted(run)
        return communication(shards(run, model), net, 4, micro_batches)

    def deepspeed(stage):
        return {"deepspeed": {"zero_optimization": {"stage": stage, **zero}}}

    ring = 3 / 4
    assert moved(5) == pytest.approx(2 * ring * 4 * trained)
    assert moved(5, **deepspeed(1)) == pytest.approx(ring * 2 * trained * (2 + 1))
    assert moved(5, **deepspeed(2)) == pytest.approx(ring * 2 * trained * (2 * 5 + 1))
    fsdp = {"fsdp_version": 2, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
    assert moved(5, **fsdp) == pytest.approx(ring * 2 * ((base + trained) * 2 * 5 + trained))
    three = moved(5, **deepspeed(3)) - ring * 2 * trained * 5
    assert ring * 2 * (base + trained) * 5 <= three <= ring * 2 * (base + trained) * 2 * 5  # near the turn some are still there
    four = moved(5, load_in_4bit=True, **fsdp)
    assert four == pytest.approx(ring * ((2 * (base - 3 * 356_352) + 3 * 356_352 // 2 + 2 * trained) * 2 * 5 + 2 * trained))


def test_latency_counts_each_call(tmp_path):
    net = Network(1e30, 1e30, 1.0, 8)
    run = run_on(tmp_path, CONFIGS["llama"])
    model, _ = adapted(run)
    assert communication(shards(run, model), net, 4, 1) == pytest.approx(2 * 3)  # one bucket
    assert communication(shards(run, model), net, 1, 1) == 0


@pytest.mark.slow
def test_rows(tmp_path):
    run = run_on(tmp_path, CONFIGS["llama"], qtha={"rank": 4, "param_budget": 0.5, "mpo": "tt"})
    table = predict(run, 8, Network(), tflops=1.0)
    assert (table.global_batch, table.tokens) == (4 * 2 * 8, 64 * 128)
    assert [(row.ranks, row.micro_batches) for row in table.rows] == [(1, 16), (2, 8), (4, 4), (8, 2)]
    for row in table.rows:
        assert row.compute == pytest.approx(table.tokens * table.flops.total / row.ranks / 1e12)
        assert row.exposed == row.compute + row.communication
        assert row.hidden == max(row.compute, row.communication)
        assert row.speedup == pytest.approx(table.rows[0].exposed / row.exposed)
        assert row.efficiency == pytest.approx(row.speedup / row.ranks)
        assert row.gpu_bytes == make_plan(run, [], ranks=row.ranks).needed
    assert table.rows[0].communication == table.rows[0].lora_communication == 0
    # a bucket each: twice the ring's steps, and four bytes an entry over the ring
    assert table.rows[3].communication == pytest.approx(14 * (10e-6 + 4 * 16992 / 8 / 300e9))
    lora = 3 * 4 * (2 * 384 + 2 * 256 + 3 * 640)
    assert table.rows[3].lora_communication == pytest.approx(14 * (10e-6 + 4 * lora / 8 / 300e9))
    dpo = [{"path": "data.jsonl", "type": "chatml.intel"}]
    assert predict(run_on(tmp_path, CONFIGS["llama"], rl="dpo", datasets=dpo), 2, Network(), 1.0).tokens == 2 * 16 * 128


@pytest.mark.slow
def test_lora_is_that_of_the_same_rank(tmp_path):
    run = run_on(tmp_path, CONFIGS["llama"])
    model, _ = adapted(run)
    lora = lora_model(run, model.active_peft_config)
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == make_plan(run, []).lora_parameters


@pytest.mark.slow
def test_batches_that_do_not_spread(tmp_path):
    assert list(rank_counts(1)) == [1]
    assert list(rank_counts(12)) == [1, 2, 4, 8, 12]
    run = run_on(tmp_path, CONFIGS["llama"])
    table = predict(run, 12, Network(), 1.0, global_batch=48)
    assert [row.ranks for row in table.rows] == [1, 2, 4, 12]
    assert table.left_out == [8]
    with pytest.raises(ValueError, match=r"--global-batch: 50 spreads over no number.*What works: .* such as 48"):
        predict(run, 4, Network(), 1.0, global_batch=50)


def test_a_matmul_is_measured(tmp_path):
    model, _ = adapted(run_on(tmp_path, CONFIGS["llama"]))
    rate, words = measure_tflops(model, 64, torch.bfloat16)
    assert 0 < rate < 10_000
    assert "192 x 448" in words or "448 x 192" in words
    assert torch.cuda.is_available() or "float32" in words


def run(*arguments):
    return CliRunner().invoke(cli, ["qtha-plan", *map(str, arguments)])


@pytest.mark.slow
def test_the_command(tmp_path):
    path = write_run(tmp_path, CONFIGS["llama"])
    done = run(path, "--scaling", 8, "--tflops", 400, "--latency", 0, "--network", 25, "--json", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    for words in ("PREDICTED", "as given with --tflops", "over several 25 GB/s,", "0 us a step.", "400 TFLOP/s per rank", "DDP"):
        assert words in said
    table = json.loads((tmp_path / "rows.json").read_text())
    assert [row["ranks"] for row in table["rows"]] == [1, 2, 4, 8]
    assert f"{1e3 * table['rows'][3]['exposed']:,.2f}" in said
    left = run(path, "--scaling", 8, "--global-batch", 12)
    assert left.exit_code == 0, left.output
    assert "Left out: 2, 4, 8 ranks" in " ".join(left.output.split())
    assert torch.cuda.is_available() or "this CPU (no GPU here)" in " ".join(left.output.split())


@pytest.mark.slow
def test_ranks_of_a_plan(tmp_path):
    path = write_run(tmp_path, CONFIGS["llama"], deepspeed={"zero_optimization": {"stage": 3}})
    done = run(path, "--ranks", 16)
    assert done.exit_code == 0, done.output
    assert "16 ranks, ZeRO-3: memory of one rank" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", 0], ["--ranks: 0", "1 or more"]),
        (["--scaling", 2048], ["--scaling: 2048", "1 to 1024"]),
        (["--tflops", 400], ["--tflops: 400.0 has no effect without --scaling", "`--scaling 64 --tflops 400`"]),
        (["--scaling", 4, "--tflops", 0], ["--tflops: 0.0 is not positive", "400"]),
        (["--scaling", 4, "--network", "inf"], ["--network: inf is not"]),
        (["--scaling", 4, "--latency", -1], ["--latency: -1.0 is not"]),
        (["--scaling", 4, "--gpus-per-node", 0], ["--gpus-per-node: 0 is not positive", "8"]),
        (["--scaling", 4, "--ranks", 4], ["--ranks: 4 does not go with --scaling"]),
        (["--find-budget", 0.5, "--ranks", 4], ["--ranks: 4 does not go with --find-budget"]),
        (["--scaling", 4, "--tflops", 1, "--global-batch", 3], ["--global-batch: 3", "What works", "such as 4"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_options_that_make_no_sense(tmp_path, arguments, words):
    done = run(write_run(tmp_path, CONFIGS["llama"]), *arguments)
    assert done.exit_code == 1, done.output
    for word in words:
        assert word in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_an_eighth_of_seventy_billion_parameters(tmp_path):
    shape = {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 10}
    config = LlamaConfig(**shape, num_attention_heads=64, num_key_value_heads=8)
    settings = {"bf16": True, "micro_batch_size": 1, "gradient_checkpointing": True, "sequence_len": 512}
    run = run_on(tmp_path, config, **settings, deepspeed={"zero_optimization": {"stage": 3}})
    model, _ = adapted(run)
    vocabulary, block = 128256 * 8192, 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert step_flops(model, 512, True).linear == 6 * 10 * block + 4 * vocabulary
    assert shards(run, model).frozen == pytest.approx(2 * (10 * block + 2 * vocabulary), rel=1e-4)
