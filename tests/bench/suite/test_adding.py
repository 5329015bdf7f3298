"""Results of another call are taken over where they are missing, and nothing is where one of them is not to be trusted."""

import io
import json
import shutil

import pytest
from rich.console import Console

from axolotl_qtha.bench.suite import results
from axolotl_qtha.bench.suite.adding import add
from axolotl_qtha.bench.suite.command import BenchOptions, bench
from axolotl_qtha.bench.suite.execution import Execution
from axolotl_qtha.bench.suite.spec import Cell, search

from .test_running import SMALL, names, write_result
from .test_spec import suite


def machine(folder, **changes):
    folder.mkdir()
    return Execution(suite(folder, output_dir=str(folder / "out"), **{**SMALL, **changes}))


@pytest.fixture
def here(tmp_path):
    return machine(tmp_path / "here")


@pytest.fixture
def there(tmp_path):
    """Another machine, with the whole grid, and answers to the test set of its first run."""
    made = machine(tmp_path / "there")
    for cell in search(made.suite):
        write_result(made.job(cell, 1), 3.5 if cell.learning_rate == 0.01 else 3.0)
    results.write_lines([{"answer": "4 Äpfel"}], made.predictions_path(search(made.suite)[0]))
    return made


def taken(execution, *folders):
    out = Console(file=io.StringIO(), width=200)
    add(execution, folders, out)
    return out.file.getvalue()


def test_results_add_up_and_the_summary_is_that_of_both(here, there):
    cells = search(here.suite)
    write_result(here.job(cells[-1], 1), 3.0)
    out = Console(file=io.StringIO(), width=300)
    assert bench(BenchOptions(here.folder.parent / "suite.yml", summary_only=True, add=(there.folder,)), out)
    assert f"{there.folder}: 3 results taken over, 1 were here already." in out.file.getvalue()
    assert names(here) == names(there)
    assert here.progress() == (4, 8)
    assert "**Not finished: 4 of 8 runs are done.**" in (here.folder / "summary.md").read_text()
    for cell in cells[:-1]:
        assert results.read(here.result_path(cell)) == results.read(there.result_path(cell))
    assert here.predictions_path(cells[0]).read_text() == there.predictions_path(cells[0]).read_text()
    assert here.open(cells) == []
    assert here.settled() == there.settled() != {}


def test_the_folder_of_results_alone_will_do(here, there):
    assert "4 results taken over." in taken(here, there.folder / "results")
    assert here.predictions_path(search(here.suite)[0]).exists()


def test_what_is_here_is_kept_and_a_difference_told(here, there, tmp_path):
    first, second, third, last = search(here.suite)
    write_result(here.job(first, 1), 3.6)
    write_result(here.job(second, 1), 9.0, status="diverged")
    third_here = here.result_path(third)
    write_result(here.job(third, 1), status="failed", error="no memory")
    before = here.result_path(first).read_bytes()
    output = taken(here, there.folder)
    assert "2 results taken over, 2 were here already." in output
    assert f"{first.name} differs from the one there is, which is kept: valid loss 3.6 here, 3.5 there." in output
    assert f"{second.name} differs from the one there is, which is kept: diverged here, success there." in output
    assert here.result_path(first).read_bytes() == before
    assert results.read(third_here)["train_info"]["status"] == "success", "one that failed here is as good as missing"
    assert here.result_path(last).exists()
    assert "0 results taken over, 4 were here already." in taken(here, there.folder)


def test_of_two_folders_the_first_counts(here, there, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(there.folder, other)
    path = other / "results" / f"{search(here.suite)[0].name}.json"
    changed = json.loads(path.read_text())
    changed["train_info"]["metrics"][-1]["valid loss"] = 1.0
    path.write_text(json.dumps(changed))
    assert "kept: valid loss 3.5 here, 1.0 there." in taken(here, there.folder, other)
    assert results.final(results.read(here.result_path(search(here.suite)[0])), "valid loss") == 3.5


def test_failed_runs_and_those_of_other_suites_are_left(here, there):
    first = search(here.suite)[0]
    write_result(there.job(first, 1), status="failed", error="no memory")
    shutil.copy(there.result_path(first), there.folder / "results" / "other--lora--r8--lr0.01--s3.json")
    assert "3 results taken over, 1 failed ones left, 1 are of no run of this suite." in taken(here, there.folder)
    assert not here.result_path(first).exists()


def test_runs_at_other_seeds_come_with_the_grid(here, there):
    method = here.suite.methods()[0]
    write_result(there.job(Cell("domain", method, 0.02, 5), 1))
    assert "5 results taken over" in taken(here, there.folder)
    assert here.progress() == (5, 8)


def cut(path):
    path.write_text(path.read_text()[:200])


def older(path):
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 0'))


def renamed(path):
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 5', 1))


def without(path):
    path.write_text(path.read_text().replace('"meta_info"', '"other_info"'))


def no_loss(path):
    path.write_text(path.read_text().replace('"valid loss"', '"loss"'))


def binary(path):
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut, "is no result of a suite"),
        (binary, "is no result of a suite"),
        (older, "is of version 0, this is version 1"),
        (renamed, "is damaged"),
        (without, "is damaged"),
        (no_loss, "is damaged"),
    ],
)
def test_a_damaged_result_is_refused_and_nothing_is_taken(here, there, spoil, words):
    path = there.result_path(search(there.suite)[-1])
    spoil(path)
    with pytest.raises(ValueError, match=rf"^--add: .*{path.name}.*{words}.*What works: copy the folder once more"):
        taken(here, there.folder)
    assert names(here) == set()
    assert not list((here.folder / "predictions").glob("*"))


def test_damaged_answers_are_refused(here, there):
    there.predictions_path(search(there.suite)[0]).write_text('{"answer"')
    with pytest.raises(ValueError, match=r"^--add: .* cannot be taken over"):
        taken(here, there.folder)
    assert names(here) == set()


def test_other_settings_are_refused(here, tmp_path):
    other = machine(tmp_path / "other", max_steps=11)
    write_result(other.job(search(other.suite)[0], 1))
    with pytest.raises(
        ValueError, match=r"^--add: .* was run with other settings \(\w+, here \w+\)\. What works: results of the same"
    ):
        taken(here, other.folder)
    assert names(here) == set()


def test_a_folder_without_results_is_refused(here, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"^--add: .* holds no result of this suite\. What works: the output_dir"):
            taken(here, folder)
