"""Files that users name: what is read, what is replaced, and what is left alone."""

import os
import stat
from pathlib import Path

import pytest

from kvote.errors import InputError
from kvote.files import check_folder, check_writable, read_regular, write_whole


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, and one of everything that is none."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"abc")
    Path("folder").mkdir()
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    os.symlink("/dev/zero", "zero")
    os.symlink("gone/file", "dangling")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("gone", "Cannot read gone: No such file or directory."),
        ("", "Cannot read '': No such file or directory."),
        ("folder", "Cannot read folder: Is a directory."),
        ("fifo", "Cannot read fifo: it is a pipe, not a file."),
        ("zero", "Cannot read zero: it is a device, not a file."),
        ("loop", "Cannot read loop: Too many levels of symbolic links."),
        ("file/x", "Cannot read file/x: Not a directory."),
        ("x" * 300, "File name too long."),
        ("a\0b", "embedded null byte."),
        ("\ud800", "surrogates not allowed."),
    ],
)
def test_only_regular_files_are_read(path, sentence):
    with pytest.raises(InputError) as caught:
        read_regular(path, 10)
    assert str(caught.value).endswith(sentence)


def test_a_file_is_read_up_to_a_size():
    assert read_regular("file", 3) == b"abc"
    with pytest.raises(InputError, match="file is larger than the 0 MiB that are read"):
        read_regular("file", 2)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("gone/x", "there is no folder gone."),
        ("dangling", "there is no folder {}/gone."),
        ("folder", "it is a folder."),
        ("fifo", "it is a pipe, not a file."),
        ("zero", "it is a device, not a file."),
        ("/dev/full", "it is a device, not a file."),
        ("loop", "Too many levels of symbolic links."),
        ("file/x", "there is no folder file."),
        ("x" * 300, "File name too long."),
        ("a\0b", "embedded null byte."),
    ],
)
@pytest.mark.parametrize("use", [check_writable, lambda path: write_whole(path, "new")], ids=["checked", "written"])
def test_only_regular_files_are_replaced(use, path, sentence, tmp_path):
    before = sorted(os.listdir())
    with pytest.raises(InputError) as caught:
        use(path)
    assert (
        str(caught.value) == f"Cannot write {path if path.isprintable() else ascii(path)}: {sentence.format(tmp_path)}"
    )
    assert sorted(os.listdir()) == before


def test_a_check_changes_nothing():
    check_writable("file")
    check_writable("new")
    assert Path("file").read_bytes() == b"abc"
    assert not Path("new").exists()


def test_a_link_stays_and_its_target_is_replaced():
    os.symlink("folder/target", "link")
    write_whole("link", "one")
    write_whole("link", "two")
    assert os.path.islink("link")
    assert Path("folder/target").read_bytes() == b"two"
    assert os.listdir("folder") == ["target"]


def test_the_mode_stays_and_a_new_file_gets_the_usual_one():
    os.chmod("file", 0o640)
    write_whole("file", "x")
    write_whole("new", "x")
    mask = os.umask(0)
    os.umask(mask)
    assert [stat.S_IMODE(os.stat(name).st_mode) for name in ("file", "new")] == [0o640, 0o666 & ~mask]


def test_a_failure_leaves_the_old_file_and_nothing_else(monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(os.listdir())
    with pytest.raises(InputError, match=r"^Cannot write file: No space left on device\.$"):
        write_whole("file", "new")
    assert Path("file").read_bytes() == b"abc"
    assert sorted(os.listdir()) == before


def test_a_folder_is_made_where_there_is_none_and_holds_nothing_but_files():
    check_folder("new/inner")
    assert os.listdir("new/inner") == []
    for name in ("file", "fifo", "loop"):
        with pytest.raises(InputError, match=f"Cannot write {name}: it is not a folder"):
            check_folder(name)
    os.mkfifo("folder/log")
    with pytest.raises(InputError, match=r"Cannot write folder/log: it is a pipe, not a file\."):
        check_folder("folder")
