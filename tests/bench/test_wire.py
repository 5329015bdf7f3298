"""What ranks exchange is counted exactly, and the command's figures hold together."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from axolotl_qtha.bench import wire
from axolotl_qtha.tuner.sizes import count_lora_parameters
from tests.e2e.ranks import ZERO

from .test_step import LAYERS, SIZES

TINY = LlamaConfig(**SIZES)
BUFFERS = 2 * 4 * 32  # DDP sends rank 0's buffers: two tables of rotary frequencies, half of a head of 64
QTHA = "qtha, quantum: qtha"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def known_program(rank, folder):
    """Collectives of known sizes, by Python, by DDP's reducer in C++ and by DTensor."""
    with wire.joined(rank, 2, folder) as device:
        model = nn.parallel.DistributedDataParallel(nn.Linear(10, 3))
        for _ in range(2):  # after the first backward DDP arranges its buckets anew, and tells the other ranks
            model(torch.ones(1, 10)).sum().backward()
        sharded = distribute_tensor(torch.ones(6), init_device_mesh(device.type, (2,)), [Shard(0)])
        with profile(activities=[ProfilerActivity.CPU]) as profiled, wire.Collectives(2) as seen:
            seen.phase = "python"
            dist.all_reduce(torch.ones(7, 3))
            dist.all_reduce(torch.ones(5, dtype=torch.float64), async_op=True).wait()
            dist.all_reduce(torch.ones(2, dtype=torch.int32))
            dist.all_gather_into_tensor(torch.empty(20), torch.ones(10))
            dist.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4))
            dist.reduce_scatter_tensor(torch.empty(5), torch.ones(10))
            dist.broadcast(torch.ones(6), 0)
            dist.reduce(torch.ones(8), 0)
            dist.barrier()
            seen.phase = "ddp, not exchanged"
            with model.no_sync():
                model(torch.ones(1, 10)).sum().backward()
            seen.phase = "ddp"
            model(torch.ones(1, 10)).sum().backward()
            seen.phase = "dtensor"
            assert sharded.sum().full_tensor() == 6
        backend = sum(event.name.startswith("gloo:") for event in profiled.events())
        with wire.Collectives(2), pytest.raises(NotImplementedError, match="'alltoall_base_' is not known"):
            dist.all_to_all_single(torch.empty(4), torch.ones(4))
        result = {"backend": backend, "counts": [[*key, *count] for key, count in seen.counts.items()]}
        Path(folder, f"{rank}.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_counts_of_a_known_program_are_exact():
    for result in wire.start(known_program, 2):
        counts = {tuple(count[:3]): count[3:] for count in result["counts"]}
        assert sum(calls for calls, *_ in counts.values()) == result["backend"]  # as many as reach gloo
        assert counts.pop(("ddp", "all_reduce", "float32")) == [1, 33 * 4, 33 * 4]
        assert counts.pop(("dtensor", "all_reduce", "float32")) == [1, 4, 4]
        assert counts == {
            ("python", "all_reduce", "float32"): [1, 84, 84],
            ("python", "all_reduce", "float64"): [1, 40, 40],
            ("python", "all_reduce", "int32"): [1, 8, 8],
            ("python", "all_gather", "float32"): [2, 40 + 16, 40 + 16],
            ("python", "reduce_scatter", "float32"): [1, 40, 20],
            ("python", "broadcast", "float32"): [1, 24, 24],
            ("python", "reduce", "float32"): [1, 32, 32],
            ("python", "barrier", ""): [1, 0, 0],
        }


@pytest.mark.parametrize(
    ("collective", "sent"), [("all_reduce", 150), ("all_gather", 300), ("reduce_scatter", 75), ("broadcast", 100)]
)
def test_ring_of_four(collective, sent):
    assert wire.ring_bytes(collective, 100, 4) == sent


def test_deepspeed_settings_are_those_of_the_examples():
    for stage in (1, 2, 3):
        example = json.loads((ZERO / f"zero{stage}.json").read_text())["zero_optimization"]
        ours = wire.deepspeed_settings(stage, 256, 2)["zero_optimization"]
        assert ours.keys() == example.keys()
        assert all(value in ("auto", ours[key]) for key, value in example.items())


@pytest.mark.slow
def test_ddp_exchanges_gradients_once_a_step():
    for adapter, accumulation in (("lora", 1), ("lora", 3), (QTHA, 3)):
        row = wire.measure(wire.Job("ddp", adapter, TINY, accumulation=accumulation))
        assert row["gradient_bytes"] == 4 * row["parameters"]
        assert row["bytes"] == row["ring_bytes"] == row["gradient_bytes"] + BUFFERS


@pytest.mark.slow
def test_zero_exchanges_gradients_and_gathers_what_it_updated():
    # ZeRO-1 waits for the last micro-batch, ZeRO-2 keeps no whole gradients and sums up every micro-batch's
    for sharing, times in (("zero1", 1), ("zero2", 2)):
        rows = [wire.measure(wire.Job(sharing, adapter, TINY)) for adapter in ("lora", QTHA)]
        for row in rows:
            assert row["gradient_bytes"] == times * 4 * row["parameters"]
            assert row["bytes"] == row["gradient_bytes"] + 2 * row["parameters"] + 4  # half of the updated ones; the norm
        assert rows[1]["collectives"] == rows[0]["collectives"]
        assert rows[1]["bytes"] <= 0.24 * rows[0]["bytes"]


@pytest.mark.slow
def test_command(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(wire.SHAPES, "small", TINY)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["wire", "--only", "ddp", "zero3", "fsdp2", "--tokens", "8", "--json", str(out)])
    wire.main()
    rows = {(row["sharing"], row["adapter"]): row for row in json.loads(out.read_text())}
    assert list(rows) == [
        *[("ddp", adapter) for adapter in ("lora", QTHA)],
        *[("zero3", adapter) for adapter in ("none", "lora", QTHA)],
        *[("fsdp2", adapter) for adapter in ("none", "lora", "lora, by block", QTHA)],
    ]
    for (sharing, adapter), row in rows.items():
        for key in ("collectives", "bytes", "ring_bytes"):
            assert row[key] == sum(part[key] for part in row["detail"])
        assert row["to_lora"] == row["bytes"] / rows[sharing, "lora"]["bytes"]
        assert 0 < row["gradient_bytes"] < row["bytes"]
        assert (row["ranks"], row["accumulation"], row["device"]) == (2, 2, "cpu")
        if adapter.startswith("lora"):
            assert (row["parameters"], row["tensors"]) == (count_lora_parameters(8, LAYERS), 28)
            assert row["to_lora_without_base"] == 1
    assert rows["ddp", QTHA]["to_lora"] == rows["ddp", QTHA]["to_lora_without_base"] < 0.25
    check_zero3(rows)
    check_fsdp2(rows)
    printed = capfd.readouterr().out
    assert "no base x LoRA" in printed
    assert "the frozen weights" in printed


def check_zero3(rows):
    base, lora, qtha = (rows["zero3", adapter] for adapter in ("none", "lora", QTHA))
    assert base["bytes"] < qtha["bytes"] < lora["bytes"]
    assert lora["gradient_bytes"] == 2 * 4 * lora["parameters"]  # in each of the two micro-batches
    # each tensor is filled up to an even number of entries
    assert 0 <= qtha["gradient_bytes"] - 2 * 4 * qtha["parameters"] <= 2 * 4 * qtha["tensors"]
    assert qtha["collectives"] <= lora["collectives"]
    for row in (base, lora, qtha):  # nothing that each rank keeps whole, which would be gathered one by one after a step
        assert not any(part["collective"] == "all_gather" for part in row["detail"] if part["phase"] == "step")


def check_fsdp2(rows):
    base, lora, blocks, qtha = (rows["fsdp2", adapter] for adapter in ("none", "lora", "lora, by block", QTHA))
    assert base["bytes"] < qtha["bytes"] < lora["bytes"] == blocks["bytes"]
    assert lora["gradient_bytes"] == 4 * lora["parameters"]  # once, whatever the accumulation
    assert 0 <= qtha["gradient_bytes"] - 4 * qtha["parameters"] <= 4 * qtha["tensors"]  # each one filled up to an even number
    assert qtha["to_lora_without_base"] < 0.25
    assert qtha["collectives"] == blocks["collectives"]
    # Axolotl's wrapping: each A and B is gathered twice in both micro-batches, and summed up once instead of with its block
    assert lora["collectives"] - blocks["collectives"] == 28 * (2 * 2 + 1) - 2


def test_one_rank_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wire", "--ranks", "1"])
    with pytest.raises(SystemExit):
        wire.main()
    assert "What works: --ranks 2" in capsys.readouterr().err
