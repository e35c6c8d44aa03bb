"""A batch of prompts of unlike lengths: how much less time does it take to read without its padding?

One run: prompts of 10 to 1,000 random tokens, drawn evenly or evenly on a logarithmic scale, are read into a cache
padded, and by ``kvote.prefill``, in turn; medians. The padded pass leaves out the last column too. Both caches must go
on with logits that agree.

    python bench/prepacking.py --rows 16 --rounds 5 [--model model.gguf]
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from common import load_embedded, save, table
from torch import Tensor

import kvote


def batch(lengths: list[int], vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random prompts [rows, columns], padded on the left, and their mask."""
    draw, columns = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(5, vocabulary, (len(lengths), columns), generator=draw)
    mask = (torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def padded(model: Any, cache: kvote.Cache, ids: Tensor, mask: Tensor) -> None:
    """All but the last column, as ``generate()`` would read them."""
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache.expect(ids.shape[1])
    given = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": places[:, :-1]}
    model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)


def last(model: Any, cache: kvote.Cache, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits with which every answer begins."""
    at = mask.sum(dim=1, keepdim=True) - 1
    given = {"input_ids": ids[:, -1:], "attention_mask": mask, "position_ids": at}
    logits: Tensor = model(**given, past_key_values=cache, use_cache=True).logits
    return logits


def drawn(rows: int, spread: str) -> list[int]:
    """Lengths from 10 to 1,000."""
    at = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    lengths = 10 + 990 * at if spread == "even" else 10 * 100**at
    return [int(n) for n in lengths]


def compared(model: Any, spec: str, ids: Tensor, mask: Tensor, rounds: int) -> dict[str, float]:
    """Seconds of both ways in turn. Ends the run where logits differ."""
    times: dict[str, list[float]] = {"padded": [], "packed": []}
    ends = {}
    for _ in range(rounds + 1):
        for name, read in (("padded", padded), ("packed", kvote.prefill)):
            cache = kvote.Cache(model, spec)
            begin = time.perf_counter()
            read(model, cache, ids, mask)
            times[name].append(time.perf_counter() - begin)
            ends[name] = last(model, cache, ids, mask)
    # The first of each warms up.
    seconds = {name: median(each[1:]) for name, each in times.items()}
    apart = float((ends["padded"] - ends["packed"]).abs().max())
    if apart > 1e-2:
        raise SystemExit(f"{spec}: logits differ by {apart}")
    return {**seconds, "ratio": seconds["padded"] / seconds["packed"], "apart": apart}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local folder or a GGUF file (default: the embedded model)")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["dense", "snapkv(budget=256)", "tokenselect(top_k=256)"])
    options = parser.parse_args()
    if options.model:
        from kvote.cli.load import load

        model = load(options.model, dtype="float32").model
    else:
        model, _ = load_embedded()
    results = []
    for spread in ("even", "logarithmic"):
        lengths = drawn(options.rows, spread)
        ids, mask = batch(lengths, model.config.vocab_size, seed=2)
        for spec in options.methods:
            measured = compared(model, spec, ids, mask, options.rounds)
            slots = {"tokens": sum(lengths), "padded_tokens": len(lengths) * max(lengths)}
            results.append({"spread": spread, "method": spec, **slots, **measured})
    cells = []
    for r in results:
        counts = [f"{r[name]:,}" for name in ("tokens", "padded_tokens")]
        seconds = [f"{r[name]:.2f}" for name in ("padded", "packed")]
        cells.append([f"{r['spread']}, {r['method']}", *counts, *seconds, f"{r['ratio']:.2f}x"])
    print(table(["lengths, method", "tokens", "with padding", "padded s", "packed s", "ratio"], cells))
    save("prepacking", {"rounds": options.rounds, "rows": options.rows, "results": results})


if __name__ == "__main__":
    main()
