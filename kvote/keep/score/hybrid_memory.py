"""The memory of a score that judges by several signs together: of tokens, and of the latest answer."""

from dataclasses import dataclass, field

from torch import Tensor

from kvote.keep.score.mass import Mass
from kvote.memory import storage_bytes


@dataclass
class HybridMemory(Mass):
    """``rows`` [2, n]: attention received from all queries, and the entropy of the attention paid. Besides, of the
    latest query of each sequence: what it answered (``answers``, [heads, dv]), and the gradients that tokens had by
    then (``gradients``, [n])."""

    answers: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def select(self, index: list[int]) -> None:
        super().select(index)
        self.answers = {i: self.answers[old] for i, old in enumerate(index) if old in self.answers}
        self.gradients = {i: self.gradients[old] for i, old in enumerate(index) if old in self.gradients}

    def keep(self, row: int, slots: Tensor) -> None:
        super().keep(row, slots)
        # They served once: the next query has others.
        self.gradients.pop(row, None)

    def truncate(self, row: int, length: int) -> None:
        if row in self.rows and self.rows[row].shape[1] > length:
            # Of a query that is gone.
            self.answers.pop(row, None)
            self.gradients.pop(row, None)
        super().truncate(row, length)

    @property
    def nbytes(self) -> int:
        return super().nbytes + storage_bytes([*self.answers.values(), *self.gradients.values()])
