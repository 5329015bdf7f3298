"""`axolotl train` on two CPU ranks: DDP, DeepSpeed ZeRO-1, 2, 3 and FSDP2 do what one process does, and save whole adapters."""

import json

import pytest
import torch
from safetensors.torch import load_file

from axolotl_qtha.training.checkpoints import fault
from axolotl_qtha.training.unpickling import refuse_unsafe

from .commands import train_here
from .ranks import assert_follows, config_for, history, logits_in_memory, logits_of, output, train

pytestmark = pytest.mark.e2e

SHARED = ["ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2"]
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def single(folder):
    """The same training on one process, which accumulates over two micro batches."""
    config = config_for(folder / "single", None)
    train_here(config)
    return output(config)


@pytest.fixture(scope="module")
def alone(folder, single):
    """The training on one process in the form that it has with each way to share it: with FSDP2 layers share nothing."""
    done = {}

    def get(strategy):
        if strategy != "fsdp2":
            return single
        if not done:
            config = config_for(folder / "single-tt", None, qtha={"mpo": "tt"})
            train_here(config)
            done["tt"] = output(config)
        return done["tt"]

    return get


@pytest.fixture(scope="module")
def shared(folder, servers):
    """Output folders of runs on two ranks, each of which runs once."""
    done = {}

    def get(strategy):
        if strategy not in done:
            config = config_for(folder / strategy, strategy)
            if strategy in ("ddp", "zero3", "fsdp2"):  # the kinds as users start them, the others in less time
                result = train(config, strategy)
                assert result.returncode == 0, result.stdout[-6000:]
            else:
                servers.train(config, strategy)
            done[strategy] = output(config)
        return done[strategy]

    return get


@pytest.mark.parametrize("strategy", SHARED)
def test_losses_and_gradient_norms_follow_one_process(strategy, shared, alone):
    assert_follows(history(shared(strategy)), history(alone(strategy)))


@pytest.mark.parametrize("strategy", SHARED)
def test_every_rank_started_from_the_same_adapter(strategy, shared):
    first, second = ((shared(strategy) / f"rank-{rank}.json").read_text() for rank in (0, 1))
    assert first == second
    assert json.loads(first)["tensors"] > 0


@pytest.mark.parametrize("strategy", SHARED)
def test_the_card_tells_of_one_process_training_the_same(strategy, shared, alone):
    rows = [
        {line for line in (folder / "README.md").read_text().splitlines() if line.startswith("|") and "loss" not in line}
        for folder in (shared(strategy), alone(strategy))
    ]
    assert rows[0] == rows[1]  # sequences per step, parameters and steps among them
    assert any(row.startswith("| sequences per step |") for row in rows[0])


@pytest.mark.parametrize("strategy", SHARED)
def test_the_saved_adapter_is_whole_and_gives_the_logits_of_the_model_in_memory(strategy, shared, alone):
    out = shared(strategy)
    saved, reference = load_file(out / ADAPTER), load_file(alone(strategy) / ADAPTER)
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: tensor.shape for name, tensor in reference.items()}
    in_memory = logits_in_memory(out)
    assert len(in_memory) == 2
    for logits in in_memory:  # the same numbers in the same order: no difference at all
        assert torch.equal(logits, logits_of(out))


@pytest.mark.parametrize("strategy", SHARED)
def test_checkpoints_are_whole(strategy, shared):
    out = shared(strategy)
    assert [fault(out / f"checkpoint-{step}") for step in (3, 6)] == [None, None]
    refuse_unsafe(out / "checkpoint-6", deepspeed=strategy.startswith("zero"))  # nothing of what the host writes is refused
    last, final = load_file(out / "checkpoint-6" / ADAPTER), load_file(out / ADAPTER)
    assert all(torch.equal(last[name], tensor) for name, tensor in final.items())
    assert any(not torch.equal(load_file(out / "checkpoint-3" / ADAPTER)[name], tensor) for name, tensor in final.items())
    assert not list(out.rglob(".saving-*"))


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3", "fsdp2"])
def test_one_rank_goes_on_where_two_left_off(strategy, shared, folder, servers):
    """The optimiser's states included: without them Adam would take other steps at once."""
    checkpoint = shared(strategy) / "checkpoint-3"
    changes = {"resume_from_checkpoint": str(checkpoint), "gradient_accumulation_steps": 2}
    config = config_for(folder / f"{strategy}-resumed", strategy, **changes)
    servers.train(config, strategy, ranks=1)
    assert_follows(history(output(config)), history(shared(strategy)))
    assert torch.equal(logits_in_memory(output(config))[0], logits_of(output(config)))
    refuse_unsafe(checkpoint, deepspeed=strategy.startswith("zero"))  # what was converted passes as well


FOUR_BIT = {"load_in_4bit": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "micro_batch_size": 1}
FOUR_BIT |= {"sample_packing": True, "pad_to_sequence_len": True, "max_steps": 3, "eval_steps": None, "test_datasets": None}


# With accumulation, checkpointing and packed sequences, all at once. Packing depends on the number of ranks, so the ranks of the
# others are compared with DDP's.
def test_four_bit_base(folder, servers):
    runs = {}
    for strategy in ("ddp", "zero2", "zero3", "fsdp2"):
        config = config_for(folder / f"{strategy}-4bit", strategy, qtha={"mpo": "tt"}, **FOUR_BIT)
        servers.train(config, strategy)
        runs[strategy] = out = output(config)
        assert json.loads((out / "rank-0.json").read_text())["quantised"] == 28
        assert_follows(history(out, 3), history(runs["ddp"], 3))
        saved, reference = load_file(out / ADAPTER), load_file(runs["ddp"] / ADAPTER)
        assert {name: tensor.shape for name, tensor in saved.items()} == {
            name: tensor.shape for name, tensor in reference.items()
        }


def test_tt_svd_reads_weights_that_zero3_has_partitioned(folder, servers):
    changes = {"qtha": {"init": "tt_svd"}, "max_steps": 3}
    alone, shared = config_for(folder / "svd", None, **changes), config_for(folder / "svd-zero3", "zero3", **changes)
    train_here(alone)
    servers.train(shared, "zero3")
    assert_follows(history(output(shared), 3), history(output(alone), 3))
    assert len({path.read_text() for path in output(shared).glob("rank-*.json")}) == 1


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_the_one_layer_that_is_never_called_is_named_once(strategy, folder, servers):
    plugins = ["axolotl_qtha.QTHAPlugin", "leaves_out.LeavesOut"]
    changes = {"plugins": plugins, "max_steps": 2, "save_steps": 2, "eval_steps": None, "test_datasets": None}
    text = servers.train(config_for(folder / f"{strategy}-left-out", strategy, **changes), strategy)
    text = " ".join(text.split())  # the log breaks lines
    assert text.count("not reached by the first step") == 1
    assert "1 of 28 adapters were not reached by the first step, on model.layers.*.mlp.up_proj:" in text


def test_shots_repeat_from_run_to_run(folder, servers):
    small = {"target_modules": ["q_proj"], "rank": 2, "circuit_layers": 1, "layers_to_transform": [0], "param_budget": None}
    changes = {"qtha": {**small, "quantum_backend": "aer", "shots": 20}, "micro_batch_size": 1, "max_steps": 2, "save_steps": 2}
    runs = []
    for name in ("first", "second"):
        config = config_for(folder / name, "ddp", **changes, eval_steps=None, test_datasets=None)
        servers.train(config, "ddp")
        runs.append(history(output(config), 2))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("strategy", "kill", "goes_on_from", "leaves"),
    [
        ("ddp", "1:5:step", "checkpoint-4", False),  # rank 1, after step 5
        ("zero3", "0:4:save", "checkpoint-2", True),  # rank 0, while it saves at step 4
    ],
)
def test_a_killed_run_goes_on_from_the_last_complete_checkpoint(strategy, kill, goes_on_from, leaves, folder, single, servers):
    config = config_for(
        folder / f"{strategy}-killed", strategy, save_steps=2, auto_resume_from_checkpoints=True, dataloader_num_workers=0
    )
    out = output(config)
    killed = train(config, strategy, QTHA_KILL=kill)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stdout
    assert not (out / ADAPTER).exists()

    again = servers.train(config, strategy)
    assert f"resume from checkpoint at {out / goes_on_from}" in again
    assert (f"{out / 'incomplete-checkpoint-4'} is not complete (it was being written)" in again) == leaves
    assert not [path.name for path in out.iterdir() if path.name.startswith((".", "incomplete-"))]  # a later one is complete
    assert_follows(history(out), history(single))
    assert torch.equal(logits_in_memory(out)[0], logits_of(out))
    final, uninterrupted = load_file(out / ADAPTER), load_file(single / ADAPTER)
    assert all(torch.allclose(final[name], tensor, atol=1e-4) for name, tensor in uninterrupted.items())


def test_a_signal_to_one_rank_has_all_of_them_save_and_stop(folder, single, servers):
    config = config_for(folder / "asked", "zero2", save_steps=10, auto_resume_from_checkpoints=True)
    out = output(config)
    stopped = train(config, "zero2", QTHA_KILL="1:3:ask")
    assert stopped.returncode != 0
    assert "step 3 has a checkpoint, from which the run can go on. Exit code 143." in stopped.stdout
    assert fault(out / "checkpoint-3", whole=True) is None
    assert not (out / ADAPTER).exists()
    servers.train(config, "zero2")
    assert_follows(history(out), history(single))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.suffix == ".json"}
    again = servers.train(config, "zero2")  # the adapter is finished
    assert "is of the last step: nothing is trained" in again
    assert {name: (out / name).read_bytes() for name in before if not name.startswith("rank-")} == {
        name: text for name, text in before.items() if not name.startswith("rank-")
    }
    assert all(
        torch.equal(tensor, load_file(out / "checkpoint-6" / ADAPTER)[name]) for name, tensor in load_file(out / ADAPTER).items()
    )
