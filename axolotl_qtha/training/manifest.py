"""A checkpoint's manifest: that it is being written, then, once everything has reached the disk, what it consists of.

A folder with the name of a checkpoint says nothing about its content: transformers fills it file by file, over an older one if
there is one. So the manifest lies in it from before the first file, and says "complete" last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..files.durable import flush, flush_all, put_in_place
from ..version import __version__

MANIFEST = "qtha_manifest.json"
WRITING = "it was being written"
STATES = ("trainer_state.json", "adapter_config.json", "tokens_state.json")  # of the .json files, those that a run goes on from
ASIDE = (
    ".json",
    ".md",
    ".jinja",
    ".txt",
    ".model",
)  # other files of these kinds are cards and the tokenizer's: they may be edited
STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(config=STRICT)
class Kept:
    """A file as it was written: its size in bytes, and its SHA-256 in hexadecimal digits."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(config=STRICT)
class Manifest:
    """What `qtha_manifest.json` says: `files` by their paths in the checkpoint, with `/`; `settings` of the run that wrote it."""

    state: Literal["being written", "complete"]
    step: Annotated[int, Field(ge=0)]
    version: str  # of axolotl-qtha
    settings: dict[str, Any]
    files: dict[str, Kept]

    def __post_init__(self) -> None:
        """Refuse paths that lead out of the checkpoint."""
        for name in self.files:
            parts = PurePosixPath(name).parts
            if not parts or parts[0] == "/" or ".." in parts:
                raise ValueError(f"{name!r} is no path inside the checkpoint")


_MANIFESTS = TypeAdapter(Manifest)


def begin(folder: Path, step: int, settings: dict[str, Any]) -> None:
    """Write that a checkpoint is being written, before anything else of it is.

    Raises:
        OSError: if the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Half of it says so, too; and no flush: file systems keep the order of names, and it is the first in the folder
    (folder / MANIFEST).write_text(_text(Manifest("being written", step, __version__, settings, {})))


def finish(folder: Path, step: int, settings: dict[str, Any]) -> None:
    """Have all files of a checkpoint reach the disk, then write what they are; to be called when every rank has written its own.

    Raises:
        OSError: if the disk is full.
    """
    paths = list(_counting(folder))
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, paths)
        flush_all(folder)  # meanwhile: one computes, the other waits for the disk
    kept = map(Kept, (path.stat().st_size for path in paths), digests)
    files = dict(zip((path.relative_to(folder).as_posix() for path in paths), kept, strict=True))
    beside = folder / f".{MANIFEST}"
    beside.write_text(_text(Manifest("complete", step, __version__, settings, files)))
    put_in_place(beside, folder / MANIFEST)
    flush(folder)
    flush(folder.parent)


def read(folder: Path) -> Manifest | None:
    """Return a checkpoint's manifest, None if it has none: of an earlier version, or LoRA's.

    Raises:
        ValueError: if it is not one, naming what is wrong with it.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from error
    try:
        return _MANIFESTS.validate_json(text)
    except (ValidationError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error


def fault(folder: Path, whole: bool = False) -> str | None:
    """Return what of a checkpoint is not as its manifest says, or None; also None if it has no manifest.

    Args:
        folder: the checkpoint.
        whole: read all files and compare their hashes, too; else their sizes alone.
    """
    try:
        manifest = read(folder)
    except ValueError as error:
        return str(error)
    if manifest is None:
        return None
    if manifest.state != "complete":
        return WRITING
    for name, kept in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != kept.bytes:
            return f"{name} has {size:,} bytes instead of {kept.bytes:,}"
        if whole and _digest(path) != kept.sha256:
            return f"{name} is not the file that was saved (its hash differs from {MANIFEST})"
    return None


def _counting(folder: Path) -> Iterator[Path]:
    """Yield the files that a run goes on from."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST and (path.name in STATES or path.suffix not in ASIDE):
            yield path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(manifest: Manifest) -> str:
    return json.dumps(_MANIFESTS.dump_python(manifest), indent=1)
