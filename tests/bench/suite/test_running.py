"""What a call of `axolotl qtha-bench` runs and in which order: trainings whose results are made up, in processes of their own."""

import io
import os
import re
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from axolotl_qtha.bench.suite import gpu_memory, results, running, worker
from axolotl_qtha.bench.suite.command import BenchOptions, bench
from axolotl_qtha.bench.suite.execution import Execution
from axolotl_qtha.bench.suite.part import Part
from axolotl_qtha.bench.suite.running import Call, longest
from axolotl_qtha.bench.suite.spec import Cell, repeats, search
from axolotl_qtha.bench.suite.worker import Processes

from .test_runs import _runs, job
from .test_spec import suite
from .test_summary import info

GIB = 2**30
SMALL = {"tasks": ["domain"], "adapters": ["lora", "qtha"], "ranks": [8], "budgets": [0.24]}  # 4 runs of the grid and 4 others


def write_result(job, loss=3.0, **changes):
    made = {**info(loss, changes.pop("status", "success"), changes.pop("error", "")), **changes}
    results.write(results.make(job.cell, job.settings, job.config, made, "now"), Path(job.result))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A suite whose trainings give a result at once; the second rate is the better one."""
    monkeypatch.setattr(running, "import_all", lambda: None)
    monkeypatch.setattr(running, "tokenise_all", lambda *_: None)
    monkeypatch.setattr(worker, "run", lambda job: write_result(job, 3.0 if job.cell["learning_rate"] == 0.02 else 3.5))
    return Execution(suite(tmp_path, output_dir=str(tmp_path / "out"), **SMALL))


def names(execution):
    return {path.stem for path in (execution.folder / "results").glob("*.json")}


def call(execution, **options):
    out = Console(file=io.StringIO(), width=200)
    made = Call(execution, out, **options)
    made.run()
    return made, out.file.getvalue()


def command(execution, **options):
    """Run the command itself, and return whether no run failed, and what it printed."""
    out = Console(file=io.StringIO(), width=250)
    return bench(BenchOptions(execution.folder.parent / "suite.yml", **options), out), out.file.getvalue()


def until(monkeypatch, execution, count):
    """Have the time run out when so many runs are done."""
    monkeypatch.setattr(Processes, "may_start", lambda self: len(names(execution)) < count)


# A limit of time.


def test_a_limit_in_the_grid_and_among_the_seeds_and_the_same_line_goes_on(made, monkeypatch):
    until(monkeypatch, made, 3)
    fine, output = command(made, minutes=5.0)
    assert fine, "a limit that was asked for is no failure"
    assert "The limit of 5 minutes: 3 of 8 runs are done. The same line goes on with the others." in output
    grid = {cell.name for cell in search(made.suite)}
    assert len(names(made)) == 3
    assert names(made) < grid, "no seed goes on before its grid is whole"
    text = (made.folder / "summary.md").read_text()
    assert "**Not finished: 3 of 8 runs are done.**" in text
    assert "| 2 of 3 not run, 1 of its grid not run |" in next(line for line in text.splitlines() if line.startswith("| qtha"))
    until(monkeypatch, made, 6)
    assert "6 of 8 runs are done." in command(made, minutes=5.0)[1]
    assert grid < names(made)
    monkeypatch.undo()
    assert made.progress() == (6, 8)


def test_a_suite_that_came_to_its_end_says_nothing_of_a_limit(made):
    fine, output = command(made, minutes=60.0)
    assert fine
    assert made.progress() == (8, 8)
    assert "limit" not in output
    assert "Not finished" not in (made.folder / "summary.md").read_text()


def test_a_limit_before_the_first_result(made, monkeypatch):
    until(monkeypatch, made, 0)
    fine, output = command(made, minutes=0.5, overwrite=True)
    assert fine
    assert "0 of 8 runs are done. The same line without --overwrite goes on with the others." in output
    assert not (made.folder / "summary.md").exists()


def test_runs_under_way_are_stopped_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "run", lambda job: (tmp_path / f"{os.getpid()}.pid").touch() or time.sleep(600))
    processes = Processes(2, fork=True, end=time.monotonic() + 1)
    jobs = [job(tmp_path, name) for name in "abc"]
    assert list(processes.run(jobs)) == []
    assert processes.stopped == 2
    assert not any(Path(each.result).exists() for each in jobs), "they are no failures"
    assert not any(_runs(int(path.stem)) for path in tmp_path.glob("*.pid"))


def test_no_run_starts_that_would_not_end_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "run", write_result)
    jobs = [job(tmp_path, name) for name in "ab"]
    late = Processes(1, fork=True, end=time.monotonic() + 1000, expected=2000)
    assert list(late.run(jobs)) == []
    assert late.stopped == 0
    early = Processes(1, fork=True, end=time.monotonic() + 1000)
    assert list(early.run(jobs)) == jobs
    assert 0 < early.expected < 1000, "learned from those that were done"


def test_the_longest_run_of_a_machine_like_this_one_is_expected(made):
    cells = search(made.suite)
    for cell, seconds in zip(cells, (8.0, 50.0, 90.0, 70.0), strict=True):
        write_result(made.job(cell, 1), total_time=seconds, status="failed" if seconds == 90.0 else "success")
    path = made.result_path(cells[3])
    other = results.read(path)
    other["meta_info"]["system_info"]["cores"] += 1
    results.write(other, path)
    assert longest(made, gpu=False) == 50.0
    assert longest(made, gpu=True) == 0.0


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(made, minutes):
    with pytest.raises(ValueError, match=r"^--minutes: .* is no time. What works: `--minutes 30`."):
        command(made, minutes=minutes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"minutes": 3.0, "dry_run": True}, "--minutes: 3.0 is for runs, and --dry-run makes none"),
        ({"part": "1/2", "summary_only": True}, "--part: '1/2' is for runs, and --summary-only makes none"),
        ({"add": (Path("x"),), "overwrite": True}, "--add: 'x' does not go with --overwrite"),
        ({"part": "3/2"}, "--part: '3/2' is no part of a suite"),
        ({"part": "0/2"}, "--part: '0/2' is no part of a suite"),
    ],
)
def test_options_that_do_not_go_together(made, options, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        command(made, **options)
    assert not (made.folder / "results").exists()


# Parts.


def test_the_parts_are_the_whole(made):
    every = [Part(number, 3) for number in (1, 2, 3)]
    grid = search(made.suite)
    assert sorted(cell.name for part in every for cell in part.pick(grid)) == sorted(cell.name for cell in grid)
    chosen = {("domain", method): 0.02 for method in made.suite.methods()}
    whole = repeats(made.suite, chosen)
    assert sorted(cell.name for part in every for cell in repeats(made.suite, chosen, part)) == sorted(c.name for c in whole)
    one = dict([next(iter(chosen.items()))])
    for part in every:  # the rates that one machine does not know yet change nothing of whose run is whose
        assert set(repeats(made.suite, one, part)) <= set(repeats(made.suite, chosen, part))


def test_a_part_is_run_and_only_seeds_whose_grid_is_whole(made):
    fine, output = command(made, part="1/2")
    assert fine
    assert names(made) == {cell.name for cell in search(made.suite)[::2]}
    assert "Part 1/2 has nothing left to run for now: 2 of 8 runs are done." in output
    assert made.chosen(), "a rate is the best so far"
    assert made.settled() == {}
    write_result(made.job(search(made.suite)[1], 1))  # the other rate of LoRA, by the other machine
    call(made, part=Part(1, 2))
    lora = made.suite.methods()[0]
    assert len(names(made)) == 4
    assert made.result_path(Cell("domain", lora, 0.02, 5)).exists()


# A GPU's memory.


@pytest.fixture
def on_gpu(made, monkeypatch):
    """The suite on a GPU with 10 GiB free, with jobs: 4; how many run at a time is counted."""
    monkeypatch.setattr(running, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_memory, "free", lambda: 10 * GIB)
    monkeypatch.setattr(running, "Processes", lambda count, fork, *rest: Processes(count, not fork, *rest))
    made.count = 4
    return made


def train(folder, memory, full=False):
    """Return a training that needs memory; with `full` those of one seed find none left at the first attempt."""

    def run(job):
        mine = folder / f"{Path(job.result).stem}.running"
        mine.touch()
        count = len(list(folder.glob("*.running")))
        with (folder / "counts").open("a") as file:
            file.write(f"{count}\n")  # of runs at this time
        time.sleep(0.3)  # so that others start
        mine.unlink()
        first = mine.with_suffix(".first")
        if full and job.cell["seed"] == 5 and not first.exists():
            first.touch()
            write_result(job, status="failed", error="OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.")
        else:
            write_result(job, accelerator_memory_max=memory)

    return run


def test_the_first_run_alone_says_how_many_fit(on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "run", train(tmp_path, 3 * GIB))
    _, output = call(on_gpu)
    counts = [int(line) for line in (tmp_path / "counts").read_text().split()]
    assert counts[0] == 1
    assert max(counts) <= 2
    assert output.count("2 of 4 jobs at a time: a run needs 4.6 GiB, 10.0 GiB of the GPU are free.") == 1
    assert on_gpu.progress() == (8, 8)


def test_memory_that_is_enough_is_not_mentioned(on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "run", train(tmp_path, GIB))
    assert "at a time" not in call(on_gpu)[1]


def test_a_run_that_found_the_memory_full_beside_others_is_run_again_alone(on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "run", train(tmp_path, GIB, full=True))
    _, output = call(on_gpu)
    assert on_gpu.progress() == (8, 8)
    assert output.count("GPU out of memory: domain--lora--r8--lr0.01--s5 is run again at the end, alone.") == 1
    assert output.count("is run again") == 2
    counts = (tmp_path / "counts").read_text().split()
    assert len(counts) == 10
    assert counts[-2:] == ["1", "1"]
    assert "failed:" not in output


def test_too_little_memory_for_one_is_a_failed_run_that_says_so(on_gpu, monkeypatch):
    error = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB."
    monkeypatch.setattr(worker, "run", lambda job: write_result(job, status="failed", error=error))
    fine, output = command(on_gpu)
    assert not fine
    assert f"failed: domain--lora--r8--lr0.01--s3: {error}" in output
    assert "run again at the end" not in output


def test_a_cpu_asks_no_gpu(made, monkeypatch):
    monkeypatch.setattr(gpu_memory, "free", lambda: pytest.fail("asked"))
    made.count = 2
    assert call(made)[0].free is None
    assert made.progress() == (8, 8)


def test_sigterm_while_it_runs_leaves_nothing(made, monkeypatch):
    monkeypatch.setattr(worker, "run", lambda job: os.kill(os.getppid(), signal.SIGTERM) or time.sleep(600))
    with pytest.raises(KeyboardInterrupt):
        command(made)
    assert names(made) == set()
