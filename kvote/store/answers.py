"""What queries read in tokens that lie before them as tensors."""

from dataclasses import replace

import torch
from torch import Tensor

from kvote import kernels
from kvote.rope import Angles, Rope
from kvote.store.segment import Scaling
from kvote.tokens import Queries, TokenSet


def asked_by(queries: Queries, tokens: TokenSet, at: slice | list[int]) -> tuple[Queries, TokenSet]:
    """The queries of some of the sequences, and what those read."""
    index = tokens.index if isinstance(tokens.index, range) else tokens.index[at]
    return queries.of_sequences(at), replace(tokens, index=index)


def answers(query: Tensor, key: Tensor, value: Tensor, tokens: TokenSet, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """What queries [b, heads, t, d] read in the tokens of a set, keys and values [b * q, h, m, c] in their places: out
    [b, heads, t, dv] and its log-sum-exp [b, heads, t]."""
    b, heads, t, d = query.shape
    q = tokens.blocks
    out, lse = kernels.attend(
        query.reshape(b, heads, q, t // q, d).transpose(1, 2).reshape(b * q, heads, t // q, d),
        key,
        value,
        scale=scaling.scale,
        softcap=scaling.softcap,
        causal=tokens.causal,
        window=tokens.window,
    )
    out = out.reshape(b, q, heads, t // q, -1).transpose(1, 2).reshape(b, heads, t, -1)
    return out, lse.reshape(b, q, heads, t // q).transpose(1, 2).reshape(b, heads, t)


def received(query: Tensor, lse: Tensor, key: Tensor, tokens: TokenSet, scaling: Scaling) -> Tensor:
    """Attention [b, h, q, m] that the tokens of a set received; ``lse`` [b, heads, t], the rest as in ``answers``."""
    b, heads, t, d = query.shape
    q = tokens.blocks
    mass = kernels.attention_mass(
        query.reshape(b, heads, q, t // q, d).transpose(1, 2).reshape(b * q, heads, t // q, d),
        lse.reshape(b, heads, q, t // q).transpose(1, 2).reshape(b * q, heads, t // q),
        key,
        scale=scaling.scale,
        softcap=scaling.softcap,
        causal=tokens.causal,
        window=tokens.window,
    )
    return mass.reshape(b, q, -1, len(tokens)).transpose(1, 2)


def angles_at(rope: Rope, places: Tensor) -> Angles:
    """Float32 angles [..., m, r] of ``places`` int [..., m] in the text, as the model rotates now. On a CPU each place
    is computed once: lists of neighbouring queries are much alike."""
    if places.device.type != "cpu" or places.numel() == places.shape[-1]:
        return rope.once(places.long())
    found, which = torch.unique(places.long(), return_inverse=True)
    cos, sin = rope.once(found[None])
    return cos[0][which], sin[0][which]
