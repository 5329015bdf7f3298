"""Files and names that are on the disk when a function returns, whatever happens next."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

TRYING = ".trying-"
_UNABLE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # what file systems answer that cannot flush


def flush(path: Path) -> bool:
    """Have a file, or the list of names in a folder, reach the disk; return whether its file system can do that.

    Raises:
        OSError: if it cannot be opened or written.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in _UNABLE:
            return False
        raise
    finally:
        os.close(handle)
    return True


def flush_all(folder: Path) -> None:
    """Have all that is in a folder, and the folder, reach the disk.

    Raises:
        OSError: if it cannot be opened or written.
    """
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def put_in_place(file: Path, place: Path) -> None:
    """Give a file that is written whole its name: until then, and after a crash, what lay there before is there.

    The new name itself is on the disk once `place.parent` is flushed.

    Raises:
        OSError: if the disk is full or the two are on different ones.
    """
    flush(file)
    os.replace(file, place)


def why_unsafe(folder: Path, prefix: str = TRYING) -> str | None:
    """Try what saves rely on; return what the file system of a folder cannot do, or None.

    Args:
        folder: where something is to be saved.
        prefix: how the name of the folder begins that is made there for it, and deleted; a kill leaves it.

    Raises:
        OSError: if nothing can be written, or folders cannot be renamed, without which no save is safe.
    """
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as name:
        new, old, file = Path(name, "new"), Path(name, "old"), Path(name, "file")
        new.mkdir()
        old.mkdir()
        os.rename(new, old)  # over an empty folder
        file.write_text("x")
        flushed = {"files": flush(file), "folders": flush(Path(name))}
    unable = [what for what, whether in flushed.items() if not whether]
    return f"cannot flush {' and '.join(unable)}: what was saved last may be gone after a power cut" if unable else None
