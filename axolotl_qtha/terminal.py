"""Where commands print."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    """Return a console which does not cut tables that go to a file."""
    return Console(width=None if sys.stdout.isatty() else 120)
