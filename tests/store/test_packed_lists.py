"""Lists over a packed body and the raw tokens behind it give the tokens that they name, as they decode."""

import pytest
import torch

from kvote.store.codec import Codec
from kvote.store.quantised import QuantisedSegment

HEADS, GROUPS, D, N = 2, 2, 32, 180


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("m", [1, 40, 179, N])
def test_a_list_gives_what_a_range_decodes_to_on_either_side_of_the_border(by_head: bool, m: int) -> None:
    torch.manual_seed(m)
    key, value = torch.randn(3, HEADS, N, D), torch.randn(3, HEADS, N, D)
    segment = QuantisedSegment(HEADS, key[:, :, :1], D, None, codec=Codec(4, 32), residual=32)
    rows = [0, 1, 2]
    segment.add_sequences(3)
    segment.append(rows, key, value, torch.arange(N).expand(3, N))
    assert segment.compress(0)
    lists = (3, HEADS * GROUPS) if by_head else (3,)
    index = torch.rand(*lists, N).topk(m).indices.sort(dim=-1).values
    # One sequence reads the last tokens only, one the first only: their lists cross the border at different places.
    index[0], index[1] = torch.arange(N - m, N), torch.arange(m)
    read = segment.listed(rows, index)
    each = index if by_head else index[:, None].expand(3, HEADS, m)
    for got, held in zip(read, segment.decode(rows, 0, N), strict=True):
        whole = held.repeat_interleave(GROUPS, dim=1) if by_head else held
        assert torch.equal(got, whole.gather(2, each[..., None].expand(*each.shape, D)))
