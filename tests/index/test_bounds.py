"""Page bounds: no product of a query with a key of the page exceeds them."""

import pytest
import torch
from torch import Tensor

from kvote.index.bounds import Bounds, BoundsIndex
from kvote.kernels import reference
from kvote.store.uncompressed import UncompressedSegment

N, D = 203, 32


def bounded(page: int, dtype: torch.dtype, size: float = 1.0) -> tuple[Bounds, Tensor, Tensor]:
    """Bounds over random keys, one query [1, 4, 1, d], and its products [4, n] with the keys."""
    key = (size * torch.randn(1, 2, N, D)).to(dtype)
    segment = UncompressedSegment(2, key, D, None)
    segment.add_sequences(1)
    segment.add_index(BoundsIndex(page), 0)
    for start in range(0, N, 29):
        part = key[:, :, start : start + 29]
        segment.append([0], part, part, torch.arange(start, start + part.shape[2])[None])
    bounds, query = segment.indexes["page bounds"], torch.randn(1, 4, 1, D).to(dtype)
    assert isinstance(bounds, Bounds)
    return bounds, query, reference.scores(query, key)[0, 0]


@pytest.mark.parametrize("page", [2, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bound_is_at_least_the_largest_product_in_its_page(page, dtype):
    bounds, query, products = bounded(page, dtype)
    got = bounds.scores(query, [0], N)[0, :, 0]
    assert got.shape == (4, -(-N // page))
    filled = torch.nn.functional.pad(products, (0, -N % page), value=float("-inf"))
    largest = filled.reshape(4, -1, page).amax(2)
    assert bool((got >= largest - 1e-4).all())
    assert bool((got > largest + 1e-4).any())


def test_bounds_of_single_tokens_are_their_products():
    bounds, query, products = bounded(1, torch.float32)
    torch.testing.assert_close(bounds.scores(query, [0], N)[0, :, 0], products, atol=1e-4, rtol=1e-4)


def test_large_keys_in_half_precision_do_not_overflow():
    bounds, query, _ = bounded(16, torch.float16, size=5000.0)
    got = bounds.scores(query, [0], N)
    assert bool(got.isfinite().all())
    assert float(got.max()) > 65504
