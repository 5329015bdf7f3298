"""Where an export goes: the whole folder at once, or nothing."""

from __future__ import annotations

import errno
import glob
import logging
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
from ..files.durable import flush, flush_all, why_unsafe
from ..files.lock import InUse, Lock
from ..files.writable import why_unwritable
from .report import JSON

LOG = logging.getLogger(__name__)
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
    lock, scratch = _own(out), None
    before = _end_at_sigterm()
    try:
        scratch = Path(tempfile.mkdtemp(prefix=_beside(out, "exporting"), dir=out.parent))
        scratch.chmod(0o755)
        yield scratch
        flush_all(scratch)
        _take(scratch, out)
    except (OSError, SafetensorError) as error:
        if _number(error) in FULL:
            left = "the earlier export is as it was" if out.is_dir() and any(out.iterdir()) else "nothing was left there"
            raise refusal("--out", str(out), f"cannot be written ({error}); {left}", works) from error
        raise
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        lock.release()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _own(out: Path) -> Lock:
    """Take the folder for this export, and look for what others left beside it.

    Raises:
        ValueError: naming --out, if another process exports to it.
    """
    try:
        lock = Lock(out.with_name(f".{out.name}.in-use"), "an export")
    except InUse as error:
        raise refusal("--out", str(out), f"is {error}", "to wait until it has ended, or another folder") from None
    try:
        _tidy(out)
        if unsafe := why_unsafe(out.parent, _beside(out, "trying")):
            LOG.warning(f"--out: {str(out)!r}: its file system {unsafe}.")
    except BaseException as error:
        lock.release()
        if isinstance(error, OSError):
            works = "a folder on a disk that can rename folders, with space left"
            raise refusal("--out", str(out), f"cannot be written as a whole ({error})", works) from error
        raise
    return lock


def _beside(out: Path, kind: str) -> str:
    """Return how the names begin of what an export makes beside its folder."""
    return f".{out.name}.{kind}-"


def _tidy(out: Path) -> None:
    """Bring to its end what exports that were killed left beside a folder."""

    def left(kind: str) -> Iterator[Path]:
        return out.parent.glob(glob.escape(_beside(out, kind)) + "*")

    for old in left("replaced"):
        if not out.exists() and any(old.iterdir()):
            old.rename(out)
            LOG.warning(f"{out} is back as it was before an export that was killed.")
        else:
            shutil.rmtree(old, ignore_errors=True)
    for trying in left("trying"):
        shutil.rmtree(trying, ignore_errors=True)
    for scratch in left("exporting"):
        shutil.rmtree(scratch, ignore_errors=True)
        LOG.warning(f"{scratch}, an export that was killed, is deleted.")


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
        flush(out.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=_beside(out, "replaced"), dir=out.parent))
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
    flush(out.parent)
    shutil.rmtree(old, ignore_errors=True)
