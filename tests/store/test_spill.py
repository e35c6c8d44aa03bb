"""Blocks of bytes in a file without a name."""

import copy
import gc
import os
import threading

import numpy as np
import pytest
import torch

from kvote.errors import MethodError, StorageError
from kvote.store.spill import Block, Spill, check_folder

SIZE = 48


def content(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, SIZE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def held(spill: Spill, blocks: list[Block]) -> torch.Tensor:
    out = torch.empty(len(blocks), SIZE, dtype=torch.uint8)
    spill.get(np.array([block.number * SIZE for block in blocks]), out)
    return out


def test_what_is_read_is_what_was_written_in_any_order(tmp_path):
    spill, data = Spill(str(tmp_path), SIZE), content(9)
    blocks = spill.put(data[:4]) + spill.put(data[4:])
    order = [3, 3, 0, 1, 2, 8, 5]
    assert torch.equal(held(spill, [blocks[i] for i in order]), data[order])
    assert (spill.written, spill.read) == (9 * SIZE, 7 * SIZE)


def test_the_file_has_no_name(tmp_path):
    spill = Spill(str(tmp_path), SIZE)
    blocks = spill.put(content(2))
    assert list(tmp_path.iterdir()) == []
    assert len(held(spill, blocks)) == 2


def test_places_are_free_once_nobody_holds_them_and_the_end_is_given_back(tmp_path):
    spill = Spill(str(tmp_path), SIZE)
    first, second = spill.put(content(3, 1)), spill.put(content(3, 2))
    copied = copy.deepcopy(first)
    del first
    gc.collect()
    assert spill.nbytes == 6 * SIZE
    del copied
    gc.collect()
    assert spill.nbytes == 3 * SIZE
    again = spill.put(content(2, 3))
    assert sorted(block.number for block in again) == [0, 1]
    assert torch.equal(held(spill, second), content(3, 2))
    del second
    gc.collect()
    spill.trim()
    assert os.fstat(spill.file).st_size == 2 * SIZE
    assert torch.equal(held(spill, again), content(2, 3))


def test_blocks_that_another_thread_lets_go_of_are_free(tmp_path):
    spill = Spill(str(tmp_path), SIZE)
    blocks = [spill.put(content(50))]
    thread = threading.Thread(target=blocks.clear)
    thread.start()
    thread.join()
    assert spill.nbytes == 0


def test_a_full_disk_is_one_error_and_changes_nothing(tmp_path, monkeypatch):
    spill, data = Spill(str(tmp_path), SIZE), content(3)
    blocks = spill.put(data)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"could not be written into .*: No space left on device"):
        spill.put(content(2, 1))
    monkeypatch.undo()
    gc.collect()
    assert spill.nbytes == 3 * SIZE
    assert torch.equal(held(spill, blocks), data)


def test_what_comes_back_in_part_is_never_given(tmp_path):
    spill = Spill(str(tmp_path), SIZE)
    blocks = spill.put(content(4))
    os.ftruncate(spill.file, 3 * SIZE + 1)
    with pytest.raises(StorageError, match="came back in part only"):
        held(spill, blocks)
    assert torch.equal(held(spill, blocks[:3]), content(4)[:3])


def test_a_read_that_fails_says_so(tmp_path, monkeypatch):
    spill = Spill(str(tmp_path), SIZE)
    blocks = spill.put(content(1))

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageError, match=r"cannot be read: .*Input/output error"):
        held(spill, blocks)


def test_short_reads_and_writes_go_on(tmp_path, monkeypatch):
    """As the system may give or take less than was asked for."""
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: read(file, [parts[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:11], at))
    spill = Spill(str(tmp_path), SIZE)
    assert torch.equal(held(spill, spill.put(content(3))), content(3))


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    assert check_folder("offload", str(tmp_path)) == str(tmp_path)
    for folder in (str(tmp_path / "none"), 3):
        with pytest.raises(MethodError, match="is no folder that can be written into"):
            check_folder("offload", folder)


def test_a_system_without_preadv_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "preadv")
    for folder in (None, str(tmp_path)):
        with pytest.raises(MethodError, match="no preadv"):
            check_folder("offload", folder)
