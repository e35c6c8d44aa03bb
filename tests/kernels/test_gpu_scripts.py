"""The GPU bench and the build of GPU kernels, as far as they run without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_gpu import runs

ROOT = Path(__file__).parents[2]
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "KVOTE_BACKEND")}
    return subprocess.run(
        [sys.executable, *command],
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@runs
@pytest.mark.slow
def test_the_bench_runs_through_in_the_interpreter():
    done = run("bench/gpu.py", "--interpret")
    assert done.returncode == 0, done.stderr
    for part in ("b chunk", "c step, batch 1", "d kernel", "e model"):
        assert f"| {part}" in done.stdout
    # Interpreted, nothing is timed, and no figure may look as if it were.
    assert "x |" not in done.stdout
    assert "% |" not in done.stdout


# Stands in for what is measured: one part fails half way, another does not.
FAILING = """
import sys
sys.argv, sys.path[:0] = ["gpu.py", "--interpret"], ["bench"]
import gpu, gpu_model, gpu_work

def halfway(*given):
    yield gpu.row("b chunk", "128", "before", None, None)
    raise RuntimeError("too little memory")

gpu.chunk_rows = halfway
gpu_work.check = lambda work: {"votes": 0.0}
gpu_model.model_rows = lambda *given: [gpu.row("e model", "64", "after", None, None)]
sys.exit(gpu.main())
"""


@runs
def test_a_part_of_the_bench_that_fails_costs_no_other_its_figures():
    done = run("-c", FAILING)
    assert done.returncode == 1
    assert "| b chunk | 128 | before |" in done.stdout
    assert "| e model | 64 | after |" in done.stdout
    assert done.stderr.strip().endswith("128 tokens, batch 1 failed: RuntimeError: too little memory")


@without_a_gpu
def test_the_bench_says_that_there_is_no_gpu():
    done = run("bench/gpu.py")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("There is nothing to measure here: ")


@runs
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "86", "90"])
def test_every_kernel_compiles_for_a_gpu(capability):
    """Down to machine code, with Triton's own assembler; no GPU is needed, only minutes."""
    done = run("tests/kernels/building.py", capability)
    assert done.returncode == 0, done.stderr
    for kernel in (
        "_decode",
        "_score",
        "_weigh",
        "_attend",
        "_append",
        "_gather",
        "_turn",
        "_mass",
        "_sketch",
        "_merge",
        "_packed_attend",
        "_packed_scores",
        "_pack_groups",
        "_pack_tokens",
        "_unpack",
        "_label_scores",
    ):
        assert f"{kernel} " in done.stdout
