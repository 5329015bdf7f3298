"""What a setting names by its import path, `package.module:name`."""

from __future__ import annotations

import importlib
import re
from typing import Any

from ..errors import refusal

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_path(value: Any) -> bool:
    """Return whether a value has the form of an import path.

    >>> is_path("my_package.my_module:my_model"), is_path("my_module"), is_path("/home/me/model.py")
    (True, False, False)
    """
    return isinstance(value, str) and PATH.fullmatch(value) is not None


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
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever the module's own code raises
        why = f"cannot be imported: `import {module}` fails with {type(error).__name__}: {error}"
        raise refusal(key, path, why, f"{works}, in a module that Python finds (installed, or `PYTHONPATH=.`)") from error
    for part in name.split("."):
        if not hasattr(found, part):
            there = ", ".join(sorted(each for each in vars(found) if not each.startswith("_"))[:8]) or "nothing"
            raise refusal(key, path, f"is not there: `{module}` was imported and has no `{name}`, but {there}", works)
        found = getattr(found, part)
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
