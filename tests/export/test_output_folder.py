"""Where an export goes: whole, or not at all."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from axolotl_qtha.export import command
from axolotl_qtha.export.command import ExportOptions, export
from axolotl_qtha.export.output_folder import check, folder_for
from axolotl_qtha.export.report import JSON

EXPORTED = {JSON: "{}", "adapter_model.safetensors": "old"}


def fill(folder, files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_or_empty_folder_is_taken(tmp_path):
    for out in (tmp_path / "new" / "deep", tmp_path):
        check(out, overwrite=False, inputs=[tmp_path / "elsewhere"])


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    fill(tmp_path / "out", EXPORTED)
    with pytest.raises(ValueError, match=r"--out: '.*out' is not empty. What works: .*--overwrite"):
        check(tmp_path / "out", overwrite=False, inputs=[])
    check(tmp_path / "out", overwrite=True, inputs=[])


def test_overwrite_replaces_earlier_exports_only(tmp_path):
    fill(tmp_path / "out", {"thesis.tex": "years"})
    with pytest.raises(ValueError, match=r"is no earlier export \(it holds no export.json\)"):
        check(tmp_path / "out", overwrite=True, inputs=[])


@pytest.mark.parametrize("inside", ["adapter", "adapter/checkpoint-9", "adapter/.."])
def test_what_is_read_is_not_replaced(tmp_path, inside, monkeypatch):
    monkeypatch.chdir("/")
    adapter = tmp_path / "adapter"
    (adapter / "checkpoint-9").mkdir(parents=True)
    if inside == "adapter/checkpoint-9":  # inside it is fine, above it or itself not
        check(tmp_path / inside, overwrite=True, inputs=[adapter])
        return
    with pytest.raises(ValueError, match=r"would replace '.*', which is in use"):
        check(tmp_path / inside, overwrite=True, inputs=[adapter])


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    fill(tmp_path / "out", EXPORTED)
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ValueError, match="would replace"):
        check(tmp_path / "out", overwrite=True, inputs=[])


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check(tmp_path / "out", overwrite=True, inputs=[])


@pytest.mark.parametrize("before", [None, {}, EXPORTED])
def test_the_folder_appears_whole(tmp_path, before):
    out = tmp_path / "out"
    if before is not None:
        fill(out, before)
    with folder_for(out) as folder:
        (folder / "new").write_text("text")
        assert not out.exists() or names(out) == sorted(before)
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("before", [None, EXPORTED])
def test_nothing_is_left_of_a_failure(tmp_path, before):
    out = tmp_path / "out"
    if before is not None:
        fill(out, before)

    def fail():
        with folder_for(out) as folder:
            (folder / "new").write_text("text")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == (["out"] if before else [])
    assert before is None or names(out) == sorted(before)


FULL = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from axolotl_qtha.export.output_folder import folder_for
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))  # no file may grow larger, as on a full disk
with folder_for(Path(sys.argv[1])) as folder:
    (folder / "small").write_text("text")
    if sys.argv[2] == "safetensors":
        save_file({"large": torch.zeros(2**18)}, folder / "large.safetensors")
    else:
        (folder / "large").write_bytes(bytes(2**20))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "bytes"])
def test_a_full_disk(tmp_path, kind):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "out"), kind], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: --out: '{tmp_path / 'out'}' cannot be written")
    assert "File too large" in last
    assert names(tmp_path) == []


def test_a_mount_point_is_refused():
    with pytest.raises(ValueError, match=r"--out: '/proc' is a mount point.*What works: `--out /proc/export`"):
        check(Path("/proc"), False, [])


def test_a_folder_that_cannot_be_moved_leaves_nothing(tmp_path):
    """A link to an empty folder: it cannot take the place of a folder."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OSError, match="link"), folder_for(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_sigterm_leaves_nothing(tmp_path):
    def ended():
        with folder_for(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        ended()
    assert end.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("before", [None, EXPORTED])
@pytest.mark.parametrize("format", ["lora", "merged"])
def test_a_full_disk_is_told_as_it_is(tmp_path, monkeypatch, before, format):
    """What is left there, and nothing smaller advised to who has the smallest."""
    out = tmp_path / "out"
    if before is not None:
        fill(out, before)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "_inputs", lambda options: (tmp_path, None))
    monkeypatch.setattr(command, "configuration", lambda *_: {})
    monkeypatch.setattr(command, "_fit", full)
    with pytest.raises(ValueError, match=r"--out: .*cannot be written \(.*No space left.*What works: another disk") as error:
        export(ExportOptions(tmp_path / "config.yml", out, format, overwrite=True), None)
    assert ("`--format lora`" in str(error.value)) == (format == "merged")
    assert ("the earlier export is as it was" in str(error.value)) == (before is not None)
    assert ("nothing was left there" in str(error.value)) == (before is None)
    assert names(tmp_path) == ([] if before is None else ["out"])


def test_space_is_told_in_units_that_show_it(tmp_path, monkeypatch):
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(ValueError, match=r"--out: .* has 4.0 KiB free, of 286.1 MiB needed"):
        command._check_space(tmp_path / "out", 300_000_000)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, number):
    real = os.open

    def read_only(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ValueError, match=rf"--out: .*cannot be written: {os.strerror(number)} \({tmp_path}\)"):
        check(tmp_path / "new" / "out", overwrite=False, inputs=[])


def test_a_file_in_the_place_of_a_folder_above_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out: .*cannot be written: Not a directory"):
        check(tmp_path / "file" / "out", overwrite=False, inputs=[])


def test_trying_leaves_nothing(tmp_path):
    check(tmp_path / "new" / "out", overwrite=False, inputs=[])
    assert names(tmp_path) == []
