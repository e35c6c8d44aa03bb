"""Value sums: the sum of the values of every page of tokens, so that the mean of all values costs one sum over
pages."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvote.index.column import KeyPages
from kvote.store.pages import PAGE, Lane

NAME = "value sums"


@dataclass(frozen=True)
class ValueSumsIndex:
    """Sums of the values of every page of 64 tokens, in float32."""

    name, required, whole_layers = NAME, True, False

    def token_bytes(self, dim: int, dtype: torch.dtype) -> float:
        return 4 * dim / PAGE

    def column(self, keys: KeyPages, layer: int) -> "ValueSums":
        keys.pool.add(NAME, keys.pool.values.shape[-1], dtype=torch.float32)
        return ValueSums(keys)


@dataclass
class ValueSums:
    """Sums of values, in the pool as [pages, dv]."""

    keys: KeyPages
    coded, nbytes = None, 0

    def write(self, lanes: Sequence[Lane], start: int, key: Tensor) -> None:
        # A page that is already begun is summed anew: so the sum does not depend on how its tokens came or went.
        pool, stop = self.keys.pool, start + key.shape[2]
        slots = torch.stack([pool.slots(lane, start // PAGE * PAGE, stop) for lane in lanes])
        rows = pool.values.view(-1, pool.values.shape[-1])[slots]
        held = pad(rows, (0, 0, 0, -rows.shape[1] % PAGE)).view(len(lanes), -1, PAGE, rows.shape[2])
        pool.parts[NAME][slots[:, ::PAGE] // PAGE] = held.sum(2, dtype=torch.float32)

    def mean(self, rows: list[int], length: int) -> Tensor:
        """The mean [b, h, dv] of the values of all ``length`` tokens of sequences, float32.

        To be asked only after a token was added to each: until then, the last page may still count forgotten ones.
        """
        total = self.keys.pool.parts[NAME][self.keys.pages(rows)].sum(1)
        return total.reshape(len(rows), self.keys.heads, -1) / length
