"""Keys with fewer channels: those that the last queries of a prompt and the keys themselves make little of are gone.

Keys of 64 tokens lie channel by channel (all 64 numbers of the first kept channel, then of the second, ...), so that
any number of channels can be kept without padding, and scores of neighbouring tokens are added up side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvote import kernels
from kvote.errors import MethodError
from kvote.kernels.contract import Answer
from kvote.needs import Keys, Needs, StoreOffers
from kvote.numbers import check_whole
from kvote.rope import Angles, Rope
from kvote.store.bodies import PlainBody, head_of
from kvote.store.pages import PAGE
from kvote.store.prompt import PromptSegment
from kvote.store.region import Slots
from kvote.store.segment import Scaling, Segment


@dataclass(frozen=True)
class ThinBody(PlainBody):
    """Tokens of one sequence: ``keys`` [h, pages, kept, PAGE] of the ``channels`` int16 [h, kept] that are left of
    ``dim``, ``values`` [h, n, dv], ``positions`` int32 [h, n]."""

    dim: int
    channels: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self.channels, self.keys, self.values, self.positions]

    def _narrow(self, query: Tensor) -> Tensor:
        """The kept channels of queries [heads, t, d], as each of their key heads has them: [h, g * t, kept]."""
        h, kept = self.channels.shape
        grouped = query.reshape(h, -1, query.shape[-1])
        return grouped.gather(2, self.channels.long()[:, None].expand(-1, grouped.shape[1], kept))

    def _thin(self, slots: Slots) -> Tensor:
        """The kept channels of keys, [h, m, kept]."""
        if isinstance(slots, range):
            first, last = slots.start // PAGE, -(-slots.stop // PAGE)
            whole = self.keys[:, first:last].transpose(2, 3).flatten(1, 2)
            return whole[:, slots.start - first * PAGE : slots.stop - first * PAGE]
        slots = self._lists(slots)
        return self.keys[head_of(slots, len(self.keys)), slots // PAGE, :, slots % PAGE]

    def _lists(self, slots: Tensor) -> Tensor:
        """``slots`` [m] once for every key head."""
        return slots if slots.dim() == 2 else slots.expand(len(self.keys), -1)

    def _values(self, slots: Slots) -> Tensor:
        if isinstance(slots, range):
            return self.values[:, slots.start : slots.stop]
        slots = self._lists(slots)
        return self.values[head_of(slots, len(self.keys)), slots]

    def read(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Full keys, with zeros for the channels that are gone, and values."""
        thin = self._thin(slots)
        full = thin.new_zeros(*thin.shape[:2], self.dim)
        channels = self.channels.long().repeat_interleave(len(thin) // len(self.keys), dim=0)
        return full.scatter_(2, channels[:, None].expand(thin.shape), thin), self._values(slots)

    def attend(self, query: Tensor, slots: Slots, angles: Angles | None, scaling: Scaling) -> Answer | None:
        assert angles is None
        if query.shape[1] != 1 or not self._streams(slots, len(query)):
            # Zeros where channels are gone add nothing to a score, so for many queries the usual kernels serve.
            return None
        narrow = self._narrow(query)
        out, lse = kernels.chosen(self.values).thin_decode(
            narrow, self.keys, self.values, len(slots), scale=scaling.scale, softcap=scaling.softcap
        )
        return out.to(query.dtype).reshape(len(query), 1, -1), lse.reshape(-1, 1)

    def _streams(self, slots: Slots, heads: int) -> bool:
        """Whether a kernel can read ``slots`` straight from the pages."""
        whole = isinstance(slots, range) and slots.start == 0 and len(slots) > 0
        h, kept = self.channels.shape
        return whole and kernels.chosen(self.values).why_not_thin(self.values, heads // h, kept) is None

    def scores(self, query: Tensor, start: int, stop: int) -> Tensor:
        heads, r, _ = query.shape
        narrow = self._narrow(query).reshape(heads, r, -1)
        return kernels.scores(narrow[None], self._thin(range(start, stop))[None])[0]

    def keep(self, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> "ThinBody":
        key, value = (self._thin(slots), self._values(slots)) if content is None else content
        if content is not None:
            key = self._chosen(key.to(self.keys.dtype))
        return _body(self.dim, self.channels, key, value.to(self.values.dtype), self.positions.gather(1, slots))

    def _chosen(self, key: Tensor) -> Tensor:
        """The kept channels of full keys [h, n, d]."""
        return key.gather(2, self.channels.long()[:, None].expand(-1, key.shape[1], -1))


def _body(dim: int, channels: Tensor, thin: Tensor, values: Tensor, positions: Tensor) -> ThinBody:
    """Lays out keys [h, n, kept] channel by channel."""
    h, n, kept = thin.shape
    pages = -(-n // PAGE)
    keys = thin.new_empty(h, pages, kept, PAGE)
    held = values.new_empty(values.shape)
    for fresh in (keys, held):
        kernels.use_large_pages(fresh)
    whole = n // PAGE
    keys[:, :whole] = thin[:, : whole * PAGE].reshape(h, whole, PAGE, kept).transpose(2, 3)
    if whole < pages:
        keys[:, whole] = pad(thin[:, whole * PAGE :].transpose(1, 2), (0, pages * PAGE - n))
    return ThinBody(dim, channels, keys, held.copy_(values), positions.clone())


def channel_scores(queries: Tensor, key: Tensor) -> Tensor:
    """How much each channel has to say in the scores of ``queries`` [heads, w, d] with ``key`` [h, n, d]: [h, d].

    The squared Frobenius norm of a channel's part of all scores, over their number: mean square of its queries, over
    the query heads of a key head too, times mean square of its keys.
    """
    h, _, d = key.shape
    energy = queries.float().square().reshape(h, -1, d).mean(dim=1)
    return energy * key.float().square().mean(dim=1)


def kept_channels(scores: Tensor, gone: int) -> Tensor:
    """The channels that stay, ascending: all but the ``gone`` lowest of ``scores`` [h, d]; of equals the first go."""
    order = scores.sort(dim=1, stable=True).indices
    return order[:, gone:].sort(dim=1).values


@dataclass(frozen=True)
class FewerChannels:
    """When a prompt ends, all but its ``recent`` last tokens lose the ``ratio`` of their key channels that score lowest
    by the last ``window`` queries; parameters as in ``methods/think.py``."""

    ratio: float
    window: int
    recent: int
    needs = Needs(keys=Keys.ROTATED)
    offers = StoreOffers()

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        return (2 * dim - int(self.ratio * dim)) * dtype.itemsize + 4

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 <= self.ratio < 1:
            raise MethodError(f"ratio must be a share of the channels, at least 0 and below 1; got {self.ratio!r}.")
        check_whole(self, window=1, recent=0)

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> PromptSegment:
        return PromptSegment(heads, like, value_dim, rope, self.encode, self.window)

    def encode(self, queries: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> ThinBody | None:
        """A prompt's first tokens with fewer channels; None if it is no longer than what stays whole."""
        n = key.shape[1] - self.recent
        if n <= 0:
            return None
        channels = kept_channels(channel_scores(queries, key), int(self.ratio * key.shape[2]))
        thin = key[:, :n].gather(2, channels[:, None].expand(-1, n, -1))
        return _body(key.shape[2], channels.to(torch.int16), thin, value[:, :n], positions[:, :n])

    def after_layer(self, segments: Sequence[Segment | None], index: int, prompt_left: int) -> bool:
        return False
