"""Builds the GPU kernels for a GPU that need not be there: every launch compiles down to machine code instead.

    python tests/kernels/building.py 90      # compute capability 9.0; prints a line per kernel, fails where one fails

Triton carries NVIDIA's assembler, so this shows that a kernel compiles, how much shared memory it takes and whether it
spills registers; what it computes is shown by its interpreter, and how fast it is only by a GPU.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kvote.kernels.lanes import Lanes
from kvote.kernels.packing import Packing
from kvote.kernels.triton import common

# Shared memory that a program may have, by compute capability.
SHARED = {80: 166_912, 86: 101_376, 90: 232_448}


class Builder:
    """Stands in for launches. ``built`` holds (kernel, types, shared bytes, spilled bytes, registers)."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.backend = make_backend(self.target)
        self.built: list[tuple[str, str, int, int, int]] = []
        self._known: set[str] = set()

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs["debug"] = False
        binder = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(
            self.backend, kwargs, bound, specialization, options
        )
        name = f"{kernel.__name__} {sorted(signature.items())} {sorted(constants.items())} {sorted(attributes.items())}"
        if name in self._known:
            return
        self._known.add(name)
        source = ASTSource(kernel, signature, constants, attributes)
        made = triton.compile(source, target=self.target, options=options.__dict__)
        types = " ".join(sorted({v for v in signature.values() if v.startswith("*")}))
        registers, spilled = self._resources(made.asm["ptx"])
        self.built.append((kernel.__name__, types, made.metadata.shared, spilled, registers))

    def _resources(self, ptx: str) -> tuple[int, int]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ptx"
            path.write_text(ptx)
            arch = f"sm_{self.target.arch}{'a' if self.target.arch >= 90 else ''}"
            command = [get_ptxas(self.target.arch).path, "-v", f"--gpu-name={arch}", str(path), "-o", f"{path}.cubin"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
        return int(re.findall(r"Used (\d+) registers", said)[0]), spills


def calls(dtype: torch.dtype, dim: int, groups: int) -> None:
    """One call of every kernel."""
    from kvote.kernels import triton as ours

    heads, n, sequences = 2, 640, 2
    keys = torch.zeros(40, 64, dim, dtype=dtype)
    lanes = Lanes([[(10 * i, 10)] for i in range(sequences * heads)])
    query = torch.zeros(sequences, heads * groups, dim, dtype=dtype)
    index = torch.arange(96).expand(sequences, -1).contiguous()
    angles = torch.zeros(96, dim // 2), torch.zeros(96, dim // 2)
    attention: dict[str, Any] = {"scale": 0.1, "softcap": None}
    ours.decode(query, keys, keys, lanes, range(n), angles=None, interleaved=False, **attention)
    stops = torch.tensor([100, 640], dtype=torch.int32)
    ours.decode(query, keys, keys, lanes, range(n), angles=None, interleaved=False, stops=stops, **attention)
    ours.decode(query, keys, keys, lanes, index, angles=angles, interleaved=False, **attention)
    scoring = torch.zeros(sequences, heads * groups, 1, dim)
    for bits in (0, 8, 4):
        sketch = torch.zeros(40, ours.sketch_bytes(dim, bits), dtype=torch.uint8) if bits else None
        if sketch is not None:
            ours.sketch(keys, sketch, bits, lanes, 0, n)
        skip = torch.zeros(sequences, dtype=torch.bool)
        ours.votes(scoring.expand(-1, -1, 9, -1), keys, lanes, sketch, bits, 5, [600] * 9)
        ours.select(scoring, keys, lanes, sketch, bits, 5, [600], 16, 64, skip)
    rows = torch.zeros(1, 2 * groups, 200, dim, dtype=dtype)
    chunk = keys[:4].reshape(1, 2, 128, dim)
    for options in ({}, {"causal": False}, {"window": 20}):
        ours.attend(rows, chunk, chunk, **attention, **options)
    ours.attend(rows[:, :, :1], chunk, chunk, **attention)
    lse = torch.zeros(sequences, heads * groups, 1)
    ours.attention_mass(query[:, :, None], lse, keys, lanes, 0, [n], **attention)
    outs = (
        torch.zeros(sequences, 1, heads, 96, dim, dtype=dtype),
        torch.zeros(sequences, 1, heads, 96, dim, dtype=dtype),
    )
    labels = torch.zeros(40, max(1, dim // 16), 64, dtype=dtype)
    ours.label_scores(query[:, :, None, : labels.shape[1]], labels, lanes, 5, n)
    ours.gather(keys, keys, lanes, index[:, None], angles, False, outs)
    ours.rotate(outs[0][:, 0], (angles[0][None], angles[1][None]), False)
    positions, new = torch.zeros(40, 64, dtype=torch.int32), torch.zeros(sequences, heads, 1, dim, dtype=dtype)
    at = torch.zeros(sequences, 1, dtype=torch.int64)
    for bits in (0, 8, 4):
        sketch = torch.zeros(40, ours.sketch_bytes(dim, bits), dtype=torch.uint8) if bits else None
        for first in ([n - 1] * 4, [1, 2, 3, 4]):
            ours.append(new, new, at, (keys, keys, positions), lanes, first, sketch, bits)


def packed_calls(dtype: torch.dtype, dim: int, groups: int) -> None:
    """Packed tokens written and read: both forms of keys, ranges that all read and such that end on the device."""
    from kvote.kernels import triton as ours

    heads, sequences = 2, 2
    lanes = Lanes([[(5 * i, 5)] for i in range(sequences * heads)])
    query = torch.zeros(sequences, heads * groups, dim, dtype=dtype)
    raw, stops = torch.zeros(40, 64, dim, dtype=dtype), torch.tensor([100, 640], dtype=torch.int32)
    for bits, group, by_token in ((2, 32, False), (4, 128, False), (4, 32, True), (8, 64, True)):
        forms = Packing(bits, group, dim, dtype, True, by_token), Packing(bits, group, dim, dtype, False)
        keys, values = ((torch.zeros(20, f.page_bytes, dtype=torch.uint8), f, lanes) for f in forms)
        recent = raw, raw, lanes, range(3, 90)
        ours.packed.attend(query, keys, values, range(5, 640), recent=recent, scale=0.1, softcap=None)
        ours.packed.scores(query[:, :, None], keys, range(5, 640))
        for pool, form, _ in (keys, values):
            x = torch.zeros(sequences * heads, 128, dim, dtype=dtype)
            for first in ([128] * 4, [0, 128, 256, 384]):
                ours.packed.pack(x, pool, form, lanes, first)
            for tokens in (range(5, 133), torch.zeros(sequences, 128, dtype=torch.int64)):
                ours.packed.unpack(pool, form, lanes, tokens, sequences, x)
    ours.packed.attend(query, keys, values, range(640), stops=stops, scale=0.1, softcap=2.0)


def main(capability: int) -> None:
    builder = Builder(capability)
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *a, **k: builder.run(kernel, *a, **k)),
        mock.patch.object(common, "roomy", return_value=SHARED[capability] >= SHARED[80]),
    ):
        for dtype, dim, groups in (
            (torch.bfloat16, 128, 7),
            (torch.float16, 80, 4),
            (torch.bfloat16, 256, 2),
            (torch.float32, 64, 1),
            (torch.float32, 256, 2),
            (torch.bfloat16, 96, 12),
            (torch.float16, 16, 1),
        ):
            builder.built.clear()
            calls(dtype, dim, groups)
            packed_calls(dtype, dim, groups)
            for name, types, shared, spilled, registers in builder.built:
                print(f"{name} {dtype} {dim}: {shared} shared, {registers} registers, {spilled} spilled; {types}")
                assert shared <= SHARED[capability], f"{name} takes more shared memory than there is"


if __name__ == "__main__":
    main(int(sys.argv[1]))
