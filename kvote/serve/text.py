"""Text as it comes: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextStream:
    """Turns a row's tokens into text. What a stop string may begin with is held back until it is decided."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = stops
        self._held = ""
        self.stopped = False

    def put(self, token: int) -> str:
        """The text that is certain after ``token``. Sets ``stopped`` at a stop string, which is not given out."""
        self._held += self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found))
        return self._give(len(self._held) - max((_begun(self._held, stop) for stop in self._stops), default=0))

    def end(self) -> str:
        """The text that was held back."""
        return "" if self.stopped else self._give(len(self._held))

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        return given


def _begun(text: str, stop: str) -> int:
    """How many last characters of ``text`` are the first ones of ``stop``."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
