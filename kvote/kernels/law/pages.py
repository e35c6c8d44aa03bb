"""Tokens of lanes as plain tensors, and where they lie."""

import numpy as np
import torch
from torch import Tensor

from kvote.kernels.lanes import PAGE, Lanes


def table(lanes: Lanes, device: torch.device) -> Tensor:
    """Pages [lanes, pages] of each lane in token order, int64; shorter lanes end in page 0."""
    pages = [torch.from_numpy(own) for own in lanes.pages()]
    return torch.nn.utils.rnn.pad_sequence(pages, batch_first=True).to(device)


def slots(lanes: Lanes, tokens: Tensor, size: int = PAGE) -> Tensor:
    """Pool slots of ``tokens`` int64 [lanes, ...] of each lane, in pages of ``size``."""
    if len(lanes.runs) == lanes.count:
        # A run each, which is the usual state.
        bases = torch.from_numpy(lanes.runs[:, 0] * size).to(tokens.device)
        return tokens + bases.view(-1, *[1] * (tokens.dim() - 1))
    pages = table(lanes, tokens.device).gather(1, (tokens // size).flatten(1)).view(tokens.shape)
    return pages * size + tokens % size


def behind(lanes: Lanes, first: list[int], count: int, device: torch.device, size: int = PAGE) -> Tensor:
    """Pool slots [lanes, count] behind the first ``first[lane]`` tokens of each lane."""
    at = np.array(first)[:, None] + np.arange(count)
    if len(lanes.runs) == lanes.count:
        return torch.from_numpy(at + lanes.runs[:, :1] * size).to(device)
    return slots(lanes, torch.from_numpy(at).to(device), size)


def listed(pool: Tensor, lanes: Lanes, index: Tensor) -> Tensor:
    """Tokens ``index`` [b, ..., m] of a pool [pages, PAGE, c], for each key head: [b, h, ..., m, c]."""
    heads = lanes.count // len(index)
    each = index[:, None].expand(-1, heads, *index.shape[1:])
    held = pool.reshape(-1, pool.shape[-1])[slots(lanes, each.flatten(0, 1)).flatten()]
    return held.view(*each.shape, pool.shape[-1])


def ranged(pool: Tensor, lanes: Lanes, sequences: int, start: int, stop: int) -> Tensor:
    """Tokens ``start`` to ``stop`` of a pool [pages, PAGE, c], [b, h, n, c]: a view where lanes lie in a run each and
    evenly spaced, a copy otherwise."""
    heads, n, c = lanes.count // sequences, stop - start, pool.shape[-1]
    if len(lanes.runs) == lanes.count:
        bases = [first * PAGE for first in lanes.runs[:, 0].tolist()]
        step = bases[1] - bases[0] if len(bases) > 1 else 0
        if step >= 0 and all(base == bases[0] + i * step for i, base in enumerate(bases)):
            strides = (heads * step * c, step * c, c, 1)
            return pool.as_strided((sequences, heads, n, c), strides, pool.storage_offset() + (bases[0] + start) * c)
    pages = table(lanes, pool.device)[:, start // PAGE : -(-stop // PAGE)]
    return pool[pages].reshape(sequences, heads, -1, c)[:, :, start % PAGE : start % PAGE + n]
