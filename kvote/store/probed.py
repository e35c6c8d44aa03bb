"""Tokens in two precisions by the attention of probes, encoded when prompts end and many at once later (ZipCache, He et
al. 2024, arXiv 2405.14256)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvote.extra_inputs import ExtraInputs
from kvote.kernels.contract import Answer
from kvote.memory import storage_bytes
from kvote.needs import Keys, Needs, StoreOffers
from kvote.rope import Rope
from kvote.store.bodies import Bodies
from kvote.store.region import Slots
from kvote.store.saliency import Probes, chosen, drawn, saliency
from kvote.store.salient import Bits, SalientBody, encode
from kvote.store.segment import Scaling, Segment
from kvote.store.sequence import RegionSegment
from kvote.tokens import Queries, TokenSet


class ProbedSegment(RegionSegment):
    """Encoded tokens, and raw ones behind them until their prompt ends or there are ``gap`` of them."""

    def __init__(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None, how: "Salient") -> None:
        self.how = how
        self.prompts = Bodies(heads, like.device)
        self.probes: list[Probes | None] = []
        # What the model does to q.k, once it has read something here.
        self.scaling: Scaling | None = None
        super().__init__(heads, like, value_dim, rope, [self.prompts])

    @property
    def nbytes(self) -> int:
        held = [
            part for probes in self.probes if probes is not None for part in (probes.query, probes.slots, probes.places)
        ]
        return super().nbytes + storage_bytes(held)

    def add_sequences(self, count: int) -> None:
        super().add_sequences(count)
        self.probes += [None] * count

    def attend(self, queries: Queries, rows: list[int], tokens: TokenSet, scaling: Scaling) -> Answer:
        self.scaling = scaling
        return super().attend(queries, rows, tokens, scaling)

    def observe_queries(
        self, queries: Queries, rows: list[int], prompt_left: int | None, extra_bytes: ExtraInputs | None = None
    ) -> None:
        # Until it is sure that nothing is taken back, which of them will be probes is open.
        for query, row in zip(queries.rotated, rows, strict=True):
            n, t = self.length(row), query.shape[1]
            slots = torch.arange(n - t, n, device=self.device)
            new = Probes(
                query,
                slots,
                self.uncompressed.positions(row)[0][-t:].long(),
                prompt_left is not None and prompt_left <= 0,
            )
            old = self.probes[row]
            self.probes[row] = new if old is None else old.and_of(new)

    def _only_probes(self, row: int, block: int) -> None:
        """Lets go of queries that are no probes if ``block`` tokens are encoded together."""
        probes, how = self.probes[row], self.how
        if probes is not None:
            recent = probes.slots >= self.encoded(row) + block - max(1, int(how.probes / 2 * block))
            self.probes[row] = probes.only(recent | drawn(probes.places, how.probes / 2, how.seed))

    def checkpoint(self) -> Any:
        return super().checkpoint(), list(self.probes)

    def restore(self, checkpoint: Any) -> bool:
        held, self.probes = checkpoint
        return super().restore(held)

    def compress(self, prompt_left: int) -> bool:
        """Encodes what is due, together with what is encoded: all of it is rounded anew."""
        before = [self.encoded(row) for row in range(self.sequences)]
        for row, first in enumerate(before):
            probes, uncompressed = self.probes[row], self.length(row) - first
            if prompt_left or probes is None or not uncompressed or not (probes.ended or uncompressed >= self.how.gap):
                self._only_probes(row, uncompressed + prompt_left if prompt_left else max(uncompressed, self.how.gap))
                continue
            self._only_probes(row, uncompressed)
            self._encode(row)
        return before != [self.encoded(row) for row in range(self.sequences)]

    def _encode(self, row: int) -> None:
        body, probes, first = self.prompts.bodies[row], self.probes[row], self.encoded(row)
        assert probes is not None
        key, value = (part[0] for part in self.tokens([row], 0, self.length(row)))
        scaling = Scaling(key.shape[-1] ** -0.5) if self.scaling is None else self.scaling
        salient = chosen(saliency(probes, key, first, scaling), self.how.share)
        if isinstance(body, SalientBody):
            salient = torch.cat([body.salient(), salient], dim=1)
        self.prompts.bodies[row] = encode(key, value, salient, torch.stack(self.positions(row)), self.how.bits)
        self.uncompressed.truncate(row, 0)
        self.uncompressed.trim()
        self.probes[row] = None

    def _keep(self, row: int, slots: Slots, content: tuple[Tensor, Tensor] | None) -> None:
        probes = self.probes[row]
        super()._keep(row, slots, content)
        if probes is not None and isinstance(slots, range):
            self.probes[row] = probes.only(probes.slots < len(slots))
        elif probes is not None and isinstance(slots, Tensor):
            # Tokens have moved up: a probe sees those that were before it, in the key head that kept most of them.
            moved = (slots[:, None] <= probes.slots[:, None]).sum(-1).amax(0) - 1
            self.probes[row] = replace(probes, slots=moved.clamp(min=0))

    def select(self, index: list[int]) -> None:
        super().select(index)
        self.probes = [self.probes[i] for i in index]


@dataclass(frozen=True)
class Salient:
    """The ``share`` of tokens that receives the most attention of probe queries is held in ``bits.high`` per number,
    the others in ``bits.low``; ``gap`` generated tokens are encoded at a time. ``probes``: the share of queries that
    are such, half of them the last ones and half drawn by lot with ``seed``."""

    bits: Bits
    share: float
    gap: int
    probes: float
    seed: int
    needs = Needs(keys=Keys.ROTATED, lasting=True)
    offers = StoreOffers()

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        bits = self.share * self.bits.high + (1 - self.share) * self.bits.low
        return 2 * dim * bits / 8 + 1 / 8 + (2 * dtype.itemsize + 4) / heads

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> ProbedSegment:
        return ProbedSegment(heads, like, value_dim, rope, self)

    def after_layer(self, segments: Sequence[Segment | None], index: int, prompt_left: int) -> bool:
        return False
