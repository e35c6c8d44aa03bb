"""``kvote ask --library``: a document that an earlier run has read is not read again."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvote.cli import main
from kvote.saving.block_file import BlockFile

ASK = ["ask", "--tokens", "1024", "--json", "--method", "tokenselect"]


def asked(capsys: Any, *more: str) -> Any:
    main([*ASK, *more])
    return json.loads(capsys.readouterr().out)["runs"][0]


def test_a_second_run_answers_alike_and_reads_nothing(capsys, tmp_path):
    first = asked(capsys, "--library", str(tmp_path / "read"))
    (file,) = (tmp_path / "read").glob("*.kv")
    os.utime(file, (1, 1))
    second, alone = asked(capsys, "--library", str(tmp_path / "read")), asked(capsys)
    assert first["answer"] == second["answer"] == alone["answer"]
    # That it was fetched is noted at the file.
    assert file.stat().st_mtime > 1
    assert list((tmp_path / "read").glob("*.kv")) == [file]
    with BlockFile(file) as held:
        assert held.facts["tokens"] > 1000


@pytest.mark.parametrize("more", [["--question-first"], ["--load", "book.kv"]])
def test_what_goes_without_a_library_is_refused(capsys, more):
    assert main([*ASK, "--library", "read", *more]) == 2
    assert "--library serves documents that are read by themselves" in capsys.readouterr().err
    assert not Path("read").exists()
