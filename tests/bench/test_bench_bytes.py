"""Bytes by formula, by buffers and by growth of the process: on few tokens, and in full where there is time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def _run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCH / "bytes.py"), *argv], capture_output=True, text=True, timeout=3000
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells the growth of a process on Linux only")
def test_one_method_in_a_process_of_its_own():
    done = _run("--one", "snapkv", "--tokens", "8192")
    assert done.returncode == 0, done.stderr
    point = json.loads(done.stdout.splitlines()[-1])
    assert point["dropped"] == 4 * 4 * (8192 - 2048) / 4
    assert point["formula"] == pytest.approx(point["buffers"], rel=0.02)
    assert point["growth"] == pytest.approx(point["buffers"], rel=0.1)


def test_what_is_too_far_apart_is_a_fault():
    from bytes import faults

    point = {"name": "x", "formula": 103, "buffers": 100, "growth": 104}
    assert faults(point) == ["x: formula 103, buffers 100"]
    assert faults({**point, "formula": None, "growth": 94}) == ["x: growth 94, buffers 100"]


@pytest.mark.slow
def test_every_method_holds_what_it_says_at_32k_tokens():
    done = _run("--tokens", "32768", "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
