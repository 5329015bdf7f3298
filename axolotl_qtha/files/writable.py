"""Whether a folder can be written to, and may be, found out before the work whose results go there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import refusal


def why_unwritable(folder: Path) -> str | None:
    """Return why nothing can be written to a folder, None if it can.

    A file is made there and removed; where the folder does not exist yet, in the nearest one above it that does. (A look at
    permissions would not tell: root may write anywhere, but for file systems that are read-only.)

    Args:
        folder: what is to be written to. It is not made.
    """
    there = next(above for above in (folder, *folder.parents) if os.path.lexists(above))
    try:
        handle, name = tempfile.mkstemp(prefix=".try-", dir=there)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        return f"cannot be written: {error.strerror} ({there})"
    return None


def refuse_taken(folder: Path, results: str, overwrite: bool) -> None:
    """Refuse a folder for results that is none, or has such results already.

    Args:
        folder: what `--out` says, or stands for it.
        results: the file that says that there are some.
        overwrite: whether they may be replaced.

    Raises:
        ValueError: naming `--out`.
    """
    if folder.exists() and not folder.is_dir():
        raise refusal("--out", str(folder), "is a file", "a folder")
    if (folder / results).exists() and not overwrite:
        raise refusal("--out", str(folder), f"holds a {results}", "another folder, or `--overwrite` to replace it")
