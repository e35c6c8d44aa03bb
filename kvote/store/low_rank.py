"""Low rank shared by layers: the keys (and the values) of a group of layers, side by side, as one basis over tokens
that all of them share times a block of channels for each.

Keys are at position 0, where they have a low rank; they are rotated when they are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError
from kvote.kernels.contract import Answer
from kvote.needs import Keys, Needs, StoreOffers
from kvote.rope import Angles, Rope
from kvote.store.bodies import PlainBody
from kvote.store.prompt import PromptSegment
from kvote.store.region import Slots
from kvote.store.segment import Scaling, Segment

# Tokens of which whole keys, or float32 numbers, exist at a time.
_BLOCK = 2048
# Where ranks are shares, tokens are approximated only if that takes at most this much of their bytes: in a short prompt
# it saves little and loses much. Who gives numbers has chosen.
_WORTH = 0.5


@dataclass
class Basis:
    """What the layers of a group share of one sequence: ``key`` [n, r] and ``value`` [n, r'], of which each row times a
    layer's block is that layer's token, and the original ``positions`` int32 [n]."""

    key: Tensor
    value: Tensor
    positions: Tensor
    _last: "tuple[Tensor, Basis] | None" = field(default=None, repr=False)

    def of(self, slots: Tensor) -> "Basis":
        """The same for ``slots`` [m] only; one object for all layers that ask for the same."""
        if self._last is None or not torch.equal(self._last[0], slots):
            self._last = slots, Basis(self.key[slots], self.value[slots], self.positions[slots])
        return self._last[1]


@dataclass(frozen=True)
class LowRankBody(PlainBody):
    """Tokens of one sequence in one layer: the ``basis`` of its group times ``key`` [r, h, d] and ``value`` [r', h, d].

    ``counts``: whether the bytes of the basis are those of this layer. ``interleaved``: how keys are rotated.
    """

    basis: Basis
    key: Tensor
    value: Tensor
    interleaved: bool
    counts: bool

    # Keys and values of a list are made where they are read, and values perhaps not at all.
    lists = True

    @property
    def positions(self) -> Tensor:
        return self.basis.positions[None]

    @property
    def tensors(self) -> list[Tensor]:
        shared = [self.basis.key, self.basis.value, self.basis.positions] if self.counts else []
        return [self.key, self.value, *shared]

    def read(self, slots: Slots) -> tuple[Tensor, Tensor]:
        return _product(self.basis.key, slots, self.key), _product(self.basis.value, slots, self.value)

    def attend(self, query: Tensor, slots: Slots, angles: Angles | None, scaling: Scaling) -> Answer:
        assert angles is not None
        heads, t, _ = query.shape
        rank, h, dim = self.value.shape
        # Values need not be made where few queries read: their weights times the basis meet the block once.
        absorbs = heads * t * rank < rank * h * dim + heads * t * dim
        parts = []
        for start in range(0, len(slots), _BLOCK):
            some = slots[start : start + _BLOCK]
            cos, sin = (a[..., start : start + _BLOCK, :] for a in angles)
            key = kernels.rotate(_product(self.basis.key, some, self.key), cos, sin, interleaved=self.interleaved)
            if absorbs:
                rows = _rows(self.basis.value, some).float()
                parts.append(_weighted(query, key, rows, scaling))
            else:
                value = _product(self.basis.value, some, self.value)
                out, lse = kernels.attend(
                    query[None], key[None], value[None], scale=scaling.scale, softcap=scaling.softcap, causal=False
                )
                parts.append((out[0], lse[0]))
        out, lse = kernels.merge(parts)
        if absorbs:
            out = out.reshape(h, -1, rank) @ self.value.float().transpose(0, 1)
        return out.reshape(heads, t, dim).to(query.dtype), lse

    def scores(self, query: Tensor, start: int, stop: int) -> Tensor:
        """Costs the rank per token, not the head size times the key heads: the block meets the queries first."""
        heads, r, dim = query.shape
        folded = query.float().reshape(self.key.shape[1], -1, dim) @ self.key.float().permute(1, 2, 0)
        return kernels.scores(folded.reshape(1, heads, r, -1), self.basis.key[None, None, start:stop])[0]

    def keep(self, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> "LowRankBody":
        if content is not None:
            raise MethodError(
                "Tokens that layers share cannot be merged with others; use a method that only drops some."
            )
        return LowRankBody(self.basis.of(slots[0]), self.key, self.value, self.interleaved, self.counts)


def _rows(basis: Tensor, slots: Slots) -> Tensor:
    return basis[slots.start : slots.stop] if isinstance(slots, range) else basis[slots]


def _product(basis: Tensor, slots: Slots, block: Tensor) -> Tensor:
    """Tokens [h, m, d] from rows of a basis [n, r] and a block [r, h, d]; [heads, m, d] for ``slots`` [heads, m]."""
    rows = _rows(basis, slots)
    if rows.dim() == 3:
        return rows @ block.transpose(0, 1).repeat_interleave(len(rows) // block.shape[1], dim=0)
    return (rows @ block.flatten(1)).reshape(len(rows), *block.shape[1:]).transpose(0, 1)


def _weighted(query: Tensor, key: Tensor, rows: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """``query`` [heads, t, d] over ``key`` [h, m, d]: ``rows`` [m, r] by their softmax weights, [heads, t, r] in
    float32, and the log-sum-exp."""
    heads, t, d = query.shape
    scores = query.float().reshape(len(key), -1, d) @ key.float().transpose(1, 2) * scaling.scale
    if scaling.softcap is not None:
        scores = scaling.softcap * torch.tanh(scores / scaling.softcap)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    return (torch.exp(scores - lse).flatten(0, 1) @ rows).reshape(heads, t, -1), lse.reshape(heads, t)


def factors(parts: list[Tensor], rank: int) -> tuple[Tensor, list[Tensor]]:
    """The best approximation of rank ``rank`` to ``parts`` [n, c] each, side by side: a basis [n, r] (left singular
    vectors times singular values) and a block [r, c] for each part, in float32.

    Singular vectors come from the smaller Gram matrix in float32, block by block, so no float32 copy of all parts ever
    exists; singular values below about 3e-4 of the largest are rounding.
    """
    n, sizes = len(parts[0]), [part.shape[1] for part in parts]
    device = parts[0].device
    if n <= sum(sizes):
        gram = torch.zeros(n, n, device=device)
        for part in parts:
            gram += part.float() @ part.float().T
        values, vectors = torch.linalg.eigh(gram)
        left = vectors[:, -rank:].flip(1)
        size = values[-rank:].flip(0).clamp(min=0).sqrt()
        size = torch.where(size > 0, size, 1.0)
        return left * size, [(left.T @ part.float()) / size[:, None] for part in parts]
    gram = torch.zeros(sum(sizes), sum(sizes), device=device)
    for start in range(0, n, _BLOCK):
        rows = torch.cat([part[start : start + _BLOCK].float() for part in parts], dim=1)
        gram.addmm_(rows.T, rows)
    right = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    blocks = [right[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
    basis = [
        torch.cat([part[start : start + _BLOCK].float() for part in parts], dim=1) @ right
        for start in range(0, n, _BLOCK)
    ]
    return torch.cat(basis), [block.T.contiguous() for block in blocks]


@dataclass(frozen=True)
class SharedLowRank:
    """When a prompt has gone through the last of ``layers_per_basis`` layers, it is held as factors of at most
    ``key_rank`` and ``value_rank``; parameters as in ``methods/xkv.py``."""

    layers_per_basis: int
    key_rank: int | float
    value_rank: int | float
    needs = Needs(keys=Keys.UNROTATED, equal_heads=True, equal_layers=True, whole_layers=True)
    offers = StoreOffers(shares_layers=True)

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        width = self.layers_per_basis * heads * dim
        ranks = (min(width, r if isinstance(r, int) else r * width) for r in (self.key_rank, self.value_rank))
        return (sum(ranks) * dtype.itemsize + 4) / (self.layers_per_basis * heads)

    def __post_init__(self) -> None:
        if (
            isinstance(self.layers_per_basis, bool)
            or not isinstance(self.layers_per_basis, int)
            or self.layers_per_basis < 1
        ):
            raise MethodError(f"group must be a whole number of layers, at least 1; got {self.layers_per_basis!r}.")
        for name in ("key_rank", "value_rank"):
            rank = getattr(self, name)
            whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
            if not whole and not (isinstance(rank, float) and 0 < rank <= 1):
                raise MethodError(
                    f"{name} must be a whole number of at least 1, or a share of the group's channels such as 0.125; "
                    f"got {rank!r}."
                )

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> PromptSegment:
        return PromptSegment(heads, like, value_dim, rope)

    def after_layer(self, segments: Sequence[Segment | None], index: int, prompt_left: int) -> bool:
        if (index + 1) % self.layers_per_basis and index + 1 < len(segments):
            return False
        layers = [
            s
            for s in segments[index // self.layers_per_basis * self.layers_per_basis : index + 1]
            if isinstance(s, PromptSegment)
        ]
        encoded = False
        for row in range(layers[0].sequences):
            n = layers[-1].prompt(row, prompt_left)
            if n is None:
                continue
            for segment, body in zip(layers, self.encode(layers, row, n), strict=True):
                segment.put(row, body)
                encoded |= body is not None
        return encoded

    def encode(self, layers: list[PromptSegment], row: int, n: int) -> Sequence[LowRankBody | None]:
        """The first ``n`` tokens of a sequence in each of a group's layers; None for each if factors would not be
        smaller by as much as pays."""
        held = [segment.uncompressed.decode([row], 0, n) for segment in layers]
        sides = [[side[0].transpose(0, 1).flatten(1) for side in pair] for pair in zip(*held, strict=True)]
        widths = [sum(part.shape[1] for part in parts) for parts in sides]
        ranks = [
            min(n, width, rank if isinstance(rank, int) else max(1, int(rank * width)))
            for rank, width in zip((self.key_rank, self.value_rank), widths, strict=True)
        ]
        size = sum(rank * (n + width) for rank, width in zip(ranks, widths, strict=True))
        shares = isinstance(self.key_rank, float) or isinstance(self.value_rank, float)
        whole = n * sum(widths)
        if size >= whole or (shares and size > _WORTH * whole):
            return [None] * len(layers)
        (key_basis, keys), (value_basis, values) = (
            factors(parts, rank) for parts, rank in zip(sides, ranks, strict=True)
        )
        like = sides[0][0]
        places = layers[0].positions(row)[0][:n].clone()
        basis = Basis(key_basis.to(like.dtype), value_basis.to(like.dtype), places)
        return [
            LowRankBody(
                basis,
                key.to(like.dtype).reshape(len(key), segment.heads, -1),
                value.to(like.dtype).reshape(len(value), segment.heads, -1),
                interleaved=segment.rope is not None and segment.rope.interleaved,
                counts=number == 0,
            )
            for number, (segment, key, value) in enumerate(zip(layers, keys, values, strict=True))
        ]
