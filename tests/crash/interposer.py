"""Ends a process, or fills its disk, at any one of the places where it changes files.

A place is a call that changes something below a folder. "before" and "half" stand for SIGKILL: the call does not happen, or only
half of the file that it writes is there, and nothing changes after it, whatever `finally` and `except` try. "full" stands for a
disk without space: this call and every later one that writes raises ENOSPC, but files can be moved and deleted.
"""

import builtins
import errno
import io
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import peft.peft_model
import safetensors.numpy
import safetensors.torch
import torch

import axolotl_qtha.ibm.journal
from axolotl_qtha.files import lock

WRITES = ("open", "torch.save", "save_file", "os.write", "mkdir")


class Killed(BaseException):
    """The process is dead."""


class Interposer:
    """Counts the places; `at` is the one that fails (None: none of them), `how` is "before", "half" or "full"."""

    def __init__(self, folder, at=None, how="before"):
        self.folder, self.at, self.how = str(folder), at, how
        self.places, self.dead, self.failed = [], False, False

    def reach(self, call, path, write=None):
        """Let a call pass, or not; `write` writes its file, for half of it to be there."""
        if self.dead:
            raise Killed
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not str(path).startswith(self.folder):
            return
        self.places.append(f"{call} {Path(path).name}")
        if self.how == "full":
            self.failed = self.failed or len(self.places) - 1 == self.at
            if self.failed and call in WRITES:
                if write is not None:
                    _half(write, path)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        elif len(self.places) - 1 == self.at:
            if self.how == "half" and write is not None:
                _half(write, path)
            self.dead = True
            raise Killed

    def interrupt(self, work):
        """Do something until the place, and have its process be gone."""
        with self.watching(), suppress(Killed, Exception):
            work()
        if self.dead:
            lock._forget_all()

    @contextmanager
    def watching(self):
        """Stand in front of the calls."""
        with (
            patch.multiple(
                os,
                replace=self._two("replace", os.replace),
                rename=self._two("rename", os.rename),
                unlink=self._one("unlink", os.unlink),
                rmdir=self._one("rmdir", os.rmdir),
                mkdir=self._one("mkdir", os.mkdir),
                fsync=self._one("fsync", os.fsync),
                ftruncate=self._one("ftruncate", os.ftruncate),
                write=self._one("os.write", os.write),
                open=self._flags(os.open),
            ),
            patch.multiple(builtins, open=self._mode(io.open)),
            patch.multiple(io, open=self._mode(io.open)),
        ):
            save, save_file, save_arrays = torch.save, safetensors.torch.save_file, safetensors.numpy.save_file
            with (
                patch.object(torch, "save", self._file("torch.save", save, 1)),
                patch.object(safetensors.torch, "save_file", self._file("save_file", save_file, 1)),
                patch.object(peft.peft_model, "safe_save_file", self._file("save_file", save_file, 1)),
                patch.object(axolotl_qtha.ibm.journal, "save_file", self._file("save_file", save_arrays, 1)),
            ):
                yield self

    def _one(self, name, real):
        def call(path, *args, **kwargs):
            inside = f"/proc/self/fd/{kwargs['dir_fd']}" if kwargs.get("dir_fd") is not None else None  # of shutil.rmtree
            self.reach(name, path if inside is None else f"{os.readlink(inside)}/{path}")
            return real(path, *args, **kwargs)

        return call

    def _two(self, name, real):
        def call(source, target, **kwargs):
            self.reach(name, target)
            return real(source, target, **kwargs)

        return call

    def _flags(self, real):
        def call(path, flags, *args, **kwargs):
            if flags & (os.O_CREAT | os.O_TRUNC):
                self.reach("open", path)
            return real(path, flags, *args, **kwargs)

        return call

    def _mode(self, real):
        def call(file, mode="r", *args, **kwargs):
            if set(mode) & set("wxa+") and isinstance(file, (str, os.PathLike)):
                self.reach("open", file)
            return real(file, mode, *args, **kwargs)

        return call

    def _file(self, name, real, position):
        def call(*args, **kwargs):
            path = args[position]
            if not isinstance(path, (str, os.PathLike)):
                return real(*args, **kwargs)

            def write(place):
                real(*args[:position], place, *args[position + 1 :], **kwargs)

            self.reach(name, path, write)
            return real(*args, **kwargs)

        return call


def _half(write, path):
    """Write a file, and cut it in the middle."""
    descriptor = _DESCRIPTOR_OPEN(path, os.O_WRONLY | os.O_CREAT, 0o644)
    with patch.object(os, "open", _DESCRIPTOR_OPEN), patch.object(io, "open", _OPEN), patch.object(builtins, "open", _OPEN):
        write(path)
    _FTRUNCATE(descriptor, os.fstat(descriptor).st_size // 2)
    os.close(descriptor)


_DESCRIPTOR_OPEN, _OPEN, _FTRUNCATE = os.open, io.open, os.ftruncate
