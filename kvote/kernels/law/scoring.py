"""Scores, soft votes and the tokens that win them."""

from torch import Tensor

from kvote.kernels import checks, reference
from kvote.kernels.dense import winners_within
from kvote.kernels.lanes import PAGE, Lanes
from kvote.kernels.law.pages import ranged, table

SKETCH_TOKENS = PAGE


def scores(query: Tensor, keys: Tensor, lanes: Lanes, start: int, stop: int) -> Tensor:
    """q.k [b, r, heads, stop - start] of ``query`` [b, heads, r, d] with a pool of keys [pages, PAGE, d]."""
    checks.scoring(query, keys, keys.shape[2], lanes, start, stop)
    return reference.scores(query, ranged(keys, lanes, len(query), start, stop))


def label_scores(query: Tensor, labels: Tensor, lanes: Lanes, start: int, stop: int) -> Tensor:
    """The same from a pool of labels [pages, c, PAGE], channels before tokens."""
    checks.scoring(query, labels, labels.shape[1], lanes, start, stop)
    first = start // PAGE
    pages = labels[table(lanes, labels.device)[:, first : -(-stop // PAGE)]].transpose(2, 3)
    held = pages.reshape(len(query), -1, pages.shape[1] * PAGE, labels.shape[1])
    return reference.scores(query, held[:, :, start - first * PAGE : stop - first * PAGE])


def votes(
    query: Tensor, keys: Tensor, lanes: Lanes, sketch: Tensor | None, bits: int, start: int, limits: list[int]
) -> Tensor:
    """Soft votes [b, r, n] for tokens ``start`` to ``max(limits)`` of ``query`` [b, heads, r, d]; [r, n] of ``query``
    [heads, r, d]."""
    checks.check(sketch is None, "the law keeps no sketches")
    checks.pool_of_keys(keys, query.shape[-1])
    stop = checks.limits_of(limits, query.shape[-2], start)
    alone = query.dim() == 3
    logits = scores(query[None] if alone else query, keys, lanes, start, stop)
    counted = reference.votes_within(logits, start, limits)
    return counted[0] if alone else counted


def select(
    query: Tensor,
    keys: Tensor,
    lanes: Lanes,
    sketch: Tensor | None,
    bits: int,
    start: int,
    limits: list[int],
    k: int,
    nominate: int = 0,
    skip: Tensor | None = None,
) -> Tensor:
    """The ``k`` tokens [b, r, k] with the most ``votes``, ascending; arguments as there. Everybody is answered, also
    who is to ``skip``."""
    checks.winners_of(k, start, limits)
    counted = votes(query, keys, lanes, sketch, bits, start, limits)
    won = winners_within(counted if counted.dim() == 3 else counted[None], start, limits, k)
    return won.view(*counted.shape[:-1], k)


def sketch_bytes(dim: int, bits: int) -> int:
    """0: the law keeps no sketches."""
    return 0


def sketch(keys: Tensor, sketch: Tensor, bits: int, lanes: Lanes, start: int, stop: int) -> None:
    """Raises ValueError: the law keeps no sketches."""
    checks.check(False, "the law keeps no sketches")
