"""The contract of a backend: its functions, their shapes, and what it may refuse. ``named`` and ``chosen`` return one.

A backend is a module with these names. Three implement them: ``law`` (torch, wherever it runs), ``cpu`` (C++) and
``triton`` (GPUs). Stores hold one and never ask which it is; where backends differ, the difference is a fact below or
a refusal in words.

**Shapes.** ``b`` sequences, ``h`` key heads, ``heads`` = h * g query heads in transformers' order (h_kv * g + i),
``t`` or ``r`` query rows, ``n`` or ``m`` tokens, ``d`` channels. Pools are contiguous: keys [pages, PAGE, d], values
[pages, PAGE, dv]. ``lanes`` says where tokens lie in them, one lane per (sequence, key head) in that order. A list of
tokens is int64 and contiguous, ascending in each row. Angles are (cos, sin). Scores and log-sum-exps are float32.

A backend may refuse a tensor (``why_not``) or a block of attention (``why_not_attend``, ``why_not_thin``); the reason
continues a sentence. What would be read or written wrongly raises ValueError (``checks``).
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from kvote.kernels.lanes import Lanes
from kvote.kernels.packing import Packing

# cos and sin, of each place and pair of channels.
Angles = tuple[Tensor, Tensor]
# Attention and its log-sum-exp, by which answers over disjoint tokens are merged.
Answer = tuple[Tensor, Tensor]
# A pool of codes uint8 [pages, bytes], the form they have, and where the lanes lie in it.
PackedPool = tuple[Tensor, Packing, Lanes]
# Raw pools of keys and of values, where the lanes lie in them, and which tokens are read.
Recent = tuple[Tensor, Tensor, Lanes, range]


class Tail(NamedTuple):
    """Uncompressed tokens behind packed ones: their pools of ``keys`` and ``values``, and where the lanes lie in those.

    Of sequence i, tokens before ``packed[i]`` are read from their codes and all others from the uncompressed pools,
    whose lanes hold them from token ``first[i]`` on, which is at most ``packed[i]``.
    """

    keys: Tensor
    values: Tensor
    lanes: Lanes
    packed: list[int]
    first: list[int]


# Cosines and sines [n, r], and the row at which they are read.
Row = tuple[Tensor, Tensor, int]


class Choice(NamedTuple):
    """The tokens that one query reads: the first ``sinks``, those from ``edge`` on, and ``top_k`` between.

    ``asked`` float32 [heads * d] and ``winners`` int64 [top_k] are written: the query at position ``asked_at``, as it
    scores, and the tokens with the most votes. Where its cosine with ``past`` is at least ``theta``, ``kept`` are read
    and nothing is selected. ``nominate``: how many tokens a sketch only nominates.
    """

    top_k: int
    sinks: int
    edge: int
    nominate: int
    asked_at: int
    asked: Tensor
    winners: Tensor
    theta: float = 0.0
    past: Tensor | None = None
    kept: Tensor | None = None


class PackedKernels(Protocol):
    """Tokens in a few bits (``packing``), written and read where they lie."""

    def pack(self, x: Tensor, pages: Tensor, form: Packing, lanes: Lanes, first: list[int]) -> None:
        """Writes tokens ``x`` [lanes, m, d] behind the first ``first[lane]`` tokens of each lane; keys in whole groups,
        unless they are packed by token."""

    def unpack(
        self, pages: Tensor, form: Packing, lanes: Lanes, tokens: Tensor | range, sequences: int, out: Tensor
    ) -> None:
        """Decodes a range of tokens, or a list [sequences, m], of all lanes to ``out`` [lanes, >= m, d]."""

    def attend(
        self,
        query: Tensor,
        keys: PackedPool,
        values: PackedPool,
        tokens: range,
        *,
        recent: Recent | None = None,
        scale: float,
        softcap: float | None,
    ) -> Answer:
        """Attention of one query position per sequence, ``query`` [b, heads, d], over a range of packed tokens and over
        ``recent`` ones: out [b, heads, d] and lse [b, heads], float32. At most ``MAX_QUERIES_PER_KV`` query heads per
        lane."""

    def scores(self, query: Tensor, keys: PackedPool, tokens: range) -> Tensor:
        """q.k [b, heads, r, n] of ``query`` [b, heads, r, d] with a range of packed keys."""

    def votes(self, query: Tensor, keys: PackedPool, tail: Tail, start: int, limits: list[int]) -> Tensor:
        """``Backend.votes`` [b, r, n] of ``query`` [b, heads, r, d] on packed keys and on those of ``tail``."""

    def select(self, query: Tensor, keys: PackedPool, tail: Tail, start: int, limits: list[int], k: int) -> Tensor:
        """The ``k`` tokens [b, r, k] with the most ``votes``, ascending."""

    def decode(
        self,
        query: Tensor,
        keys: PackedPool,
        values: PackedPool,
        tail: Tail,
        tokens: Tensor,
        *,
        angles: Angles | None,
        interleaved: bool,
        scale: float,
        softcap: float | None,
    ) -> Answer:
        """``Backend.decode`` over a list ``tokens`` [b, m] of packed tokens and of those of ``tail``. Keys are rounded
        to the model's dtype before they are rotated, and again then."""


class Backend(Protocol):
    """The module's facts and functions."""

    NAME: str
    # Query heads per lane whose attention is computed from the pages; 0: tokens are fetched before they are read.
    MAX_QUERIES_PER_KV: int
    # Tokens that are sketched together; ``sketch_bytes`` is of so many.
    SKETCH_TOKENS: int
    # Stores the next token of one sequence and answers its query in one call (``cpu.one_step.step``); None where there
    # is no such kernel.
    step: Callable[..., tuple[Tensor, bool]] | None
    # Whether to look at a tensor's numbers means to wait for a device.
    ASKING_WAITS: bool

    @property
    def packed(self) -> PackedKernels: ...

    def why_not(self, tensor: Tensor | None = None) -> str | None:
        """The reason these kernels cannot read ``tensor`` (or cannot run at all), or None."""

    # Tokens that lie side by side.

    def why_not_attend(self, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> str | None:
        """The reason ``attend`` cannot answer, or None."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        causal: bool = True,
        window: int | None = None,
    ) -> Answer:
        """``query`` [b, heads, t, d], ``key`` [b, h, m, d], ``value`` [b, h, m, dv]: out [b, heads, t, dv] in the
        query's dtype, lse [b, heads, t]. If ``causal``, rows are the last entries of the list (``masks``)."""

    def rotate(self, x: Tensor, angles: Angles, interleaved: bool) -> Tensor:
        """``x`` [b, heads, n, d], channels contiguous, rotated by float32 ``angles`` [n, r] or [b or 1, n, r]."""

    def top_k(self, votes: Tensor, k: int) -> Tensor:
        """Indices [..., k] of the k largest of ``votes`` [..., n], ascending."""

    # Tokens in pages.

    def append(
        self,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        pools: tuple[Tensor, Tensor, Tensor],
        lanes: Lanes,
        first: list[int],
        sketch: Tensor | None,
        bits: int,
    ) -> None:
        """Writes tokens ``key`` [b, h, t, d], ``value`` [b, h, t, dv] and ``positions`` int64 [b, t] to the pools
        (keys, values, positions) behind the first ``first[lane]`` tokens of each lane, and sketches them; lanes of
        less than a page are sketched anew."""

    def gather(
        self,
        keys: Tensor,
        values: Tensor,
        lanes: Lanes,
        index: Tensor,
        angles: Angles,
        interleaved: bool,
        out: tuple[Tensor, Tensor],
    ) -> None:
        """Writes the tokens ``index`` [b, q, m] to ``out`` [b, q, h, m, d] each, keys rotated by ``angles`` [m, r] or
        [b, q, m, r]; or ``index`` [m] of one sequence to [h, m, d]."""

    def decode(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        lanes: Lanes,
        tokens: Tensor | range,
        *,
        angles: Angles | None,
        interleaved: bool,
        scale: float,
        softcap: float | None,
        ends: list[int] | None = None,
    ) -> Answer:
        """Attention of one query position per sequence, ``query`` [b, heads, d], over a range that all read or a list
        [b, m]: out [b, heads, d] and lse [b, heads], float32. With ``angles`` [m, r], keys are rotated as they are
        read. At most ``MAX_QUERIES_PER_KV`` query heads per lane. ``ends``: of a range, each lane's tokens before its
        own end only, so that one call serves lanes of any lengths; a lane that reads none answers 0, its lse -inf."""

    def attention_mass(
        self,
        query: Tensor,
        lse: Tensor,
        keys: Tensor,
        lanes: Lanes,
        start: int,
        limits: list[int],
        *,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """What tokens ``start`` to ``max(limits)`` received, [b, h, n], from ``query`` [b, heads, t, d] with its
        ``lse`` [b, heads, t]; row i of t sees tokens before ``limits[i]``."""

    def scores(self, query: Tensor, keys: Tensor, lanes: Lanes, start: int, stop: int) -> Tensor:
        """q.k [b, r, heads, stop - start] of ``query`` [b, heads, r, d], not scaled."""

    def label_scores(self, query: Tensor, labels: Tensor, lanes: Lanes, start: int, stop: int) -> Tensor:
        """The same from a pool of labels [pages, c, PAGE], channels before tokens, for queries of c channels."""

    def votes(
        self,
        query: Tensor,
        keys: Tensor,
        lanes: Lanes,
        sketch: Tensor | None,
        bits: int,
        start: int,
        limits: list[int],
    ) -> Tensor:
        """Soft votes [b, r, n] for tokens ``start`` to ``max(limits)``; query j of ``query`` [b, heads, r, d] votes on
        those before ``limits[j]``, others get 0. Exact, or by a ``sketch`` of ``bits``. Of one sequence, ``query`` may
        be [heads, r, d] and the votes [r, n]."""

    def select(
        self,
        query: Tensor,
        keys: Tensor,
        lanes: Lanes,
        sketch: Tensor | None,
        bits: int,
        start: int,
        limits: list[int],
        k: int,
        nominate: int = 0,
        skip: Tensor | None = None,
    ) -> Tensor:
        """The ``k`` tokens [b, r, k] with the most ``votes``, ascending; arguments as there. With ``nominate``, votes
        from the sketch nominate that many, which are scored again with their keys; ``max(limits)`` must then be a page
        at least where lanes hold one, or the centre of sketches would not be known. ``skip`` bool [b]: sequences whose
        answer is not used; they may be answered all the same."""

    def sketch_bytes(self, dim: int, bits: int) -> int:
        """Bytes of the sketch of ``SKETCH_TOKENS`` tokens; 0 where the backend keeps none."""

    def sketch(self, keys: Tensor, sketch: Tensor, bits: int, lanes: Lanes, start: int, stop: int) -> None:
        """Encodes tokens ``start`` to ``stop`` of ``keys`` into ``sketch`` [pages, bytes], each less the centre of its
        lane: the mean of the lane's first page, or 0 where ``stop``, the tokens held, is less than a page."""

    # Keys with fewer channels.

    def why_not_thin(self, values: Tensor, queries_per_kv: int, kept: int) -> str | None:
        """Why ``thin_decode`` cannot answer ``queries_per_kv`` query heads per key head of ``kept`` channels, or
        None."""

    def thin_decode(
        self, query: Tensor, keys: Tensor, values: Tensor, stop: int, *, scale: float, softcap: float | None
    ) -> Answer:
        """Attention of ``query`` [h, g, kept] over the first ``stop`` tokens of one sequence, whose ``keys``
        [h, pages, kept, PAGE] lie channel by channel, with ``values`` [h, n, dv]: out [h, g, dv] and lse [h, g],
        float32."""
