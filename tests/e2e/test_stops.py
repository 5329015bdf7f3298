"""A training that is stopped, started twice or started again when it has ended: what is in `output_dir` is what it says."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from types import SimpleNamespace

import pytest

from axolotl_qtha.files.lock import Lock
from axolotl_qtha.training import manifest, owner
from axolotl_qtha.training.checkpoints import fault, of_run
from axolotl_qtha.training.ending import Stop

from .commands import run, train_here, write_config
from .signalling import PLUGIN, Stumbled

pytestmark = pytest.mark.e2e
ADAPTER = "adapter_model.safetensors"


def config_in(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"max_steps": 4, "save_steps": 2, "micro_batch_size": 1, "warmup_steps": 0}
    settings |= {"auto_resume_from_checkpoints": True, "test_datasets": None, "eval_steps": None, "val_set_size": 0}
    settings |= {"plugins": ["axolotl_qtha.QTHAPlugin", PLUGIN], "dataset_prepared_path": str(folder.parent / "prepared")}
    return write_config(folder, **{**settings, **changes})


def files(out):
    """Return the hash of each file of a finished adapter."""
    found = [path for path in out.iterdir() if path.is_file() and path.name not in ("debug.log", owner.LOCK)]
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stops")


@pytest.fixture(scope="module")
def finished(folder):
    """Four steps, uninterrupted; a run that another test may change gets a copy."""
    train_here(config_in(folder / "finished"))
    return folder / "finished" / "out"


@pytest.fixture
def begun(finished, tmp_path):
    """Return what writes a YAML whose output_dir holds that run."""

    def begin(**changes):
        config = config_in(tmp_path / "again", dataset_prepared_path=str(finished.parents[1] / "prepared"), **changes)
        shutil.copytree(finished, tmp_path / "again" / "out")
        return config, tmp_path / "again" / "out"

    return begin


def test_the_end_is_an_end(begun):
    config, out = begun()
    before = files(out)
    _, _, trainer = train_here(config)
    assert trainer.state.global_step == 4
    assert [path.name for path in of_run(out)] == ["checkpoint-2", "checkpoint-4"]
    assert files(out) == before
    (out / ADAPTER).unlink()  # killed between the last checkpoint and the final save
    train_here(config)
    assert files(out) == before


def test_more_steps_are_trained(begun):
    config, out = begun(max_steps=5, save_steps=1)
    train_here(config)
    assert [path.name for path in of_run(out)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_with_a_checkpoint_and_its_exit_code(name, code, folder, finished, begun, monkeypatch, capfd):
    config, out = begun(save_steps=10)
    for path in of_run(out):
        shutil.rmtree(path)
    before, handlers = files(out), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setenv("QTHA_AT", f"3:{name}")
    with pytest.raises(SystemExit) as ended:
        train_here(config)
    assert ended.value.code == code
    assert files(out) == before  # the finished adapter of an earlier run
    assert [path.name for path in of_run(out)] == ["checkpoint-3"]
    assert fault(out / "checkpoint-3", whole=True) is None
    told = capfd.readouterr().err
    assert f"{name}: stops after this step, with a checkpoint." in told
    assert f"step 3 has a checkpoint, from which the run can go on. Exit code {code}." in told
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    owner.give_up(str(out))

    monkeypatch.delenv("QTHA_AT")
    train_here(config)
    assert (out / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()


def test_a_second_signal_ends_at_once(folder, monkeypatch, capfd):
    config = config_in(folder / "twice")
    monkeypatch.setenv("QTHA_AT", "3:SIGINT,3:SIGINT")
    with pytest.raises(SystemExit) as ended:
        train_here(config)
    assert ended.value.code == 130
    assert [path.name for path in of_run(folder / "twice" / "out")] == ["checkpoint-2"]
    assert not (folder / "twice" / "out" / ADAPTER).exists()
    assert "stopped at once" in capfd.readouterr().err
    owner.give_up(str(folder / "twice" / "out"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_process_that_loads_data_is_ended_by_its_parent_alone(number, code, capfd):
    """A terminal sends Ctrl-C to it as well; it inherits what its parent does at a signal."""
    with Stop(SimpleNamespace(is_world_process_zero=lambda: True)).listening():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert capfd.readouterr().err == ""


def test_ctrl_c_of_the_command(folder):
    """As a user presses it: the process of `axolotl train`, with another's adapter trained before."""
    config = config_in(folder / "command", max_steps=400, save_steps=400)
    command = ["axolotl", "train", str(config), "--launcher", "python"]
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    log = folder / "command.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=os.getcwd(), stdout=output, stderr=output, env={**os.environ, "PATH": path, "PYTHONPATH": os.getcwd()}
        )
        while "'loss'" not in log.read_text() and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 130, log.read_text()[-3000:]
    (checkpoint,) = of_run(folder / "command" / "out")
    assert fault(checkpoint, whole=True) is None
    assert not (folder / "command" / "out" / ADAPTER).exists()
    assert not (folder / "command" / "out" / owner.LOCK).exists()


def test_a_killed_run_leaves_the_finished_adapter_as_it_was(begun, monkeypatch):
    config, out = begun(qtha={"rank": 6}, auto_resume_from_checkpoints=False)
    before = files(out)
    monkeypatch.setenv("QTHA_AT", "2:raise")
    with pytest.raises(Stumbled):
        train_here(config)
    assert files(out) == before
    monkeypatch.delenv("QTHA_AT")
    train_here(config)
    assert json.loads((out / "adapter_config.json").read_text())["rank"] == 6
    assert files(out).keys() == before.keys()
    assert not (out / owner.LOCK).exists()


def _hold(path, ready):
    Lock(path, "a training")
    ready.set()
    time.sleep(600)


def test_a_second_start_says_who_was_first(begun, caplog):
    config, out = begun(max_steps=5)
    before, context = files(out), multiprocessing.get_context("fork")
    ready = context.Event()
    first = context.Process(target=_hold, args=(out / owner.LOCK, ready))
    first.start()
    assert ready.wait(30)
    with pytest.raises(
        ValueError, match=rf"output_dir: .* is in use by process {first.pid} on .* since .*, for a training. What works"
    ):
        train_here(config)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert files(out) == before
    train_here(config)
    assert [path.name for path in of_run(out)][-1] == "checkpoint-5"
    assert not (out / owner.LOCK).exists()


def test_a_run_goes_on_with_other_settings_and_says_so(begun):
    config, out = begun(max_steps=6, max_grad_norm=0.5)
    result = run(["axolotl", "train", str(config), "--launcher", "python"], config.parent, PYTHONPATH=os.getcwd())
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(
        r"goes on from .*checkpoint-4 with other settings: max_steps 4 -> 6, max_grad_norm 1.0 -> 0.5", result.stdout
    )
    assert manifest.read(out / "checkpoint-6").settings["max_grad_norm"] == 0.5
