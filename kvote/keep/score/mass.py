"""Attention that tokens have received, added up per sequence and key head."""

from dataclasses import dataclass, field

from torch import Tensor

from kvote.memory import storage_bytes


@dataclass
class Mass:
    """By sequence: float32 [h, n] for its first n tokens, or [1, n] where key heads are not told apart.

    Tensors are never changed in place, so sequences may share them.
    """

    rows: dict[int, Tensor] = field(default_factory=dict)

    def add(self, row: int, mass: Tensor) -> None:
        """Adds ``mass`` [h, n] for all tokens of the sequence; new tokens begin with what they received."""
        held = self.rows.get(row)
        mass = mass.clone()
        if held is not None:
            mass[:, : held.shape[1]] += held
        self.rows[row] = mass

    def select(self, index: list[int]) -> None:
        self.rows = {i: self.rows[old] for i, old in enumerate(index) if old in self.rows}

    def keep(self, row: int, slots: Tensor) -> None:
        if row in self.rows:
            held = self.rows[row]
            slots = slots.to(held.device).expand(held.shape[0], -1)
            # A head that keeps fewer has nothing in front.
            self.rows[row] = held.gather(1, slots.clamp_min(0)).masked_fill_(slots < 0, 0)

    def truncate(self, row: int, length: int) -> None:
        if row in self.rows:
            self.rows[row] = self.rows[row][:, :length].clone()

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.rows.values())
