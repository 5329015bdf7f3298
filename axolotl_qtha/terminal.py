"""Where commands print."""

from __future__ import annotations

import sys

from rich.console import Console


def console(columns: int = 120) -> Console:
    """Return a console as wide as the terminal, or as many columns wide where the output goes to a file: no table is cut."""
    return Console(width=None if sys.stdout.isatty() else columns)
