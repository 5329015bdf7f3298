"""Where an export goes: the whole folder at once, or nothing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import refusal
from ..files.durable import flush
from ..files.writable import why_unwritable
from .report import JSON

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check(out: Path, overwrite: bool, inputs: list[Path]) -> None:
    """Refuse an output folder that holds anything, before any work is done.

    Args:
        out: the folder to be written.
        overwrite: whether an earlier export may be replaced.
        inputs: folders that the export reads, which it must not replace.

    Raises:
        ValueError: naming --out.
    """
    target = out.resolve()
    for folder in (*inputs, Path.cwd()):
        if folder.exists() and (target == folder.resolve() or target in folder.resolve().parents):
            raise refusal("--out", str(out), f"would replace {str(folder)!r}, which is in use", "a folder of its own")
    if os.path.ismount(out):
        raise refusal("--out", str(out), "is a mount point, which cannot be replaced as a whole", f"`--out {out / 'export'}`")
    if out.exists() and not out.is_dir():
        raise refusal("--out", str(out), "is a file", "a folder that does not exist yet")
    if why := why_unwritable(target.parent):  # where it is made
        raise refusal("--out", str(out), why, "a folder on a disk that can be written to")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise refusal("--out", str(out), "is not empty", "another folder, or `--overwrite` to replace an earlier export")
    if not (out / JSON).is_file():
        raise refusal("--out", str(out), f"is no earlier export (it holds no {JSON}), and --overwrite would delete it", "another")


@contextmanager
def folder_for(out: Path, works: str = "another disk") -> Iterator[Path]:
    """Give a folder beside `out` to write to, which takes its name at the end, or goes if anything is raised.

    Args:
        out: the folder.
        works: on a full disk.

    Raises:
        ValueError: naming --out, if the disk is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.exporting-", dir=out.parent))
    before = _end_at_sigterm()
    try:
        scratch.chmod(0o755)
        yield scratch
        for file in scratch.rglob("*"):
            flush(file)
        flush(scratch)
        _take(scratch, out)
    except (OSError, SafetensorError) as error:
        if _number(error) in FULL:
            left = "the earlier export is as it was" if out.is_dir() and any(out.iterdir()) else "nothing was left there"
            raise refusal("--out", str(out), f"cannot be written ({error}); {left}", works) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _end_at_sigterm() -> Any:
    """Have what was written go when the process is asked to end, too; return what the signal did before, None in a thread."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _number(error: OSError | SafetensorError) -> int | None:
    """Return the number of an operating system's error, which safetensors tells in words."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def _take(scratch: Path, out: Path) -> None:
    """Rename `scratch` to `out`; what was there goes once its successor is in place."""
    if not out.exists():
        os.rename(scratch, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.replaced-", dir=out.parent))
    try:
        os.rename(out, old)  # over the empty folder
    except OSError:
        old.rmdir()
        raise
    try:
        os.rename(scratch, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
