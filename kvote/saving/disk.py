"""Tokens on a disk as state: they are read back for a file, and written anew by whoever loads it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvote.state import Block, Describer, Maker
from kvote.store.disk_region import DiskRegion
from kvote.store.pages import PAGE


def describe_disk(region: DiskRegion, describer: Describer, path: str) -> dict[str, Any]:
    """For each sequence its keys and values [h, n, c], and its positions."""
    rows = []
    for row in range(len(region.blocks)):
        names = []
        for side, dim in enumerate(region.dims):
            block = Block((region.heads, region.length(row), dim), region.dtype, partial(_side, region, side, row))
            names.append(describer.block(f"{path}.{row}.{side}", block))
        rows.append([*names, describer.tensor(region.positions(row), f"{path}.{row}.positions")])
    return {"rows": rows}


def _side(region: DiskRegion, side: int, row: int) -> Tensor:
    return region.side(side, [row], range(region.length(row)))[0].contiguous()


def fill_disk(region: DiskRegion, facts: dict[str, Any], maker: Maker) -> None:
    """Raises ValueError for tokens of another form than this method's."""
    if facts.keys() != {"rows"} or not isinstance(facts["rows"], list):
        raise ValueError("tokens on a disk are described otherwise than this method's")
    region.blocks, region.places = [], []
    region.add_sequences(len(facts["rows"]))
    for row, each in enumerate(facts["rows"]):
        key, value, places = (maker.tensor(name) for name in each)
        n = places.shape[-1]
        fits = [part.shape == (region.heads, n, dim) for part, dim in zip((key, value), region.dims, strict=True)]
        if not all(fits) or {key.dtype, value.dtype} != {region.dtype} or n % PAGE:
            raise ValueError("tokens on a disk have another form than this method's")
        if places.dtype != torch.int32 or places.dim() != 2 or len(places) not in (1, region.heads):
            raise ValueError("tokens on a disk stand at other positions than there are")
        if places.numel() and int(places.min()) < 0:
            raise ValueError("a position is negative")
        region.write(row, key, value)
        region.leave(row, places)
