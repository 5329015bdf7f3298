"""Files and names that are on the disk when a function returns, whatever happens next."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Have a file, or the list of names in a folder, reach the disk.

    Raises:
        OSError: if it cannot be opened or written.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(file: Path, place: Path) -> None:
    """Give a file that is written whole its name: until then, and after a crash, what lay there before is there.

    The new name itself is on the disk once `place.parent` is flushed.

    Raises:
        OSError: if the disk is full or the two are on different ones.
    """
    flush(file)
    os.replace(file, place)
