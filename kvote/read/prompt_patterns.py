"""Prompts read in a pattern of columns, diagonals, a window or blocks, head by head."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from kvote import kernels
from kvote.errors import MethodError
from kvote.needs import ANYWHERE, WHOLE, Cuts, Keys, Needs
from kvote.numbers import check_whole
from kvote.read.in_prompts import InPrompts
from kvote.read.patterns import SIZES, Estimate, Pattern
from kvote.read.reader import Reading, everything
from kvote.tokens import Span, TokenSet

_NEEDS = Needs(keys=Keys.ANY, lists=True)


@dataclass(frozen=True)
class PromptPatterns(InPrompts):
    """Parameters as in ``methods/minference.py``, which documents them; ``own``: by layer, the pattern of each query
    head, and ``pattern`` is that of all others."""

    pattern: Pattern
    own: Mapping[int, tuple[Pattern, ...]]
    last: int
    first: int
    nearest: int
    block: int

    def __post_init__(self) -> None:
        check_whole(self, last=1, first=0, nearest=0, block=1)
        for name, size in zip(SIZES[self.pattern.kind], self.pattern.sizes, strict=True):
            least = {"vertical": max(1, self.first), "slash": max(1, self.nearest), "sinks": 0}.get(name, 1)
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise MethodError(f"{name} must be a whole number of at least {least}; got {size!r}.")

    @property
    def own_needs(self) -> Needs:
        # Patterns are those of heads by their places in the layer.
        return replace(_NEEDS, whole_layers=bool(self.own))

    @property
    def own_cuts(self) -> Cuts:
        return ANYWHERE if self.pattern.kind == "a_shape" and not self.own else WHOLE

    def patterns(self, layer: int, heads: int) -> dict[Pattern, list[int]]:
        """The heads of a layer that have each pattern. Raises MethodError if their number is not that calibrated."""
        each = self.own.get(layer, (self.pattern,) * heads)
        if len(each) != heads:
            raise MethodError(f"Layer {layer} has {heads} query heads, and patterns are known of {len(each)}.")
        return {pattern: [i for i in range(heads) if each[i] == pattern] for pattern in dict.fromkeys(each)}

    def read_prompt(self, reading: Reading, count: int) -> Iterator[Span]:
        n, heads = reading.first + count, reading.queries.rotated.shape[1]
        patterns = self.patterns(reading.layer, heads)
        if all(pattern.covers(n, self.block) for pattern in patterns):
            part = reading if count == reading.count else replace(reading, queries=reading.queries.rows(0, count))
            yield everything(part)
            return
        reading.activity.selections += len(reading.rows)
        estimate = Estimate(reading, count, self.last, self.first, self.nearest, self.block)
        row = 0
        while row < count:
            slot = reading.first + row
            start = slot - slot % self.block
            stop = min(count, row + self.block - slot % self.block)
            # The block itself is read whole, so every row sees its diagonal.
            near = TokenSet(range(start, reading.first + stop), causal=stop - row > 1)
            far = self._far(estimate, patterns, start, row, stop)
            reading.activity.tokens_read = len(near) + sum(map(len, far))
            yield Span(row, stop, [*far, near])
            row = stop

    @staticmethod
    def _far(estimate: Estimate, patterns: dict[Pattern, list[int]], start: int, row: int, stop: int) -> list[TokenSet]:
        """What query rows ``row`` to ``stop`` read before slot ``start``, where their block begins."""
        if start == 0:
            return []
        heads = sum(map(len, patterns.values()))
        worth = torch.empty(len(estimate.reading.rows), heads, start, device=estimate.reading.segment.device)
        for pattern, own in patterns.items():
            worth[:, own] = estimate.worth(pattern, own, start, row, stop)
        # Lists are equally long, so a head that has fewer is filled up with what comes nearest.
        most = int(worth.isposinf().sum(-1).max())
        if most == start:
            return [TokenSet(range(start), causal=False)]
        return [TokenSet(kernels.top_k(worth, most)[:, :, None], causal=False)] if most else []
