"""The selection cache (TokenSelect, algorithm 1): a decode step whose query resembles the last selecting one reuses
its tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SelectionMemory:
    """Per sequence: the query that last selected [b, heads * d], its tokens [b, k], and where the window then began.

    The stored query is replaced only by a new selection, so that drift adds up against it (not against the previous
    step). ``edge`` -1 marks a sequence without a selection.
    """

    query: Tensor | None = None
    index: Tensor | None = None
    edge: Tensor | None = None
    # On a GPU they are written in place, so that a step can be captured in a graph.
    in_place: bool = False
    # The number that the first entry of a tensor ``edge`` holds, so that it is not asked in every step.
    _known: tuple[Tensor, int] | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (self.query, self.index, self.edge) if t is not None)

    def prepare(self, sequences: int, query: Tensor, top_k: int) -> None:
        """Makes room for ``sequences``, of which any may be absent from this call's ``query`` [b, heads * d]."""
        if self.edge is None or len(self.edge) != sequences:
            self.query = query.new_zeros(sequences, query.shape[1])
            self.index = torch.zeros(sequences, top_k, dtype=torch.int64, device=query.device)
            self.edge = torch.full((sequences,), -1, dtype=torch.int64, device=query.device)

    def of(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What is remembered of these sequences: queries, tokens and edges."""
        query, index, edge = self._held
        at = _places(rows, edge)
        return query[at], index[at], edge[at]

    def put(self, rows: list[int], query: Tensor, index: Tensor, edge: int, *, in_place: bool = False) -> None:
        """Replaces what is remembered of these sequences, in new tensors unless ``in_place``: an interrupted pass goes
        back to the old ones."""
        at, held = _places(rows, self._held[2]), self._held
        self.in_place |= in_place
        if not in_place:
            held = self.query, self.index, self.edge = held[0].clone(), held[1].clone(), held[2].clone()
        held[0][at], held[1][at], held[2][at] = query, index, edge

    @property
    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.query is not None
        assert self.index is not None
        assert self.edge is not None
        return self.query, self.index, self.edge

    def serves(self, sequences: int) -> bool:
        """Whether there is a selection for each of ``sequences`` sequences."""
        return self.edge is not None and len(self.edge) == sequences

    @property
    def edge_of_first(self) -> int:
        """The first sequence's ``edge``."""
        if self.edge is None:
            return -1
        if self._known is None or self._known[0] is not self.edge:
            self._known = self.edge, int(self.edge[0])
        return self._known[1]

    def remember(self, query: Tensor, index: Tensor, edge: int) -> None:
        """Replaces what is remembered of the only sequence."""
        self.query, self.index = query, index
        if self.edge is None or len(self.edge) != 1 or self.edge_of_first != edge:
            self.edge = torch.full((1,), edge, dtype=torch.int64)
            self._known = self.edge, edge

    def select(self, index: list[int]) -> None:
        if self.query is not None and self.index is not None and self.edge is not None:
            self.query, self.index, self.edge = self.query[index], self.index[index], self.edge[index]

    def checkpoint(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.query, self.index, self.edge

    def restore(self, checkpoint: tuple[Tensor | None, Tensor | None, Tensor | None]) -> None:
        """Restores the tensors of ``checkpoint``; where they were written in place meanwhile, they are forgotten, and
        the next step selects anew."""
        self.query, self.index, self.edge = checkpoint
        if self.in_place:
            self.forget()

    def forget(self) -> None:
        self.query = self.index = self.edge = None


def _places(rows: list[int], edge: Tensor) -> slice | Tensor:
    """Where these sequences stand among all; where they are all, nothing is copied to a device."""
    return slice(None) if rows == list(range(len(edge))) else torch.tensor(rows, device=edge.device)


def resembles(query: Tensor, past: Tensor, theta: float, sum_over_ranks: "SumOverRanks") -> Tensor:
    """Whether cos(query, past) >= theta, per sequence; both [b, heads * d].

    With heads split over ranks, the dot product and both norms are summed first, so that all ranks decide alike
    (ranks that disagreed would wait for each other in the all-reduce of the votes).
    """
    parts = torch.stack([(query * past).sum(-1), query.square().sum(-1), past.square().sum(-1)])
    dot, a, b = sum_over_ranks(parts)
    return torch.ge(dot, theta * torch.sqrt(a * b))


@dataclass(frozen=True)
class SumOverRanks:
    """Sums a tensor over the tensor-parallel ranks of torch.distributed, or leaves it alone."""

    enabled: bool = False

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.enabled:
            torch.distributed.all_reduce(tensor)
        return tensor
