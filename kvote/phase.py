"""Phase: what a forward pass is to the text of one row. Decided here, carried with the pass, asked everywhere else."""

from dataclasses import dataclass, field
from typing import NamedTuple

from kvote.extra_inputs import ExtraInputs
from kvote.marked import Marked
from kvote.prepacked import Prepacked

_DRAFTS = 32


class Phase(NamedTuple):
    """``tail_queries``: how many of the last tokens end a prompt or a turn. ``decode``: a single generated token.
    ``prompt_left``: tokens of the prompt still to come after this pass; negative where the pass goes on behind the
    prompt's end; None where all its tokens are generated ones."""

    tail_queries: int
    decode: bool = False
    prompt_left: int | None = 0


GENERATED_TOKEN = Phase(1, True, None)


@dataclass
class AnnouncedPrompt:
    """The prompt that was announced: the column where it ends (0: none was), and whether a question follows it."""

    end: int = 0
    question_follows: bool = False
    # Spans of the text that have names.
    marked: Marked = field(default_factory=Marked)
    # What the running pass brings beside queries, keys and values, where the method needs it.
    extra_inputs: ExtraInputs | None = None
    # How the running pass lays the prompts of a batch into rows, where it is not as they are.
    prepacked: Prepacked | None = None

    def phase(self, seen: int, t: int, tail: int, *, drafts: bool = False) -> Phase:
        """The phase of the ``t`` columns behind ``seen``. ``tail``: tokens at a prompt's end that select one by one;
        ``drafts``: what comes may be rolled back (assisted decoding).

        Without an announcement, the end of every pass is a prompt's end, unless it is a single token or verifies
        drafts.
        """
        if seen < self.end:
            own = 0 if self.question_follows else tail
            return Phase(max(0, min(t, seen + t - self.end + own)), False, self.end - seen - t)
        if t == 1 and seen:
            return GENERATED_TOKEN
        if not drafts:
            return Phase(t if t == 1 else min(t, tail), t == 1)
        # Assisted decoding verifies drafts as the decode steps they stand for; its first pass has them behind a prompt.
        tail_queries = t if seen else min(t, tail + _DRAFTS)
        return Phase(tail_queries, t == 1, None if seen and t <= _DRAFTS else 0)
