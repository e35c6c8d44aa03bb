"""Step: what a forward pass hands to a layer."""

from dataclasses import dataclass

from torch import Tensor

from kvote.extra_inputs import ExtraInputs
from kvote.store.segment import Scaling


# Not frozen: one is made in every layer of every step, and freezing takes longer than all else about it.
@dataclass
class Step:
    """The input of one forward pass to a layer. Nobody changes it.

    ``query`` [b, heads, t, d], ``key`` [b, h, t, d] and ``value`` [b, h, t, dv] are as the model made them;
    ``positions`` [b, t] are those of the rotation; ``valid`` [b, t] is False where a token is padding (None: none is);
    ``past`` [b, seen] is the same for the columns before, where padding is among them. ``tail_queries``: how many of
    the last tokens end a prompt or a turn. ``decode``: a single generated token. ``prompt_left``: tokens of the prompt
    still to come after this pass; negative where the pass goes on behind the prompt's end; None where all its tokens
    are generated ones. ``sink_logits`` [heads]: learned sinks. ``extra_inputs``: token ids and hidden states, where the
    method needs them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    valid: Tensor | None
    tail_queries: int
    scaling: Scaling
    sink_logits: Tensor | None = None
    past: Tensor | None = None
    decode: bool = False
    prompt_left: int | None = 0
    extra_inputs: ExtraInputs | None = None
