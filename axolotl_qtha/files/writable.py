"""Whether a folder can be written to, found out before the work whose results go there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
