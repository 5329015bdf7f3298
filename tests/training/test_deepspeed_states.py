"""DeepSpeed's states of a stranger's checkpoint: no code in them runs, and nothing outside the checkpoint is read or deleted."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from axolotl_qtha.training import checkpoints
from axolotl_qtha.training.deepspeed_states import refuse_unsafe

from ..e2e.commands import REPOSITORY
from .hostile import Planted, states, write_states

OPTIM = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of one rank with ZeRO-2."""
    return write_states(tmp_path / "checkpoint-2")


@pytest.fixture
def victim(tmp_path):
    """A folder that is none of the checkpoint's; in it are states, so that a conversion would begin."""
    return write_states(tmp_path / "victim" / "inside").parent


def all_of(*places):
    return sorted(str(path) for place in places for path in place.rglob("*"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_writes_passes_before_and_after_conversion(tmp_path, stage):
    folder = write_states(tmp_path / "checkpoint-2", stage)
    refuse_unsafe(folder)
    checkpoints.convert(folder)
    assert (folder / "latest_universal").read_text() == "global_step2_universal"
    assert list(folder.glob("global_step2_universal/zero/*/fp32.pt"))
    refuse_unsafe(folder)


def test_a_checkpoint_without_states_of_deepspeed_passes(tmp_path):
    refuse_unsafe(tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("which", [0, 1])
def test_planted_code_is_refused_and_not_run(tmp_path, stage, which):
    folder = write_states(tmp_path / "checkpoint-2", stage)
    name, values = list(states(stage).items())[which]
    torch.save({**values, "more": Planted(tmp_path / "made")}, folder / "global_step2" / name)
    with pytest.raises(ValueError, match="resume_from_checkpoint") as error:
        checkpoints.convert(folder)
    assert not (tmp_path / "made").exists()
    for word in (f"global_step2/{name}", "posix.mkdir", f"lora_model_dir: {folder}", "safetensors"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["zero/x/fp32.pt", "zero/optimizer_state.pt", "mp_rank_00_model_states.pt"])
def test_planted_code_in_what_was_converted_before(tmp_path, folder, name):
    """It lies there from the start: without a check nothing would look at it before DeepSpeed does."""
    path = folder / "global_step2_universal" / name
    path.parent.mkdir(parents=True)
    torch.save(Planted(tmp_path / "made"), path)
    (folder / "latest_universal").write_text("global_step2_universal")
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        refuse_unsafe(folder)
    assert not (tmp_path / "made").exists()


def test_left_overs_of_a_conversion_that_cannot_be_removed_are_not_read(tmp_path, folder, monkeypatch):
    """What lies under `tmp` would be read as further ranks' parts."""
    left = folder / "global_step2_universal" / "tmp" / "base_model.q_proj.qtha_adapter.default.flat" / "0"
    left.mkdir(parents=True)
    torch.save(Planted(tmp_path / "made"), left / "fp32.01")

    def fail(path, ignore_errors=False, **_):
        if not ignore_errors:
            raise PermissionError(path)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", fail)  # who runs as root may remove anything
    with pytest.raises(PermissionError):
        checkpoints.convert(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "latest",
    ["../victim", "../victim/inside/global_step2", "{victim}", "global_step2\n/../../victim", "", ".", "global_step2/.."],
)
def test_latest_names_a_step_of_its_own_only(folder, victim, latest):
    (folder / "latest").write_text(latest.format(victim=victim))
    (victim.parent / "victim_universal").mkdir()  # what a conversion would take for its own left-overs
    (victim.parent / "victim_universal" / "precious").touch()
    before = all_of(victim.parent)
    with pytest.raises(ValueError, match="resume_from_checkpoint") as error:
        checkpoints.convert(folder)
    assert "'latest'" in str(error.value)
    assert "lora_model_dir" in str(error.value)
    assert "\n" not in str(error.value)
    assert all_of(victim.parent) == before


def test_a_long_latest_is_not_cut_to_a_good_one(folder):
    long = "global_step" + "2" * 189
    (folder / "global_step2").rename(folder / long)
    (folder / "latest").write_text(f"{long}/../../victim")
    with pytest.raises(ValueError, match="'latest'"):
        refuse_unsafe(folder)


def test_a_line_break_at_the_end_of_latest_is_an_editors(folder):
    (folder / "latest").write_text("global_step2\n")
    refuse_unsafe(folder)


@pytest.mark.parametrize(
    "name", ["global_step2", "latest", f"global_step2/{OPTIM}", "latest_universal", "global_step2_universal"]
)
def test_links_are_refused_and_what_they_point_to_is_kept(tmp_path, folder, victim, name):
    path, elsewhere = folder / name, tmp_path / "victim" / "moved"
    if path.exists():
        path.rename(elsewhere)
    elif name == "global_step2_universal":
        elsewhere.mkdir()
        (elsewhere / "precious").touch()
    path.symlink_to(elsewhere)  # `latest_universal` to a file that is not there: a conversion would make it
    before = all_of(victim)
    with pytest.raises(ValueError, match=r"link|no folder of") as error:
        checkpoints.convert(folder)
    assert "cp -rL" in str(error.value)
    assert all_of(victim) == before


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["../../../../victim", "/{victim}", "..", "a/b"])
def test_a_parameter_whose_name_is_a_path_is_refused(tmp_path, victim, stage, name):
    """The conversion makes a folder for each parameter, by its name."""
    folder = write_states(tmp_path / "checkpoint-2", stage)
    name = name.format(victim=victim)
    for file, values in states(stage).items():
        for holder in (values, values.get("optimizer_state_dict", {})):
            for key in ("param_shapes", "param_slice_mappings"):
                if key in holder:
                    holder[key] = [{name: value} for value in holder[key][0].values()]
        torch.save(values, folder / "global_step2" / file)
    before = all_of(tmp_path)
    with pytest.raises(ValueError, match="names a parameter"):
        checkpoints.convert(folder)
    assert all_of(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02}q\x00."])
def test_files_that_are_none_of_torchs(folder, content):
    (folder / "global_step2" / OPTIM).write_bytes(content)
    with pytest.raises(ValueError, match=OPTIM):
        refuse_unsafe(folder)


REAL = """
import sys
import torch, deepspeed
backend = sys.modules["deepspeed.comm.torch"].TorchBackend  # it asks for another one by name
start = backend.init_process_group
backend.init_process_group = lambda self, _, *args, **kwargs: start(self, "gloo", *args, **kwargs)
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
for stage in (1, 2, 3):
    for bf16 in (False, True):
        for offload in (False, True):
            zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
            config = {"train_batch_size": 1, "zero_optimization": zero, "bf16": {"enabled": bf16}}
            config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
            model = torch.nn.Linear(8, 8)
            engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
            engine.backward(engine(torch.randn(1, 8, dtype=torch.bfloat16 if bf16 else torch.float32)).float().sum())
            engine.step()
            engine.save_checkpoint(f"{sys.argv[1]}/{stage}-{bf16}-{offload}")
            engine.destroy()
"""


@pytest.mark.e2e
def test_real_states_of_every_stage_and_precision_pass(tmp_path):
    """Of DeepSpeed itself, in 32 and 16 bits, offloaded or not, and as they were converted."""
    script = tmp_path / "real.py"
    script.write_text(REAL)
    env = {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env |= {"MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], cwd=REPOSITORY, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folders = [path.parent for path in tmp_path.glob("*/latest")]
    assert len(folders) == 12
    for folder in folders:
        refuse_unsafe(folder)
        checkpoints.convert(folder)
        refuse_unsafe(folder)
