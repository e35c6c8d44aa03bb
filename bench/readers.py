"""What heads that choose for themselves cost: one layer of an 8B model's shape, its tokens found by labels or by keys.

Times the parts of a decode step of `doublesparsity` (scores of labels, a choice per head, attention to each head's
list) and of a selecting layer of `tidaldecode` (scores of keys instead) beside dense attention, on random tokens, and
says how many different tokens the heads of a key head ask for together.

    python bench/readers.py --tokens 32768
"""

import argparse
from functools import partial
from typing import Any

import torch
from common import save, table

from kvote.index.labels import LabelIndex, Labels
from kvote.kernels import reference
from kvote.measure.clock import Call, alternating
from kvote.read.per_head import winners
from kvote.store.segment import Scaling
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import Queries, TokenSet

HEADS, KV_HEADS, DIM, LABELS, TOP_K = 32, 8, 128, 32, 256


def filled(tokens: int) -> UncompressedSegment:
    """A segment of random tokens in bfloat16, labelled."""
    key, value = (torch.randn(1, KV_HEADS, tokens, DIM).bfloat16() for _ in range(2))
    segment = UncompressedSegment(KV_HEADS, key, DIM, None)
    segment.add_sequences(1)
    segment.append([0], key, value, torch.arange(tokens)[None])
    channels = torch.stack([torch.randperm(DIM)[:LABELS] for _ in range(KV_HEADS)])
    segment.add_index(LabelIndex({0: channels.tolist()}), 0)
    return segment


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    segment, query, logits = filled(tokens), torch.randn(1, HEADS, 1, DIM).bfloat16(), Scaling(DIM**-0.5)
    held = segment.indexes["labels"]
    assert isinstance(held, Labels)
    scores = held.scores(query, [0], 0, tokens)
    key, channels = segment.decode([0], 0, tokens)[0], held.channels
    labels = key.gather(3, channels[None, :, None].expand(-1, -1, tokens, -1))
    asked = query.gather(3, channels.repeat_interleave(HEADS // KV_HEADS, 0)[None, :, None])
    # No figures of wrong answers.
    torch.testing.assert_close(scores, reference.scores(asked, labels), atol=1e-3, rtol=1e-3)
    exact = segment.scores(query, [0], 0, tokens)
    torch.testing.assert_close(exact, reference.scores(query, key), atol=1e-3, rtol=1e-3)
    index = winners(exact, TOP_K)
    parts = {
        "scores of labels": partial(held.scores, query, [0], 0, tokens),
        "scores of keys": partial(segment.scores, query, [0], 0, tokens),
        "choice per head": partial(winners, scores, TOP_K),
        "attention to lists": partial(segment.attend, Queries(query), [0], TokenSet(index, causal=False), logits),
        "dense attention": partial(segment.attend, Queries(query), [0], TokenSet(range(tokens), causal=False), logits),
    }
    timings = alternating({name: Call(run) for name, run in parts.items()}, rounds, seconds=0.1)
    # The shortest: what else runs on a machine slows down most what reads most memory.
    taken = {name: timing.shortest for name, timing in timings.items()}
    groups = index[0, :, 0].reshape(KV_HEADS, -1)
    union = sum(len(set(group.tolist())) for group in groups) / KV_HEADS
    step = taken["scores of labels"] + taken["choice per head"] + taken["attention to lists"]
    return {
        "tokens": tokens,
        "milliseconds": {name: round(1e3 * t, 4) for name, t in taken.items()},
        "median": {name: round(1e3 * timing.seconds, 4) for name, timing in timings.items()},
        "label_bytes_per_token_and_key_head": LABELS * key.element_size(),
        "key_and_value_bytes": 2 * DIM * key.element_size(),
        "tokens_per_head": TOP_K,
        "tokens_per_key_head": union,
        "keys_over_labels": round(taken["scores of keys"] / taken["scores of labels"], 2),
        "dense_over_doublesparsity": round(taken["dense attention"] / step, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        result = measure(args.tokens, args.rounds)
    print(table(["part", "ms"], [[name, f"{ms:.3f}"] for name, ms in result["milliseconds"].items()]))
    print(f"scores of keys / scores of labels: {result['keys_over_labels']}")
    print(f"dense attention / doublesparsity: {result['dense_over_doublesparsity']}")
    print(f"tokens per head {TOP_K}, of all heads of a key head together {result['tokens_per_key_head']:.0f}")
    print(save(f"readers-{args.tokens}", result))


if __name__ == "__main__":
    main()
