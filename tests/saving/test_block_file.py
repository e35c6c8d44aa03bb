"""The file format: every byte of it is covered, and nothing in it is believed."""

import hashlib
import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from kvote.errors import InputError
from kvote.saving import block_file
from kvote.saving.block_file import BlockFile, DamagedFileError, write
from kvote.state import Block, same_bits

TENSORS = {
    "keys": torch.arange(12.0).reshape(3, 4).to(torch.bfloat16),
    "eight bits": torch.arange(5.0).to(torch.float8_e4m3fn),
    "none": torch.empty(0, 3),
    "seen": torch.tensor([True, False]),
    "bytes": torch.arange(33, dtype=torch.uint8),
}
FACTS = {"kind": "cache", "tokens": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "file.kv", FACTS, blocks(TENSORS))
    return tmp_path / "file.kv"


def blocks(tensors: dict[str, torch.Tensor]) -> dict[str, Block]:
    return {name: Block(tuple(x.shape), x.dtype, lambda x=x: x) for name, x in tensors.items()}


def sealed(header: Any, data: bytes = b"") -> bytes:
    """A file with any header and a digest that fits it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = struct.pack("<Q", len(text)) + text
    return head + data + hashlib.sha256(head).digest()


def told(version: str = "1", **more: Any) -> dict[str, Any]:
    return {"format": "kvote", "version": version, "facts": "{}", "sha256": "{}", **more}


SEAL = {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}


def test_what_was_written_is_read(path):
    with BlockFile(path) as file:
        read = file.tensors()
        assert file.facts == FACTS
    assert read.keys() == TENSORS.keys()
    assert all(read[name].dtype == x.dtype and same_bits(read[name], x) for name, x in TENSORS.items())


def test_it_is_a_safetensors_file(path):
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["facts"]) == FACTS
        assert torch.equal(file.get_tensor("keys"), TENSORS["keys"])


def test_only_its_owner_may_read_it(path):
    os.chmod(path, 0o644)
    write(path, FACTS, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_every_flipped_byte_is_refused(path):
    whole, found = path.read_bytes(), 0
    with path.open("r+b") as file:
        for at, byte in enumerate(whole):
            for flip in (1, 0x80, 0xFF):
                os.pwrite(file.fileno(), bytes([byte ^ flip]), at)
                with pytest.raises(DamagedFileError):
                    touch(path)
                found += 1
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert found == 3 * len(whole) > 1500
    touch(path)


def test_every_truncation_is_refused(path):
    whole = path.read_bytes()
    for size in reversed(range(len(whole))):
        os.truncate(path, size)
        with pytest.raises(DamagedFileError):
            touch(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DamagedFileError):
        touch(path)


def touch(path: Path) -> None:
    with BlockFile(path) as file:
        file.check()


def test_a_file_cut_or_rewritten_after_it_was_opened_is_an_error(path):
    with BlockFile(path) as file:
        whole = path.read_bytes()
        os.truncate(path, len(whole) - 40)
        with pytest.raises(DamagedFileError, match="has become shorter"):
            file.check()
        path.write_bytes(whole.replace(bytes(range(33)), bytes(33)))
        with pytest.raises(DamagedFileError, match="bytes of its block 'bytes' have changed"):
            file.check()


HUGE = {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}
LIES = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "no object": [],
    "deep": b"[" * 100_000,
    "no metadata": {"digest": SEAL},
    "metadata of numbers": {"__metadata__": told(facts=3), "digest": SEAL},
    "no facts": {"__metadata__": told(facts="3"), "digest": SEAL},
    "a key twice": {"__metadata__": told(facts='{"a":1,"a":2}'), "digest": SEAL},
    "NaN": {"__metadata__": told(facts='{"a":NaN}'), "digest": SEAL},
    "no digest": {"__metadata__": told()},
    "a block without a digest": {"__metadata__": told(), "x": SEAL, "digest": SEAL},
    "a huge block": {"__metadata__": told(sha256='{"x":"0"}'), "x": HUGE, "digest": SEAL},
    "a negative block": {"__metadata__": told(sha256='{"x":"0"}'), "x": {**HUGE, "shape": [-1]}, "digest": SEAL},
    "a block of an unknown dtype": {
        "__metadata__": told(sha256='{"x":"0"}'),
        "x": {**SEAL, "dtype": "X"},
        "digest": SEAL,
    },
    "a fractional shape": {"__metadata__": told(sha256='{"x":"0"}'), "x": {**SEAL, "shape": [3.5]}, "digest": SEAL},
    "blocks over each other": {"__metadata__": told(sha256='{"x":"0"}'), "x": SEAL, "digest": SEAL},
    "a gap": {"__metadata__": told(), "digest": {**SEAL, "data_offsets": [8, 40]}},
    "another format": {"__metadata__": {**told(), "format": "pt"}, "digest": SEAL},
}


@pytest.mark.parametrize("header", LIES.values(), ids=LIES)
def test_a_lying_header_is_refused(tmp_path, header):
    (tmp_path / "lie").write_bytes(sealed(header))
    with pytest.raises(DamagedFileError):
        touch(tmp_path / "lie")


def test_a_header_larger_than_the_file_asks_for_no_memory(tmp_path):
    (tmp_path / "lie").write_bytes(struct.pack("<Q", 2**62) + bytes(100))
    with pytest.raises(DamagedFileError, match="header is cut off"):
        touch(tmp_path / "lie")


def test_a_later_version_is_named(tmp_path):
    (tmp_path / "later").write_bytes(sealed({"__metadata__": told("2"), "digest": SEAL}))
    with pytest.raises(InputError, match="of version '2' of the format, and this kvote reads version 1"):
        touch(tmp_path / "later")


@pytest.mark.parametrize("step", ["first block", "last block", "fsync", "replace"])
def test_a_failure_at_any_point_leaves_the_old_file(path, monkeypatch, step):
    old = path.read_bytes()

    def fail(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    own = blocks({"keys": torch.ones(2), "more": torch.ones(2)})
    if "block" in step:
        name = "keys" if step == "first block" else "more"
        own[name] = own[name]._replace(make=fail)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(InputError, match="No space left on device"):
        write(path, {}, own)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_an_interruption_leaves_the_old_file(path):
    def interrupt() -> Any:
        raise KeyboardInterrupt

    old = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write(path, {}, {"keys": Block((2,), torch.float32, interrupt)})
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_a_second_writer_leaves_one_whole_file(path):
    def other() -> torch.Tensor:
        write(path, {"by": "other"}, {})
        return torch.ones(2)

    write(path, {"by": "first"}, {"keys": Block((2,), torch.float32, other)})
    with BlockFile(path) as file:
        file.check()
        assert file.facts == {"by": "first"}


def test_bytes_are_hashed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(block_file, "_PIECE", 7)
    write(tmp_path / "file.kv", FACTS, blocks(TENSORS))
    with BlockFile(tmp_path / "file.kv") as file:
        assert all(same_bits(x, TENSORS[name]) for name, x in file.tensors().items())
