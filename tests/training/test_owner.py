"""One owner of an output_dir: what is refused, and what is said, before anything is written."""

import errno
import os

import pytest

from axolotl_qtha.files import durable
from axolotl_qtha.training import owner


@pytest.fixture
def folder(tmp_path):
    yield tmp_path / "out"
    owner.give_up(str(tmp_path / "out"))


def refuse(number):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


def test_a_folder_is_taken_and_given_up(folder):
    owner.own(str(folder), None, False)
    assert [path.name for path in folder.iterdir()] == [owner.LOCK]
    owner.own(str(folder), None, False)  # a process may train twice
    owner.give_up(str(folder))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EXDEV])
def test_folders_that_cannot_be_renamed(folder, monkeypatch, number):
    monkeypatch.setattr(durable.os, "rename", refuse(number))
    with pytest.raises(ValueError, match=r"output_dir: .* no save can be made there .*What works"):
        owner.own(str(folder), None, False)


def test_a_disk_that_cannot_flush(folder, monkeypatch, caplog):
    monkeypatch.setattr(durable.os, "fsync", refuse(errno.EINVAL))
    owner.own(str(folder), None, False)
    assert "cannot flush files and folders: what was saved last may be gone after a power cut" in caplog.text


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"output_dir: .* no save can be made there .*What works"):
        owner.own(str(tmp_path / "out"), None, False)
