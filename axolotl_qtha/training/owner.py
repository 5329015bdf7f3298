"""One owner of `output_dir`: what a training does to the folder before it writes to it, and when it has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from ..files.durable import why_unsafe
from ..files.lock import InUse, Lock
from ..tuner.saving import WEIGHTS
from . import checkpoints
from .ranks import is_first, once
from .saves import tidy

LOCK = "_in_use"  # the hub gets no file whose name begins so
LOG = get_logger(__name__)
_owned: dict[Path, Lock] = {}  # the folders of this process, which may train several times, also into one folder
_left: dict[Path, list[Any]] = {}  # what is to be saved where a finished adapter lies, once there is a new one


def own(output_dir: str, limit: int | None, resumes: bool) -> None:
    """Take a folder for this training, and bring what killed ones left in it to its end; to be called on every rank.

    Args:
        output_dir: the folder; it is made if it is not there.
        limit: `save_total_limit`.
        resumes: whether the run goes on from the latest checkpoint: those that are not complete are renamed then.

    Raises:
        ValueError: if another process uses the folder or nothing can be written there, naming it and what works.
    """
    once(lambda: _own(Path(output_dir), limit, resumes))
    if (Path(output_dir) / WEIGHTS).is_file():
        _presave_later(Path(output_dir).resolve())


def _own(folder: Path, limit: int | None, resumes: bool) -> None:
    key, another = f"output_dir: {str(folder)!r}", "another `output_dir:` for one of them"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (path := folder.resolve()) not in _owned:
            _owned[path] = Lock(path / LOCK, "a training")
        unsafe = why_unsafe(path)
    except InUse as error:
        raise ValueError(f"{key} is {error}. What works: to wait until it has ended, or {another}.") from None
    except OSError as error:
        raise ValueError(
            f"{key}: no save can be made there ({error}). What works: a folder on a disk that can be written to and can rename "
            "folders, with space left."
        ) from error
    if unsafe:
        LOG.warning(f"{key}: its file system {unsafe}.")
    for line in tidy(folder, limit):
        LOG.warning(f"{line}.")
    for place, why in checkpoints.set_aside_incomplete(folder) if resumes else []:
        LOG.warning(f"{place} is not complete ({why}): it is not used.")


def _presave_later(path: Path) -> None:
    """Have Axolotl's `save_initial_configs` not write a new run's settings beside an adapter that is finished.

    If the run is killed, the folder holds that adapter as it was; when it has ended, the base's configuration and the processor
    are saved as well.
    """
    import axolotl.train as host

    original = host.save_initial_configs
    _left.pop(path, None)

    def save(run: Any, tokenizer: Any, model: Any, peft_config: Any, processor: Any) -> None:
        host.save_initial_configs = original
        if Path(run.output_dir).resolve() == path:
            _left[path] = [part for part in (getattr(model, "config", None), processor) if part is not None]
        else:  # another run of this process, where the first did not come to this
            original(run, tokenizer, model, peft_config, processor)

    host.save_initial_configs = save


def give_up(output_dir: str) -> None:
    """Let others use a folder, now that the training has saved its adapter there; to be called on every rank."""
    path = Path(output_dir).resolve()
    for part in _left.pop(path, []):  # the tokenizer the host has saved; and its logger needs ranks, which are gone by now
        if is_first():
            part.save_pretrained(str(path))
    if (lock := _owned.pop(path, None)) is not None:
        lock.release()
