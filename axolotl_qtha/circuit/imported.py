"""What a setting names by its import path, `package.module:name`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import refusal

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_path(value: Any) -> bool:
    """Return whether a value has the form of an import path.

    >>> is_path("my_package.my_module:my_model"), is_path("my_module"), is_path("/home/me/model.py")
    (True, False, False)
    """
    return isinstance(value, str) and PATH.fullmatch(value) is not None


@contextmanager
def _here() -> Iterator[None]:
    """Have modules in the current directory found, too, as with `python -m`."""
    sys.path.append("")  # last: nothing in the current directory stands in for an installed package
    try:
        yield
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index("")]


def found_at(key: str, path: str, works: str) -> Any:
    """Return the object that an import path names.

    Args:
        key: the setting.
        path: its value, `package.module:name`.
        works: what would work, in words.

    Raises:
        ValueError: naming key, path, what was imported and what is not there.
    """
    module, _, name = path.partition(":")
    with _here():
        try:
            found: Any = importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever the module's own code raises
            why = f"cannot be imported: `import {module}` fails with {type(error).__name__}: {error}"
            where = "in a module that Python finds (installed, on PYTHONPATH, or in the current directory)"
            raise refusal(key, path, why, f"{works}, {where}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            there = ", ".join(sorted(each for each in dir(found) if not each.startswith("_"))[:8]) or "nothing"
            raise refusal(key, path, f"is not there: `{module}` was imported and has no `{name}`, but {there}", works)
        found = getattr(found, part)
    return found


def imported(key: str, path: str, kinds: tuple[type, ...], works: str) -> Any:
    """Return the object that an import path names, or what it returns if it is a function or a class.

    Args:
        key: the setting.
        path: its value, `package.module:name`.
        kinds: what the object may be.
        works: what would work, in words.

    Raises:
        ValueError: naming key, path, what was imported and what was found instead.
    """
    found = found_at(key, path, works)
    if not isinstance(found, kinds) and callable(found):
        try:
            found = found()
        except Exception as error:
            why = f"was imported, and calling it without arguments fails with {type(error).__name__}: {error}"
            raise refusal(key, path, why, works) from error
    if not isinstance(found, kinds):
        named = " or ".join(kind.__name__ for kind in kinds)
        kind = f"{type(found).__module__}.{type(found).__qualname__}"
        raise refusal(key, path, f"was imported and gives no {named}, but an object of {kind}", works)
    return found
