"""The command line that the benchmarks have in common: `python -m axolotl_qtha.bench.NAME --help`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

# Options by name; the benchmark gives the default, and where that is several values the option takes several.
COMMON: dict[str, dict[str, Any]] = {
    "rank": {"type": int, "help": "rank of the adapters"},
    "ranks": {"type": int, "help": "ranks of the adapters"},
    "quantum": {"help": "value of `quantum`"},
    "tokens": {"type": int, "help": "tokens per step"},
    "repeats": {"type": int, "help": "turns of each measurement"},
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows defaults, as they are typed, and the description as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        several = isinstance(action.default, (list, tuple))
        return f"{action.help} (default: {shlex.join(map(str, action.default)) if several else action.default})"


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with `--json` and some of the `COMMON` options.

    Args:
        description: shown above the options, the module's docstring.
        defaults: options by their names in `COMMON`, and their defaults.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=_Help)
    for name, default in defaults.items():
        several: dict[str, Any] = {"nargs": "+"} if isinstance(default, (list, tuple)) else {}
        result.add_argument(f"--{name}", default=default, **several, **COMMON[name])
    result.add_argument("--json", type=Path, help="also write all figures to this file")
    return result


def write_json(args: argparse.Namespace, figures: Any) -> None:
    """Write the figures where `--json` says, if it says so."""
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
