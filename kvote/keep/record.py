"""Record: what a layer's keeper has been shown, and what waits until it is sure that it will not be rolled back."""

from dataclasses import dataclass, field
from typing import Any

from kvote.keep.keeper import Keeper
from kvote.keep.observation import Observation
from kvote.memory import storage_bytes


@dataclass
class Record:
    """Passes ``waiting`` to be shown to the ``keeper``, and its ``memory`` of those that were."""

    keeper: Keeper
    memory: Any = None
    waiting: list[Observation] = field(default_factory=list)

    def settle(self, lengths: list[int]) -> bool:
        """Shows the keeper what waits, up to slot ``lengths[row]`` of each sequence. Says whether there was any."""
        waiting, self.waiting = self.waiting, []
        for seen in waiting:
            whole = all(lengths[row] >= seen.first + seen.count for row in seen.rows)
            for part in [seen] if whole else [seen.of(row, lengths[row]) for row in seen.rows]:
                if part is not None:
                    self.keeper.observe(part, self.memory)
        return bool(waiting)

    def truncate(self, lengths: list[int]) -> None:
        if self.memory is not None:
            for row, length in enumerate(lengths):
                self.memory.truncate(row, length)

    def select(self, index: list[int]) -> None:
        if self.memory is not None:
            self.memory.select(index)
        self.waiting = [part for seen in self.waiting for part in seen.selected(index)]

    @property
    def waiting_nbytes(self) -> int:
        """Bytes of passes that wait, most of which the model's own forward pass holds as well."""
        return storage_bytes(tensor for seen in self.waiting for tensor in seen.tensors)

    @property
    def nbytes(self) -> int:
        return self.waiting_nbytes + (0 if self.memory is None else self.memory.nbytes)
