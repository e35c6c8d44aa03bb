"""Prefixes on disk: fetched back, bounded, shared by processes, and never a wrong answer."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from test_library import OWN, SHARED, answer, prompt

from kvote import Library

METHODS = ("dense", "tokenselect(top_k=5, sinks=2, window=6, chunk=1, tail=0)", "snapkv(budget=20, window=6)", "kivi")


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


@pytest.mark.parametrize("method", METHODS)
def test_another_library_finds_what_one_has_written(tmp_path, method):
    net = tiny.model()
    with Library(tmp_path) as library:
        library.cache(net, method, prompt(1))
    later = Library(tmp_path)
    hit, reused = later.cache(net, method, prompt(1))
    assert reused == SHARED + OWN
    for _ in range(2):
        got, wanted = answer(net, hit), answer(net, Library().cache(net, method, prompt(1))[0])
        assert torch.equal(got[0], wanted[0])
        assert got[1] == wanted[1]
        hit, reused = later.cache(net, method, prompt(1))
        assert reused == SHARED + OWN
    known = later.statistics
    assert (known.fetched, known.hits, known.on_disk, known.held) == (1, 3, 1, 1)
    assert later.cache(net, method, prompt(2))[1] == (SHARED if method[0] in "dt" else 0)


def test_files_and_folder_are_their_owners_alone(tmp_path):
    with Library(tmp_path / "new" / "folder") as library:
        library.cache(tiny.model(), "dense", prompt(1))
    (file,) = files(tmp_path / "new" / "folder")
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_memory_that_is_short_spills_and_fetches_back(tmp_path):
    net = tiny.model()
    library = Library(tmp_path, memory=1)
    for seed in (1, 2, 1):
        _, reused = library.cache(net, "kivi", prompt(seed))
    known = library.statistics
    assert (reused, known.held, known.on_disk, known.spilled, known.fetched) == (SHARED + OWN, 0, 2, 2, 1)


def test_disk_is_bounded_and_what_was_used_long_ago_goes_first(tmp_path):
    net = tiny.model()
    with Library(tmp_path) as library:
        for seed in (1, 2):
            library.cache(net, "kivi", prompt(seed))
    old, young = files(tmp_path)
    os.utime(old, (1, 1))
    most = int(2.5 * old.stat().st_size)
    with Library(tmp_path, disk=most) as library:
        library.cache(net, "kivi", prompt(3))
    assert len(files(tmp_path)) == 2
    assert not old.exists()
    assert young.exists()
    assert library.statistics.disk_nbytes <= most
    with Library(tmp_path, disk=0) as library:
        library.cache(net, "kivi", prompt(4))
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("what", ["flipped", "cut", "empty", "swapped"])
def test_a_damaged_file_is_read_again_and_removed(tmp_path, what):
    net = tiny.model()
    with Library(tmp_path) as library:
        for seed in (1, 2):
            library.cache(net, "kivi", prompt(seed))
    generator = random.Random(3)
    whole = [file.read_bytes() for file in files(tmp_path)]
    for _ in range(8):
        for file, data in zip(files(tmp_path), whole, strict=True):
            changed = bytearray(data)
            if what == "swapped":
                changed = bytearray(whole[1 - whole.index(data)])
            elif what == "flipped":
                changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            else:
                changed = changed[: 0 if what == "empty" else generator.randrange(len(data))]
            file.write_bytes(changed)
        library = Library(tmp_path)
        for seed in (1, 2):
            got, reused = library.cache(net, "kivi", prompt(seed))
            assert reused == 0
            wanted = Library().cache(net, "kivi", prompt(seed))[0]
            assert torch.equal(answer(net, got)[0], answer(net, wanted)[0])
        assert not files(tmp_path)
        library.close()
        assert len(files(tmp_path)) == 2


def test_other_files_and_fresh_drafts_are_left_alone_and_abandoned_ones_removed(tmp_path):
    for name in ("book.kv", "notes.txt", ".kvote-fresh", ".kvote-old"):
        (tmp_path / name).write_text("mine")
    os.utime(tmp_path / ".kvote-old", (1, 1))
    with Library(tmp_path, disk="1MiB") as library:
        library.cache(tiny.model(), "kivi", prompt(1))
    left = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert left == {"book.kv", "notes.txt", ".kvote-fresh", files(tmp_path)[0].name}


def test_what_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    net, library = tiny.model(), Library(tmp_path, memory=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"A prefix of 70 tokens is not kept: .*No space left on device"):
        cache, _ = library.cache(net, "kivi", prompt(1))
    assert cache.get_seq_length() == SHARED + OWN
    assert not files(tmp_path)
    assert not list(tmp_path.glob(".kvote-*"))


_WORKER = """
import sys
sys.path.insert(0, sys.argv[3])
import tiny, torch
from test_library import answer, prompt
from kvote import Library
net, order, got = tiny.model(), [1, 2, 3, 4], {}
wanted = {seed: answer(net, Library().cache(net, "kivi", prompt(seed))[0])[0] for seed in order}
hits = 0
for turn in range(6):
    # Nothing stays in memory, and not all fits on disk.
    library = Library(sys.argv[1], memory=1, disk=int(sys.argv[2]))
    for seed in order if turn % 2 else reversed(order):
        cache, reused = library.cache(net, "kivi", prompt(seed))
        assert torch.equal(answer(net, cache)[0], wanted[seed]), seed
        hits += reused > 0
print(hits)
"""


def test_two_processes_share_a_folder(tmp_path):
    net = tiny.model()
    with Library(tmp_path) as library:
        library.cache(net, "kivi", prompt(1))
    (first,) = files(tmp_path)
    most, here = int(3.5 * first.stat().st_size), Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(here)!r})\n{_WORKER}"
    command = [sys.executable, "-c", code, str(tmp_path), str(most), str(here.parent)]
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1])}
    begin = time.monotonic()
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    ended = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], [error[-2000:] for _, error in ended]
    # One finds at least what both have written.
    assert sum(int(out) for out, _ in ended) > 12
    assert sum(file.stat().st_size for file in files(tmp_path)) <= most
    assert not list(tmp_path.glob(".kvote-*"))
    # What they have left is whole.
    library = Library(tmp_path)
    assert sum(library.cache(net, "kivi", prompt(seed))[1] > 0 for seed in range(1, 5)) == len(files(tmp_path)) > 1
    assert time.monotonic() - begin < 300
