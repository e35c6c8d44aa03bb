"""Prefixes that sequences share are read once for all of them (Hydragen: Juravsky, Brown et al., arXiv 2402.05099).

Sequences share the pages of what they began with. The queries of those that do are the rows of one product with its
keys; what each holds alone is read as ever, and the answers are merged by their log-sum-exp. Prefixes may branch: the
levels of a tree are read one after the other, from the root to the leaves.
"""

from torch import Tensor

from kvote import kernels
from kvote.read.tokens import TokenSet
from kvote.store.answers import answers
from kvote.store.pages import Lane, PagePool
from kvote.store.raw_tokens import RawTokens
from kvote.store.segment import Logits

Answer = tuple[Tensor, Tensor]
# Rows of a batch, by their place in it, that all hold the same pages of tokens start to stop.
Level = tuple[list[int], int, int]
# Tokens of a prefix below which reading it once is not worth a call of its own: bench/shared.py.
LEAST = 2048


def _common(lanes: list[Lane], page: int, start: int) -> int:
    """The token up to which all lanes hold the same pages, whole ones, at least ``start``."""
    first, at = lanes[0].page_ids(), start // page
    until = min(lane.length // page for lane in lanes)
    for lane in lanes[1:]:
        other = lane.page_ids()
        same = first[at:until] == other[at:until]
        until = until if same.all() else at + int(same.argmin())
    return max(until * page, start)


def levels(pool: PagePool, lanes: list[list[int]]) -> list[Level]:
    """The prefixes that rows share, ``LEAST`` tokens or more each, outer ones first; ``lanes``: those of each row."""
    found: list[Level] = []

    def look(rows: list[int], start: int) -> None:
        heads = zip(*(lanes[row] for row in rows), strict=True)
        stop = min(_common([pool.lanes[i] for i in head], pool.page, start) for head in heads)
        if stop - start >= LEAST:
            found.append((rows, start, stop))
        else:
            stop = start
        # Where they part: by the page that comes next. What is too short to be shared may still be part of more.
        branches: dict[int, list[int]] = {}
        for row in rows:
            lane = pool.lanes[lanes[row][0]]
            ids, after = lane.page_ids(), _page_after(rows, lanes, pool, stop)
            if len(ids) > after:
                branches.setdefault(int(ids[after]), []).append(row)
        for branch in branches.values():
            if 1 < len(branch) < len(rows):
                look(branch, stop)

    if len(lanes) > 1:
        look(list(range(len(lanes))), 0)
    return found


def _page_after(rows: list[int], lanes: list[list[int]], pool: PagePool, stop: int) -> int:
    """The first page that not all rows hold, from ``stop`` on."""
    return _common([pool.lanes[lanes[row][0]] for row in rows], pool.page, stop) // pool.page


def read_once(segment: RawTokens, query: Tensor, rows: list[int], tokens: TokenSet, logits: Logits) -> Answer | None:
    """What single queries [b, heads, 1, d] read in all that their sequences hold; None where these share no prefix of
    ``LEAST`` tokens, or ``tokens`` are not a range from the first to the last."""
    pool, b = segment.pool, len(query)
    whole = isinstance(tokens.index, range) and tokens.index.start == 0 and tokens.window is None
    if not pool.shares or b == 1 or query.shape[2] > 1 or not whole:
        return None
    lanes = [list(segment._lanes([row])) for row in rows]
    lengths = [pool.lanes[each[0]].length for each in lanes]
    shared = levels(pool, lanes) if len(tokens) == max(lengths) else []
    if not shared:
        return None
    parts: list[tuple[list[int], Answer]] = []
    begins = [0] * b
    for members, start, stop in shared:
        prefix = TokenSet(range(start, stop), causal=False)
        key, value = segment.read([rows[members[0]]], prefix)[:2]
        out, lse = answers(query[members, :, 0].transpose(0, 1)[None], key, value, prefix, logits)
        parts.append((members, (out[0].transpose(0, 1), lse[0].transpose(0, 1))))
        for row in members:
            begins[row] = stop
    for begin in sorted(set(begins)):
        members = [row for row, own in enumerate(begins) if own == begin and lengths[row] > begin]
        if not members:
            continue
        ends = [lengths[row] for row in members for _ in range(segment.heads)]
        answer = segment.kernels.decode(
            query[members, :, 0],
            pool.keys,
            pool.values,
            segment.table([rows[row] for row in members]),
            range(begin, max(ends)),
            angles=None,
            interleaved=False,
            scale=logits.scale,
            softcap=logits.softcap,
            ends=ends if len(set(ends)) > 1 else None,
        )
        parts.append((members, answer))
    out, lse = kernels.merge([_among(b, members, answer) for members, answer in parts])
    return out.to(query.dtype)[:, :, None], lse[:, :, None]


def _among(rows: int, members: list[int], answer: Answer) -> Answer:
    """An answer of some rows as one of all: the others have read nothing."""
    out, lse = (part.float() for part in answer)
    if len(members) == rows:
        return out, lse
    outs, lses = out.new_zeros(rows, *out.shape[1:]), lse.new_full((rows, *lse.shape[1:]), float("-inf"))
    outs[members], lses[members] = out, lse
    return outs, lses
