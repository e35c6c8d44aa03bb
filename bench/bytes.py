"""The bytes of every method at 32K tokens, three times: by formula, by ``cache.nbytes()``, and by how the process grew.

The formula counts keys, values and positions of what the method says that it keeps, its codes, scales, indexes, sums,
and the memory that an announced prompt sets aside for a question. The model has four layers of four key heads of 128
channels in bfloat16 and next to no weights, so that its cache is what the process grows by. Each method runs in a
process of its own: once to warm up, whose memory is given back, and once to be measured. All but the last tokens are
put into the cache as they are; the last 64 go through the model, and then the prompt is over.

The formula must be within 2% of the buffers, and the growth within 5%.

    python bench/bytes.py
    python bench/bytes.py --methods h2o snapkv --tokens 8192
"""

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import save, table
from subjects import SUBJECTS, MadeUp, Subject, built, known
from transformers import AutoModelForCausalLM, LlamaConfig

import kvote
from kvote.kernels import cpu
from kvote.measure.geometry import Geometry

GEOMETRY = Geometry(heads=4, kv_heads=4, dim=128)
LAYERS = 4
LANES = LAYERS * GEOMETRY.kv_heads
# Tokens of a prompt that go through the model, and tokens for which an announced prompt sets memory aside besides.
_END, _QUESTION = 64, 512
FORMULA_WITHIN, GROWTH_WITHIN = 0.02, 0.05
_DIM = GEOMETRY.dim
# Tokens that a query of tokenselect reads, with those of a chunk: more than 2,048 and not more than 4,096.
_LIST = 4096
# Keys and values of a token in one key head, and its position.
_TOKEN = 2 * 2 * _DIM + 4


def _whole(n: int) -> float:
    return (n + _QUESTION) * _TOKEN


def _quarter(n: int) -> float:
    return n / 4 * _TOKEN


def _angles(tokens: float) -> float:
    """A reader that places tokens side by side has a table of angles for so many, a power of two, in float32; per key
    head of the whole cache."""
    return float((1 << (int(tokens) - 1).bit_length()) * _DIM * 4 / LANES)


def _packed(n: float, bits: int, group: int = 32, residual: int = 128, heads: int = GEOMETRY.kv_heads) -> float:
    """Codes, and two numbers of two bytes per group; the last tokens as they are too. ``heads`` that hold the same
    tokens have their positions once."""
    return n * (2 * _DIM * (bits / 8 + 4 / group) + 4 / heads) + residual * _TOKEN


def _demoted(n: int, bits: int) -> float:
    """A fifth as they are; of the others, ``bits`` of every number, and two numbers for each half of key and value."""
    return n / 5 * (_TOKEN + 4) + 4 * n / 5 * (2 * _DIM * bits / 8 + 4 * 4)


def _low_rank(n: int, keys: int = 512, values: int = 768) -> float:
    """Per key head: its part of what a group of layers shares, and of the blocks that make keys and values of it; the
    positions of a layer once."""
    shared = n * (keys + values) * 2 / LANES
    return shared + (keys + values) * _DIM * 2 + 4 * n / GEOMETRY.kv_heads


def _merged(n: int) -> float:
    """Half of the layers are whole; of two others, keys and values have a direction for both and a size in float32 for
    each, and positions once. Random tokens are the same in all layers, but for the last, so next to none is retained.
    """
    return _whole(n) / 2 + n * (2 * _DIM * 2 / 2 + 2 * 4 + 4 / (2 * GEOMETRY.kv_heads)) / 2


# Bytes per key head after a prompt of n tokens, for the specs of bench/subjects.py.
FORMULAS: dict[str, Callable[[int], float]] = {
    "dense": _whole,
    "random": lambda n: _whole(n) + _angles(_LIST),
    "tokenselect": lambda n: _whole(n) + _angles(_LIST),
    "tokenselect, 8-bit sketch": lambda n: (
        _whole(n) + _angles(_LIST) + (n + _QUESTION) * cpu.sketch_bytes(_DIM, 8) / cpu.SKETCH_TOKENS
    ),
    "tidaldecode": _whole,
    "quest": lambda n: _whole(n) + (n + _QUESTION) * 2 * 2 * _DIM / 16,
    "doublesparsity": lambda n: _whole(n) + (n + _QUESTION) * 2 * _DIM / 4,
    "randomkeep": _quarter,
    # Cut down after every pass, it keeps the room for growth that a text has which nobody announced: an eighth.
    "streamingllm": lambda n: _quarter(n) * 9 / 8 + _angles(n / 4 + 1),
    "snapkv": _quarter,
    "snapkv | tokenselect": lambda n: _quarter(n) + _angles(_LIST),
    "h2o": lambda n: _quarter(n) + n / 4 * 4,
    "adakv": _quarter,
    "expectedattention": _quarter,
    "kvcrush": _quarter,
    "prefixkv": _quarter,
    # Attention and entropy of each token of a layer, and what its latest query answered.
    "critic": lambda n: _quarter(n) + (n / 4 * 8 + GEOMETRY.heads * _DIM * 4) / GEOMETRY.kv_heads,
    "keyformer": lambda n: _quarter(n) + n / 4 * 4,
    "cake": _quarter,
    "ems": lambda n: _quarter(n) + n / 4 * 4,
    # Two of all 16 key heads keep everything, the others a fifth.
    "razorattention": lambda n: (2 * _whole(n) + 14 * max(4000, n / 5) * _TOKEN) / LANES,
    # Half of them stream.
    "duoattention": lambda n: (_whole(n) + 320 * _TOKEN) / 2,
    "kivi": lambda n: _packed(n, 2),
    "kivi, 4 bits": lambda n: _packed(n, 4),
    "kivi | tokenselect": lambda n: _packed(n, 2) + _angles(_LIST),
    "razorattention | kivi": lambda n: (2 * _packed(n, 2, heads=1) + 14 * max(4000, n / 5) * _TOKEN) / LANES,
    "cake | kivi | tokenselect": lambda n: _packed(n / 4, 2) + _angles(_LIST),
    "mikv": lambda n: _demoted(n, 4),
    "mikv, 2 bits": lambda n: _demoted(n, 2),
    "think": lambda n: n * (_TOKEN - 2 * int(0.4 * _DIM)),
    "minicache": _merged,
    "xkv": _low_rank,
    "xkv | tokenselect": lambda n: _low_rank(n) + _angles(_LIST),
}


def resident() -> int:
    """Bytes of this process in memory now (Linux), what nobody uses given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=GEOMETRY.heads,
        num_key_value_heads=GEOMETRY.kv_heads,
        head_dim=GEOMETRY.dim,
        max_position_embeddings=1 << 18,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def filled(model: Any, method: kvote.Method, key: torch.Tensor, value: torch.Tensor) -> kvote.Cache:
    """A cache as after a prompt of as many tokens as ``key`` has."""
    cache, n = kvote.Cache(model, method), key.shape[2]
    cache.expect(n)
    for layer in cache.layers:
        GEOMETRY.begin(layer.layer, key[:, :, : n - _END], value[:, :, : n - _END], n)
    model(input_ids=torch.arange(_END)[None] % 64, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def measure(subject: Subject, tokens: int) -> dict[str, Any]:
    """In a process that has measured nothing else."""
    # Memory of more than 64 KiB is mapped by itself, and goes back when it is freed.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    model = tiny_model()
    method = built(subject.at(tokens), MadeUp(LAYERS, GEOMETRY.heads, GEOMETRY.kv_heads, GEOMETRY.dim, model))
    if isinstance(method, str):
        return {"name": subject.name, "missing": method}
    key, value = GEOMETRY.tokens(tokens)
    filled(model, method, key, value)
    before = resident()
    cache = filled(model, method, key, value)
    grown, held = resident() - before, cache.nbytes()
    report = cache.report().layers
    formula = FORMULAS.get(subject.name)
    return {
        "name": subject.name,
        "spec": subject.at(tokens),
        "tokens": tokens,
        "formula": None if formula is None else round(LANES * formula(tokens)),
        "buffers": held,
        "growth": grown,
        "tokens_held": max(layer.tokens_held for layer in report),
        "dropped": sum(layer.dropped for layer in report),
    }


def faults(point: dict[str, Any]) -> list[str]:
    """What is further apart than it may be."""
    found = []
    for name, within in (("formula", FORMULA_WITHIN), ("growth", GROWTH_WITHIN)):
        if point[name] is not None and abs(point[name] / point["buffers"] - 1) > within:
            found.append(f"{point['name']}: {name} {point[name]:,}, buffers {point['buffers']:,}")
    return found


def in_a_process(name: str, tokens: int) -> dict[str, Any]:
    line = [sys.executable, __file__, "--one", name, "--tokens", str(tokens)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        return {"name": name, "missing": last}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def render(points: list[dict[str, Any]]) -> str:
    """Bytes in MiB, and how far formula and growth are from the buffers."""
    rows = []
    for point in points:
        cells = [f"{point['buffers'] / 2**20:.1f}"]
        for name in ("formula", "growth"):
            off = "" if point[name] is None else f" ({100 * (point[name] / point['buffers'] - 1):+.1f}%)"
            cells.append("" if point[name] is None else f"{point[name] / 2**20:.1f}{off}")
        rows.append([f"`{point['spec']}`".replace("|", "\\|"), *cells])
    return table(["method", "buffers, MiB", "by formula", "growth of the process"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="names as in bench/subjects.py; all by default")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--dry", action="store_true", help="write no results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(next(s for s in SUBJECTS if s.name == options.one), options.tokens)))
        return
    points: list[dict[str, Any]] = []
    wrong: list[str] = []
    for subject in known(options.methods):
        point = in_a_process(subject.name, options.tokens)
        if "missing" in point:
            print(f"{subject.name}: left out, {point['missing']}", flush=True)
            continue
        print(f"{subject.name}: {point['buffers'] / 2**20:.1f} MiB", flush=True)
        points.append(point)
        wrong += faults(point)
    if options.methods is None and not options.dry:
        save("bytes", {"points": points, "faults": wrong})
    print(render(points))
    if wrong:
        raise SystemExit("Too far apart:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
