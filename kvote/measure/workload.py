"""Random tokens, held as torch's cache and as kvote's, and every kernel that a decode step is made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from kvote import kernels
from kvote.index.sketch import NAME as SKETCH
from kvote.kernels.contract import Angles, Backend
from kvote.kernels.lanes import Lanes
from kvote.layer import Layer
from kvote.measure import check
from kvote.measure.clock import Call
from kvote.measure.geometry import Geometry
from kvote.methods import tokenselect
from kvote.read.head_votes import HeadVotes
from kvote.store.pages import PAGE
from kvote.store.uncompressed import UncompressedSegment

SINKS, TOP_K, WINDOW = 128, 2048, 512
SKETCHES = {"none": 0, "int8": 8, "int4": 4}
BASELINE, AS_IT_COMES = "sdpa, packed", "sdpa as transformers calls it"


@dataclass(frozen=True)
class Kernel:
    """``bytes`` that it must read, and a check that raises WrongAnswerError."""

    name: str
    call: Call
    bytes: int
    check: Callable[[], None]


def stepping(layer: Layer, geometry: Geometry) -> Call:
    """One decode step of ``layer``, rolled back each time, so that every call sees the same tokens."""
    step = geometry.step(layer.seen)
    return Call(lambda: layer.attend(step), lambda: layer.crop(1))


def reads(geometry: Geometry) -> Backend:
    """The kernels that read keys of a geometry."""
    return kernels.chosen(torch.empty(0, geometry.dim, dtype=geometry.dtype))


def sketch_bytes(geometry: Geometry, tokens: int, bits: int) -> int:
    """Bytes of the sketches of ``tokens`` tokens in all key heads."""
    return (
        geometry.kv_heads * tokens * reads(geometry).sketch_bytes(geometry.dim, bits) // reads(geometry).SKETCH_TOKENS
    )


class Workload:
    """Random tokens, held as torch's cache and once per sketch, and the kernels that read them."""

    def __init__(self, geometry: Geometry, tokens: int) -> None:
        self.geometry, self.tokens = geometry, tokens
        self.key, self.value = geometry.tokens(tokens)
        self.layers = {
            name: geometry.filled(
                tokenselect(top_k=TOP_K, sinks=SINKS, window=WINDOW, theta=2.0, sketch=name), self.key, self.value
            )
            for name in SKETCHES
        }
        for layer in self.layers.values():
            # Else every call would take a new page; of real steps, one in a page does.
            if layer.seen % PAGE == 0:
                layer.attend(geometry.step(layer.seen))
        self.query = geometry.query()

    def kernels(self) -> Iterator[Kernel]:
        """The baseline first."""
        sdpa = partial(_asked, self.geometry.packed, self.key, self.value)
        yield self._attention(BASELINE, sdpa, self._all, self.tokens)
        yield self._attention("dense decode", self._dense, self._all, self.tokens)
        yield from (self._votes(name) for name in SKETCHES)
        yield self._top_k()
        yield self._attention(f"attention to a list of {len(self._list):,}", self._listed, self._law, len(self._list))
        yield from (self._step(name) for name in SKETCHES)
        yield self._store()

    def as_it_comes(self) -> Kernel:
        """torch's attention as transformers calls it."""
        sdpa = partial(_asked, self.geometry.as_it_comes, self.key, self.value)
        return self._attention(AS_IT_COMES, sdpa, self._all, self.tokens)

    def _segment(self, sketch: str = "none") -> UncompressedSegment:
        segment = self.layers[sketch].segment
        assert isinstance(segment, UncompressedSegment)
        return segment

    def _lanes(self, segment: UncompressedSegment) -> Lanes:
        return segment.pool.table(tuple(range(self.geometry.kv_heads)))

    def _attention(
        self, name: str, run: Callable[[Tensor], Tensor], law: Callable[[Tensor], Tensor], read: int
    ) -> Kernel:
        checked = partial(check.answers, name, run, self.geometry, law)
        return Kernel(name, Call(partial(run, self.query)), read * self.geometry.token_bytes, checked)

    def _all(self, query: Tensor) -> Tensor:
        return check.attention(query, self.key, self.value, self.geometry.scale)

    def _dense(self, query: Tensor) -> Tensor:
        return self._decode(query, range(self.tokens), None)

    @cached_property
    def _list(self) -> Tensor:
        """Sinks, tokens from everywhere and a window."""
        edge = self.tokens - WINDOW
        chosen = SINKS + torch.randperm(edge - SINKS)[:TOP_K].sort().values
        return torch.cat([torch.arange(SINKS), chosen, torch.arange(edge, self.tokens)])

    @cached_property
    def _angles(self) -> Angles:
        rope = self._segment().rope
        assert rope is not None
        return rope.contiguous(len(self._list), self._list.device)

    def _listed(self, query: Tensor) -> Tensor:
        return self._decode(query, self._list[None], self._angles)

    def _law(self, query: Tensor) -> Tensor:
        placed = check.rotated(self.key[:, :, self._list].float(), self._angles, slice(None))
        return check.attention(query, placed, self.value[:, :, self._list], self.geometry.scale)

    def _decode(self, query: Tensor, tokens: Tensor | range, angles: Angles | None) -> Tensor:
        segment = self._segment()
        return segment.kernels.decode(
            query[:, :, 0],
            segment.pool.keys,
            segment.pool.values,
            self._lanes(segment),
            tokens,
            angles=angles,
            interleaved=False,
            scale=self.geometry.scale,
            softcap=None,
        )[0]

    def _voted(self, name: str, query: Tensor) -> Tensor:
        segment, bits = self._segment(name), SKETCHES[name]
        coded = segment.indexes[SKETCH].coded if bits else None
        sketch = None if coded is None else coded[0]
        limits = [self.tokens - WINDOW]
        return segment.kernels.votes(query[0], segment.pool.keys, self._lanes(segment), sketch, bits, SINKS, limits)[0]

    def _scored_bytes(self, bits: int) -> int:
        candidates = self.tokens - WINDOW - SINKS
        keys = candidates * self.geometry.token_bytes // 2
        return sketch_bytes(self.geometry, candidates, bits) if bits else keys

    def _selecting_bytes(self, layer: Layer, bits: int) -> int:
        """Those of the scores, and of the keys that a sketch nominates; where that is half of them, of all keys."""
        reader = layer.method.read
        nominated = reader.nominated if isinstance(reader, HeadVotes) else 0
        if 2 * nominated >= self.tokens - WINDOW - SINKS:
            return self._scored_bytes(0)
        return self._scored_bytes(bits) + nominated * self.geometry.token_bytes // 2

    def _votes(self, name: str) -> Kernel:
        bits = SKETCHES[name]
        said = f"votes, {bits}-bit sketch" if bits else "votes, exact"

        def checked() -> None:
            self._voted(name, self.geometry.query())
            query = self.geometry.query()
            law = check.votes(query, self.key, bits, range(SINKS, self.tokens - WINDOW))
            check.votes_close(said, self._voted(name, query), law, bits)

        return Kernel(said, Call(partial(self._voted, name, self.query.float())), self._scored_bytes(bits), checked)

    def _top_k(self) -> Kernel:
        name = f"top-k, {TOP_K:,}"
        votes, top_k = self._voted("none", self.query), self._segment().kernels.top_k

        def checked() -> None:
            top_k(votes.flip(0), TOP_K)
            check.largest(name, top_k(votes, TOP_K), votes)

        return Kernel(name, Call(lambda: top_k(votes, TOP_K)), votes.nbytes, checked)

    def _step(self, name: str) -> Kernel:
        layer, bits = self.layers[name], SKETCHES[name]
        said = f"tokenselect step, {bits}-bit sketch" if bits else "tokenselect step"
        checked = partial(check.step, said, layer, self.geometry, bits, WINDOW, (SINKS, WINDOW))
        read = self._selecting_bytes(layer, bits) + len(self._list) * self.geometry.token_bytes
        return Kernel(said, stepping(layer, self.geometry), read, checked)

    def _store(self) -> Kernel:
        name, segment = "storing a token, 8-bit sketch", self._segment("int8")
        n = segment.length(0)
        key, value = self.geometry.tokens(1)

        def stored() -> None:
            segment.append([0], key, value, torch.tensor([[n]]))

        def undo() -> None:
            segment.truncate(0, n)

        def checked() -> None:
            stored()
            held = segment.decode([0], n, n + 1)
            same = all(torch.equal(mine, given) for mine, given in zip(held, (key, value), strict=True))
            if segment.length(0) != n + 1 or not same:
                raise check.WrongAnswerError(f"{name} does not store what it is given on this machine; no figures.")
            undo()

        return Kernel(name, Call(stored, undo), 0, checked)


def _asked(
    make: Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]], key: Tensor, value: Tensor, query: Tensor
) -> Tensor:
    return make(query, key, value)()
