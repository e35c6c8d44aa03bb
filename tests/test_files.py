"""Files that users name: only regular ones are read or replaced, whole or not at all."""

import os
from pathlib import Path

import pytest

from kvote import InputError
from kvote.files import check_writable, read_regular, write_whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("new")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_a_file_is_read_up_to_a_size(folder):
    assert read_regular(folder / "link", 3) == b"old"
    with pytest.raises(InputError, match="is larger than the 0 MiB that are read"):
        read_regular(folder / "file", 2)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (".", "it is a folder, not a file"),
        ("pipe", "it is a pipe, not a file"),
        ("/dev/zero", "it is a device, not a file"),
        ("gone", "No such file or directory"),
        ("loop", "Too many levels of symbolic links"),
        ("file/more", "Not a directory"),
        ("nul\0", "null byte"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_nothing_else_is_read(folder, name, sentence):
    with pytest.raises(InputError, match=f"^Cannot read .*{sentence}"):
        read_regular(folder / name if name != "\ud800" else name, 100)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (".", "it is a folder"),
        ("pipe", "it is a pipe, not a file"),
        ("/dev/full", "it is a device, not a file"),
        ("loop", "Too many levels of symbolic links"),
        ("gone/new", "there is no folder .*gone"),
        ("file/new", "Not a directory"),
        ("nul\0", "null byte"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_is_no_file_is_not_replaced(folder, name, sentence):
    before = sorted(os.listdir(folder))
    for write in (check_writable, lambda path: write_whole(path, "new")):
        with pytest.raises(InputError, match=f"^Cannot write .*{sentence}"):
            write(folder / name)
    assert sorted(os.listdir(folder)) == before


def test_to_look_whether_it_can_be_written_changes_nothing(folder):
    before = sorted(os.listdir(folder))
    for name in ("file", "link", "dangling", "another"):
        check_writable(folder / name)
    assert sorted(os.listdir(folder)) == before
    assert (folder / "file").read_text() == "old"


def test_a_link_stays_one_and_rights_stay_what_they_are(folder):
    (folder / "file").chmod(0o640)
    write_whole(folder / "link", "new")
    assert (folder / "link").is_symlink()
    assert (folder / "file").read_text() == "new"
    assert (folder / "file").stat().st_mode & 0o777 == 0o640
    write_whole(folder / "dangling", "made")
    assert (folder / "new").read_text() == "made"
