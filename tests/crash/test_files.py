"""The journal of IBM Quantum and an export's folder, killed or out of disk at every place where files change."""

import json
import shutil
from contextlib import suppress

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from axolotl_qtha.export.output_folder import folder_for
from axolotl_qtha.export.report import JSON
from axolotl_qtha.ibm.journal import Journal
from axolotl_qtha.ibm.runner import Runner

from ..ibm.boundary import ANSATZ, PAID, Cloud, StandIn, hurry, points
from .interposer import Interposer

pytestmark = pytest.mark.filterwarnings("ignore:.*no QubitProperties")


def runner_in(folder, cloud):
    """Return what a new process has: IBM is the same, the journal is read again."""
    return Runner(ANSATZ, PAID, StandIn(PAID, cloud), Journal(folder))


def two_steps(runner):
    return [runner.expectations(points(runner, seed=seed))[0] for seed in (0, 1)]


def first_process(interposer, folder, cloud):
    """Take two steps, interrupted."""
    runners = []

    def work():
        runners.append(runner_in(folder, cloud))
        two_steps(runners[0])

    interposer.interrupt(work)
    if runners and not interposer.dead:
        runners[0].journal.close()


@pytest.mark.parametrize("how", ["before", "half", "full"])
def test_no_job_is_paid_twice(how, tmp_path, monkeypatch, crash_count):
    hurry(monkeypatch)
    watch = Interposer(tmp_path)
    with watch.watching():
        runner = runner_in(tmp_path / "all", Cloud())
        two_steps(runner)
    runner.journal.close()
    for at, place in enumerate(watch.places):
        folder, cloud = tmp_path / str(at), Cloud()
        first_process(Interposer(folder, at, how), folder, cloud)
        submitted = [job.tag for job in cloud.jobs]
        again = runner_in(folder, cloud)
        values = two_steps(again)
        again.journal.close()
        assert len(cloud.jobs) == 2, place
        assert [job.tag for job in cloud.jobs][: len(submitted)] == submitted, place
        assert again.journal.used(local=False) == 6.0, place
        answers = [job._job.result()[0].data.evs for job in cloud.jobs]
        assert all(np.array_equal(value, answer) for value, answer in zip(values, answers, strict=True)), place
        assert not list(folder.rglob("*.tmp")), place
    crash_count("journal", how, watch.places)


@pytest.mark.parametrize("how", ["before", "half", "full"])
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "over an earlier one"])
def test_an_export_is_the_old_one_or_the_new_one(earlier, how, tmp_path, crash_count):
    out = tmp_path / "exports" / "lora"

    def export(number):
        with folder_for(out) as folder:
            safetensors.torch.save_file({"weight": torch.full((64,), float(number))}, folder / "adapter_model.safetensors")
            (folder / JSON).write_text(json.dumps({"number": number}))

    def begin():
        shutil.rmtree(out.parent, ignore_errors=True)
        if earlier:
            export(1)

    begin()
    watch = Interposer(tmp_path)
    with watch.watching():
        export(2)
    outcomes = set()
    for at, place in enumerate(watch.places):
        begin()
        Interposer(tmp_path, at, how).interrupt(lambda: export(2))
        if out.exists():  # whoever looks sees a whole one
            found = json.loads((out / JSON).read_text())["number"]
            assert set(load_file(out / "adapter_model.safetensors")["weight"].tolist()) == {float(found)}, place
            outcomes.add(found)
        with suppress(KeyboardInterrupt), folder_for(out):  # the next start
            seen = json.loads((out / JSON).read_text())["number"] if out.exists() else None
            raise KeyboardInterrupt
        assert seen in ((1, 2) if earlier else (None, 2)), place  # the earlier one is back, if it was moved away
        assert not [path.name for path in out.parent.iterdir() if path.name.startswith(".")], place
    assert outcomes == ({1, 2} if earlier else {2})
    crash_count("export", how, watch.places)
