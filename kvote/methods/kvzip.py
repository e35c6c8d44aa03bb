"""KVzip: query-agnostic KV cache compression with context reconstruction (Kim et al., NeurIPS 2025)."""

from kvote.errors import MethodError
from kvote.keep.allocate.competing_layers import CompetingLayers
from kvote.keep.allocate.over_heads import CompetingHeads
from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.repeat_attention import RepeatAttention
from kvote.method import Method, published


@published(rooms="keep", source="Kim et al. 2025, arXiv 2505.23416", needs="the prompt read again (kvote.read_again)")
def kvzip(
    budget: int | float | str = 0.3, sinks: int = 4, chunk: int = 2000, even: bool = False, per_head: bool = True
) -> Method:
    """Keeps what the model looks at when it repeats the prompt, whatever will be asked; what is generated stays.

    Once a prompt has ended, ``kvote.read_again(model, cache, ids)`` feeds it once more, ``chunk`` tokens at a time,
    each behind an instruction to repeat it, and forgets each repeat afterwards; a ``Document`` does that by itself. A
    token is worth the largest weight that any query of its repeat gives it, in any query head of its key head, in a
    softmax over the ``sinks`` first tokens, the chunk, and the repeat as far as it has come. Besides the sinks, the
    tokens of all key heads of all layers compete for one budget. It is done once: later turns and generated tokens come
    on top and stay. Reading a prompt again takes longer than reading it.

    A prompt above the budget that was not read again is refused at the next pass; nothing is dropped before.

    ``budget``: tokens kept per key head and layer on average, sinks among them, as a number (1024), a fraction of the
    tokens seen (0.25) or bytes ("512MiB"; what is generated comes on top). ``even``: every key head of every layer
    keeps as many, as in the published code's uniform mode. ``per_head``: every key head keeps its own tokens; with
    False all keep the same, and as many, by the sum over heads, which readers such as ``tokenselect`` need.

    Differs from the published code: what a layer has won is rounded to whole tokens per key head; the sinks are the
    first tokens and not a whole system prompt; the newest token always stays; weights are computed in float32, without
    learned sinks; the words of the instruction are kvote's, and no turn of a chat. Missing: head scores that serve any
    text, and the variant that weighs by what values contribute.
    """
    if not isinstance(even, bool):
        raise MethodError(f"even must be True or False; got {even!r}.")
    score, limit = RepeatAttention(chunk=chunk, sinks=sinks, per_head=per_head), read_budget(budget)
    if even or not per_head:
        return Method(keep=Evict(score, limit, sinks=sinks, evict_generated=False))
    joint, heads = CompetingLayers(sinks), CompetingHeads(safeguard=0.0)
    return Method(keep=Evict(score, limit, sinks=sinks, evict_generated=False, allocate=joint, over_heads=heads))
