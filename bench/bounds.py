"""Would bounds on pages let TokenSelect skip the sketches of most pages, and still find the same winners?

For every page, its smallest and largest key per channel (box) or its mean key and the largest distance from it (ball)
bound each head's score, and so the votes of all its tokens. A page may be skipped if that bound stays below the votes
of the last winner. Here both that threshold and the log-sum-exp of every head are known beforehand, which no real
kernel can do: what is skipped here is the most that could be. Same documents and queries as recall.py.

    python bench/bounds.py --tokens 65536
"""

import argparse
from collections import defaultdict
from statistics import mean
from typing import Any

from common import load_embedded, save, table
from recall import TOP_K, Heard, listen
from torch import Tensor

PAGES = [16, 32, 64]
EVERY = 5  # of the queries heard, one in so many is looked at


def upper(query: Tensor, pages: Tensor) -> dict[str, Tensor]:
    """Bounds [h, g, p] on the scores of ``query`` [h, g, d] with the keys ``pages`` [h, p, tokens, d]."""
    low, high, centre = pages.amin(dim=2), pages.amax(dim=2), pages.mean(dim=2)
    radius = (pages - centre[:, :, None]).norm(dim=-1).amax(dim=-1)
    box = query.clamp(min=0) @ high.transpose(1, 2) + query.clamp(max=0) @ low.transpose(1, 2)
    ball = query @ centre.transpose(1, 2) + query.norm(dim=-1, keepdim=True) * radius[:, None]
    return {"box": box, "ball": ball}


def study(key: Tensor, heard: list[Heard], sinks: int) -> dict[tuple[Any, ...], list[float]]:
    """Shares of pages by (what, page, top_k), and by (loose or short, page) how far, in nats, a bound lies above the
    best score of its page and the best votes of a page below the threshold (medians; top_k is the middle one)."""
    found = defaultdict(list)
    for query, edge in heard[::EVERY]:
        end = edge // max(PAGES) * max(PAGES)
        grouped = query.reshape(len(key), -1, query.shape[-1])
        scores = grouped @ key[:, :end].transpose(1, 2)
        scores[..., :sinks] = float("-inf")
        total = scores.logsumexp(dim=-1, keepdim=True)
        votes = (scores - total).flatten(0, 1).logsumexp(dim=0)  # logarithms of votes: many are too small for float32
        thresholds = {k: votes.topk(k).values[-1] for k in TOP_K}
        for page in PAGES:
            bounds = upper(grouped, key[:, :end].unflatten(1, (-1, page)))
            best = votes.unflatten(0, (-1, page)).amax(dim=-1)
            best_scores = scores.unflatten(-1, (-1, page)).amax(dim=-1)
            found["loose", page].append(float((bounds["box"] - best_scores)[..., 1:].median()))
            found["short", page].append(float((thresholds[TOP_K[1]] - best).median()))
            for k, threshold in thresholds.items():
                found["no winner", page, k].append(float((best < threshold).float().mean()))
                for name, bound in bounds.items():
                    most = (bound - total).clamp(max=0).flatten(0, 1).logsumexp(dim=0)
                    found[name, page, k].append(float((most < threshold).float().mean()))
    return found


def cost(name: str, page: int, dim: int) -> float:
    """Bytes of a page's bounds in half precision, as a share of its 4-bit sketch (codes and one scale per token)."""
    return (4 * dim if name == "box" else 2 * dim + 2) / (page * (dim / 2 + 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--documents", type=int, default=2)
    options = parser.parse_args()
    model, tokenizer = load_embedded()
    found: dict[int, dict[tuple[Any, ...], list[float]]] = {}
    for seed in range(options.documents):
        segments, heard, sinks = listen(model, tokenizer, options.tokens, seed)
        for layer, segment in enumerate(segments):
            key = segment.decode([0], 0, segment.length(0))[0][0].float()
            for what, shares in study(key, heard[layer], sinks).items():
                found.setdefault(layer, defaultdict(list))[what].extend(shares)
    entries, rows = [], []
    for page in PAGES:
        for k in TOP_K:
            none, box, ball = (
                [round(100 * mean(found[layer][name, page, k]), 2) for layer in found]
                for name in ("no winner", "box", "ball")
            )
            entries.append(
                {"page": page, "top_k": k, "no_winner_percent": none, "box_percent": box, "ball_percent": ball}
            )
            rows.append(
                [str(page), f"{k:,}", *(" / ".join(f"{x:.1f}" for x in shares) for shares in (none, box, ball))]
            )
    print("Share of pages in each layer, %")
    print(table(["page", "top_k", "hold no winner", "skipped by box", "skipped by ball"], rows))
    pages = []
    for page in PAGES:
        nats = {what: [round(mean(found[layer][what, page]), 1) for layer in found] for what in ("loose", "short")}
        bytes_ = {f"{name}_bytes_{d}": round(cost(name, page, d), 3) for name in ("box", "ball") for d in (32, 128)}
        pages.append({"page": page, **nats, **bytes_})
        print(f"page of {page}: {pages[-1]}")
    queries = len(found[0]["loose", PAGES[0]])
    save(
        "bounds",
        {
            "tokens": options.tokens,
            "documents": options.documents,
            "queries": queries,
            "skipped": entries,
            "pages": pages,
        },
    )


if __name__ == "__main__":
    main()
