"""Sinks and a sliding window: each query reads the first tokens of the text and the last ones before it."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvote.needs import Keys, Needs
from kvote.read.reader import ReaderDefaults, Reading
from kvote.tokens import Span, TokenSet

# Query rows whose windows are computed together; it bounds the mask, not the result.
_ROWS = 256


@dataclass(frozen=True)
class SinksAndRecent(ReaderDefaults):
    """The last ``window`` tokens (the query's own among them) and the first ``sinks``, at contiguous positions.

    Every query has its own window, however the prompt is cut into passes: the answer does not depend on chunking.
    """

    sinks: int
    window: int

    needs = Needs(keys=Keys.UNROTATED, prompts=True)

    def read(self, reading: Reading) -> Iterator[Span]:
        size = self.sinks + self.window
        reading.activity.tokens_read = min(size, reading.first + reading.count)
        row = 0
        while row < reading.count:
            slot = reading.first + row
            if slot < size:
                stop = min(reading.count, row + size - slot)
                yield Span(row, stop, [TokenSet(range(reading.first + stop), positions="contiguous")])
            else:
                # Some ropes look at the largest position of a list: there, a list must not be longer than a window.
                together = _ROWS if reading.rope is None or reading.rope.fixed else 1
                stop = min(reading.count, row + together)
                yield Span(row, stop, self._sliding(slot, reading.first + stop))
            row = stop

    def _sliding(self, slot: int, stop: int) -> list[TokenSet]:
        recent = range(slot - self.window + 1, stop)
        window = TokenSet(recent, window=self.window, positions="contiguous")
        if not self.sinks:
            return [window]
        # Whatever lies between is gone, so the sinks stand right before the window of each query.
        query_at = self.sinks + self.window - 1
        return [TokenSet(range(self.sinks), causal=False, positions="contiguous", query_at=query_at), window]
