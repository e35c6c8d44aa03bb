"""Masks of attention blocks. Rows are the last entries of the token list, so the diagonal ends in the corner."""

from functools import lru_cache

import torch
from torch import Tensor


def end_aligned(rows: int, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [rows, tokens]: row i sees entries up to tokens - rows + i, and of those the last ``window``."""
    row = torch.arange(tokens - rows, tokens, device=device)[:, None]
    token = torch.arange(tokens, device=device)[None]
    seen = token <= row
    return seen if window is None else seen & (token > row - window)


# The lists of one prefill are all alike; a few masks are enough, and they are held for as long as the process.
@lru_cache(maxsize=4)
def additive(
    rows: int, tokens: int, window: int | None, queries_per_kv: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The same as 0 / -inf [1, 1, groups * rows, tokens], repeated for query heads that share a key head."""
    mask = torch.zeros(rows, tokens, dtype=dtype, device=device)
    mask.masked_fill_(~end_aligned(rows, tokens, window, device), float("-inf"))
    return mask.repeat(queries_per_kv, 1)[None, None]
