"""All tokens held, as if those that are gone had never been there."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvote.needs import Keys, Needs
from kvote.read.reader import ReaderDefaults, Reading
from kvote.tokens import Span, TokenSet

# Query rows that are answered together; it bounds the mask, not the result.
_ROWS = 256


@dataclass(frozen=True)
class Contiguous(ReaderDefaults):
    """Reads all tokens held at the positions 0, 1, 2, ... in their order."""

    needs = Needs(keys=Keys.UNROTATED)

    def read(self, reading: Reading) -> Iterator[Span]:
        reading.activity.tokens_read = reading.first + reading.count
        # Some ropes look at the largest position of a list: there, no query must see that of a later one.
        together = _ROWS if reading.rope is None or reading.rope.fixed else 1
        for row in range(0, reading.count, together):
            stop = min(reading.count, row + together)
            yield Span(
                row, stop, [TokenSet(range(reading.first + stop), causal=stop - row > 1, positions="contiguous")]
            )
