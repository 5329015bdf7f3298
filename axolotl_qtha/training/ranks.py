"""What one rank does for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from axolotl.utils.distributed import is_distributed


def is_first() -> bool:
    """Return whether this is rank 0, as its launcher says: also before the ranks are joined, and after.

    Axolotl's own question takes every rank for the first as long as they are not joined.
    """
    return os.environ.get("RANK", "0") == "0"


def once(work: Callable[[], Any]) -> Any:
    """Have rank 0 do something, and return or raise on every rank what it returned or raised there; to be called on every rank.

    Where Axolotl has not yet joined the ranks (DDP on a quantised base), the others go on without waiting and get None; if the
    work raises, their launcher ends them.

    Raises:
        Exception: what the work raised, so that no rank waits for one that has ended.
    """
    together, told = is_distributed(), [None, None]
    if is_first():
        try:
            told[0] = work()
        except Exception as error:
            if not together:
                raise
            told[1] = error  # type: ignore[call-overload]
    if together:
        broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]
