"""KVzip: query-agnostic KV cache compression with context reconstruction (Kim et al., NeurIPS 2025)."""

from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.repeated import ReadAgain
from kvote.method import Method, published


@published(rooms="keep", source="Kim et al. 2025, arXiv 2505.23416", needs="the prompt read again (kvote.read_again)")
def kvzip(budget: int | float | str = 0.3, sinks: int = 4, chunk: int = 2000, per_head: bool = True) -> Method:
    """Keeps what the model looks at when it repeats the prompt, whatever will be asked; what is generated stays.

    Once a prompt has ended, ``kvote.read_again(model, cache, ids)`` feeds it once more, ``chunk`` tokens at a time,
    each behind an instruction to repeat it, and forgets each repeat afterwards; a ``Document`` does that by itself. A
    token is worth the largest weight that any query of its repeat gives it, in any query head of its key head, in a
    softmax over the ``sinks`` first tokens, the chunk, and the repeat as far as it has come. Those of the largest worth
    stay, besides the sinks. It is done once: later turns and generated tokens come on top and stay. Reading a prompt
    again takes at least as long as reading it.

    A prompt above the budget that was not read again is refused at the next pass; nothing is dropped before.

    ``budget``: tokens kept, sinks among them, as a number (1024), a fraction of the tokens seen (0.25) or bytes
    ("512MiB"; what is generated comes on top). ``per_head``: every key head keeps its own tokens; with False all keep
    the same, by the sum over heads, which readers such as ``tokenselect`` need.

    Differs from the published code: every key head of every layer keeps as many tokens (the code's uniform mode; its
    main one has one threshold over all heads and layers); the sinks are the first tokens and not a whole system prompt;
    the newest token always stays; the softmax is taken in float32, without learned sinks; the words of the instruction
    are kvote's. Missing: head scores that serve any text, and the variant that weighs by what values contribute.
    """
    score = ReadAgain(echo=chunk, sinks=sinks, per_head=per_head)
    return Method(keep=Evict(score, read_budget(budget), sinks=sinks, evict_generated=False))
