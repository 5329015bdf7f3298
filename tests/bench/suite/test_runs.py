"""`axolotl qtha-bench` itself: a suite of a few steps, one of whose rates diverges, and what cannot be run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from axolotl_qtha.bench.suite import worker
from axolotl_qtha.bench.suite.apart import apart, stoppable
from axolotl_qtha.bench.suite.worker import Job, Processes
from axolotl_qtha.cli.bench import bench

from ...e2e.commands import REPOSITORY
from .test_spec import SUITE

pytestmark = pytest.mark.e2e

TINY = yaml.safe_load((REPOSITORY / "example_configs" / "bench" / "smoke.yml").read_text())
TINY |= {"base_model": SUITE["base_model"], "adapters": ["lora", "qtha"], "ranks": [4], "seeds": [1, 2], "max_steps": 4}
TINY |= {"learning_rates": [0.01, 1e6]}


def write(folder, **changes):
    path = folder / "tiny.yml"
    path.write_text(yaml.safe_dump({**TINY, "output_dir": str(folder / "out"), **changes}))
    return path


@pytest.fixture(scope="module")
def done(forked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    result = forked(["axolotl", "qtha-bench", str(write(folder))], folder)
    assert result.returncode == 0, result.stdout[-4000:]
    return folder, result.stdout


def results_of(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "out" / "results").glob("*.json")}


def test_every_run_is_there_and_the_rate_that_diverged_was_not_chosen(done):
    folder, output = done
    found = results_of(folder)
    rates = {f"domain--{name}--lr{rate}--s1" for name in ("lora--r4", "qtha--r4-b0.24") for rate in ("0.01", "1e+06")}
    assert set(found) == rates | {f"domain--{name}--lr0.01--s2" for name in ("lora--r4", "qtha--r4-b0.24")}
    status = {name: result["train_info"]["status"] for name, result in found.items()}
    assert status["domain--lora--r4--lr1e+06--s1"] == "diverged"
    assert status["domain--qtha--r4-b0.24--lr1e+06--s1"] == "diverged"
    assert {value for name, value in status.items() if "lr0.01" in name} == {"success"}
    assert "diverged: domain--lora--r4--lr1e+06--s1" in output
    assert [path for path in (folder / "out" / "scratch").rglob("*") if path.is_file()] == []


def test_a_result_has_what_pefts_have(done):
    found = results_of(done[0])["domain--qtha--r4-b0.24--lr0.01--s2"]
    info = found["train_info"]
    assert info["num_trainable_params"] == 8448
    assert info["file_size"] > 4 * 8448
    assert info["train_time"] > 0
    assert info["cpu_memory_max"] > 2**27
    steps = [row["step"] for row in info["metrics"]]
    assert steps == [0, 1, 2, 3, 4]
    assert [row["step"] for row in info["metrics"] if "valid loss" in row] == [0, 2, 4]
    assert info["metrics"][-1]["valid loss"] < info["metrics"][0]["valid loss"]
    assert "qtha/quantum_share" in info["metrics"][1]
    assert set(info["test"]) == {"rouge1", "rouge2", "rougeL", "bleu4"}
    assert 3 < info["test loss"] < 5
    assert str(done[0]) not in json.dumps(found)
    assert found["run_info"]["train_config"]["seed"] == 2
    assert found["meta_info"]["package_info"]["torch"]
    head = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:  # the tests run from a clone
        assert found["meta_info"]["source_info"]["commit"] == head.stdout.strip()
    assert "answers" not in info


def test_the_answers_of_a_run_are_kept_with_their_scores(done):
    name = "domain--qtha--r4-b0.24--lr0.01--s2"
    info = results_of(done[0])[name]["train_info"]
    answers = [json.loads(line) for line in (done[0] / "out" / "predictions" / f"{name}.jsonl").read_text().splitlines()]
    assert len(answers) == 48
    assert all({"question", "answer", "true", "rouge1", "rouge2", "rougeL"} == set(row) for row in answers)
    assert all(row["question"].endswith("### Response:\n") and row["true"] for row in answers)
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert sum(row[kind] for row in answers) / 48 == pytest.approx(info["test"][kind])
    kept = {path.stem for path in (done[0] / "out" / "predictions").iterdir()}
    assert kept == {stem for stem, result in results_of(done[0]).items() if result["train_info"]["status"] == "success"}
    table = (done[0] / "out" / "results.csv").read_text().splitlines()
    assert len(table) == 1 + 6 * (2 + 4 + 4)  # a head; losses, scores and costs of six runs
    assert sum(f"predictions/{name}.jsonl" in line for line in table) == 10


def test_the_same_line_again_runs_nothing(done):
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "results").iterdir()}
    again = CliRunner().invoke(bench, [str(folder / "tiny.yml")])
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in (folder / "out" / "results").iterdir()} == before
    summary = (folder / "out" / "summary.md").read_text()
    assert "| qtha, r 4, 0.24 | 8,448 | 22.6% |" in summary
    assert str(folder) not in summary


def test_the_same_seed_gives_the_same_losses(forked, done, tmp_path):
    suite = write(tmp_path, adapters=["qtha"], learning_rates=[0.01], seeds=[1])
    again = forked(["axolotl", "qtha-bench", str(suite)], tmp_path)
    assert again.returncode == 0, again.stdout[-4000:]
    first, second = (results_of(folder)["domain--qtha--r4-b0.24--lr0.01--s1"]["train_info"] for folder in (done[0], tmp_path))
    losses = [[row["valid loss"] for row in info["metrics"] if "valid loss" in row] for info in (first, second)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert second["test loss"] == pytest.approx(first["test loss"], rel=1e-4)


def test_another_machine_takes_all_of_it_over(done, tmp_path):
    suite = write(tmp_path)
    added = CliRunner().invoke(bench, [str(suite), "--add", str(done[0] / "out"), "--minutes", "5"])
    assert added.exit_code == 0, added.output
    assert "6 results taken over." in added.output.replace("\n", " ")
    assert results_of(tmp_path) == results_of(done[0])
    summaries = [(folder / "out" / "summary.md").read_text().splitlines() for folder in (tmp_path, done[0])]
    assert [line for line in summaries[0] if "|" in line] == [line for line in summaries[1] if "|" in line]
    assert len(list((tmp_path / "out" / "predictions").iterdir())) == 4


@pytest.mark.slow
def test_a_training_is_stopped_at_the_limit(forked, tmp_path):
    suite = write(tmp_path, max_steps=10_000, evaluations=1, learning_rates=[0.01], seeds=[1], adapters=["lora"])
    for minutes in ("0.6", "1.2", "2.4"):  # until there is time for its start; its data are there the second time
        done = forked(["axolotl", "qtha-bench", str(suite), "--minutes", minutes, "--jobs", "1"], tmp_path)
        assert done.returncode == 0, done.stdout[-3000:]
        assert f"The limit of {minutes} minutes: 0 of 1 runs are done" in done.stdout
        if list((tmp_path / "out" / "logs").glob("*--s1.log")):
            break
    else:
        pytest.fail("no run was under way")
    assert "Traceback" not in done.stdout
    assert results_of(tmp_path) == {}
    assert not (tmp_path / "out" / "summary.md").exists()


def test_a_run_that_fails_is_told_and_the_others_go_on(forked, tmp_path):
    block = {"name": "mine", "train": {"path": str(tmp_path / "none.jsonl"), "ds_type": "json", "type": "alpaca"}}
    block["validation"] = block["train"]
    suite = write(tmp_path, tasks=[block, "domain"], adapters=["lora"], learning_rates=[0.01], seeds=[1], max_steps=2)
    done = forked(["axolotl", "qtha-bench", str(suite)], tmp_path)
    assert done.returncode == 1, done.stdout[-3000:]
    status = {name: result["train_info"]["status"] for name, result in results_of(tmp_path).items()}
    assert status == {"mine--lora--r4--lr0.01--s1": "failed", "domain--lora--r4--lr0.01--s1": "success"}
    assert "1 runs failed: see the logs in" in done.stdout
    error = results_of(tmp_path)["mine--lora--r4--lr0.01--s1"]["run_info"]["error_msg"]
    assert error
    assert str(tmp_path) not in error
    assert "| 1 of 1 failed |" in (tmp_path / "out" / "summary.md").read_text()


def test_dry_run_and_bad_suites(tmp_path):
    done = CliRunner().invoke(bench, [str(write(tmp_path)), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "6 runs of 4 steps, 2 at a time" in done.output
    assert "8,448" in done.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(bench, [str(write(tmp_path, adapters=["lora", "qhta"]))])
    assert done.exit_code == 1
    assert "'qhta' is no adapter. What works: `qtha`" in done.output
    assert "Traceback" not in done.output


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal; what a shell starts in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_a_stopped_suite_leaves_no_process(how, tmp_path, interruptible):
    suite = write(tmp_path, max_steps=10_000, evaluations=1, learning_rates=[0.01])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed, children = tmp_path / "printed", []
    with printed.open("w") as out:  # a pipe would stay open as long as a child that was left
        process = subprocess.Popen(
            ["axolotl", "qtha-bench", str(suite)],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        # two runs, not the data made or tokenised before them
        until(lambda: len(list((tmp_path / "out" / "logs").glob("*--s*.log"))) == 2 or process.poll() is not None, 240)
        time.sleep(1)
        children = _children(process.pid)
        assert len(children) == 2
        process.send_signal(how)
        process.wait(timeout=60)
        until(lambda: not any(map(_runs, children)), 20)
        left = [pid for pid in children if _runs(pid)]
    finally:
        process.kill()
        for pid in filter(_runs, children):
            os.kill(pid, signal.SIGKILL)
    assert not left
    assert not list((tmp_path / "out").glob("results/*.json"))
    output = printed.read_text()
    assert "Traceback" not in output
    if how == signal.SIGINT:
        assert process.returncode == 1
        assert "Stopped; the runs under way are lost. The same line goes on with the others." in output


def until(true, seconds):
    start = time.monotonic()
    while not true() and time.monotonic() - start < seconds:
        time.sleep(0.2)


def test_data_that_are_made_as_the_suite_is_stopped_are_left(tmp_path, interruptible):
    log = tmp_path / "log"

    def work():
        os.write(1, f"{os.getpid()}\n".encode())
        time.sleep(60)

    def stop():
        until(lambda: log.exists() and log.read_text().endswith("\n"), 20)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        apart(work, log)
    thread.join()
    assert not _runs(int(log.read_text()))


def test_sigterm_stops_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stoppable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid):
    """Return whether there is such a process, other than one that has ended and is still listed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def job(folder, name, task="domain"):
    """Return a job none of whose settings are of use."""
    cell = {"task": task, "adapter": "lora", "rank": 4, "budget": None, "learning_rate": 0.1, "seed": 1}
    files = {key: str(folder / f"{key}-{name}") for key in ("data", "scratch", "result", "predictions", "log")}
    return Job(cell=cell, task=task, base="b", keys={}, settings="s", config={}, threads=1, **files)


def error_of(job):
    result = json.loads(Path(job.result).read_text())
    assert result["train_info"]["status"] == "failed"
    return result["run_info"]["error_msg"]


def test_a_process_that_dies_without_a_result_is_a_failed_run(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "run", lambda job: os.kill(os.getpid(), signal.SIGKILL))
    other = subprocess.Popen(["true"])  # a child that is none of the suite's
    jobs = [job(tmp_path, name) for name in "abc"]
    assert sorted(each.result for each in Processes(2, fork=True).run(jobs)) == [each.result for each in jobs]
    assert [error_of(each) for each in jobs] == [f"its process ended with signal 9, see log-{name}" for name in "abc"]
    assert other.wait(timeout=10) == 0


def test_new_processes_in_place_of_forks_as_where_there_is_a_gpu(tmp_path):
    jobs = [job(tmp_path, name, task="none such") for name in "abc"]
    assert len(list(Processes(2, fork=False).run(jobs))) == 3
    for each, name in zip(jobs, "abc", strict=True):
        assert error_of(each) == f"its process ended with code 1, see log-{name}"
        assert "KeyError: 'none such'" in Path(each.log).read_text()
