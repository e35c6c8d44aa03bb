"""Rotations spread outliers over all channels, and can be undone."""

import pytest
import torch
from torch import Tensor

from kvote import kernels
from kvote.kernels import packing
from kvote.store import packed
from kvote.store.codec import Codec
from kvote.store.transform import Rotation, hadamard


def sylvester(n: int) -> Tensor:
    """H of 2 n is [[H, H], [H, -H]]."""
    return torch.ones(1, 1) if n == 1 else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester(n // 2))


@pytest.mark.parametrize("n", [1, 2, 16, 64, 128, 512, 2048])
def test_powers_of_two_are_multiplied_by_sylvesters_matrix(n):
    x = torch.randn(3, n)
    torch.testing.assert_close(hadamard(x), x @ sylvester(n) / n**0.5, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "block"), [(80, 16), (96, 32), (384, 128), (7, 1)])
def test_other_sizes_are_rotated_in_blocks(n, block):
    x = torch.randn(3, n)
    blocks = torch.block_diag(*[sylvester(block) / block**0.5] * (n // block))
    torch.testing.assert_close(hadamard(x), x @ blocks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 3, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
def test_what_was_rotated_is_rotated_back(heads, ordered):
    x = torch.randn(2, 8, 5, 32)
    order = tuple(torch.randperm(8 * 32).tolist()) if ordered else ()
    turn = Rotation(heads, order).of(8, 32, x.device)
    rotated = turn.apply(x)
    assert not torch.allclose(rotated, x, atol=0.1)
    torch.testing.assert_close(turn.undo(rotated), x, atol=1e-5, rtol=1e-5)
    together = [4, 1][heads == 3] if heads in (3, 4) else heads
    if not ordered:
        # Key heads that are rotated together are side by side; others are not touched.
        alone = turn.apply(torch.cat([x[:, :together], torch.zeros_like(x[:, together:])], dim=1))
        torch.testing.assert_close(alone[:, :together], rotated[:, :together])
        assert bool((alone[:, together:] == 0).all())


def test_an_order_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="an order of 3 channels does not fit 2 key heads of 32"):
        Rotation(1, (0, 1, 2)).of(2, 32, torch.device("cpu"))


def error(x: Tensor, turn: Rotation | None) -> float:
    """Of keys [b, h, n, d] in 2 bits per token."""
    form = turn.of(x.shape[1], x.shape[3], x.device) if turn else None
    rotated = x if form is None else form.apply(x)
    codes, scale, least = packing.quantise_values(rotated, 2, 128)
    got = packing.dequantise(codes, scale, least)
    return float((got if form is None else form.undo(got)).sub(x).square().mean())


def ordered(x: Tensor, heads: int) -> Rotation:
    sums = Rotation(heads).of(x.shape[1], x.shape[3], x.device).apply(x).double().sum(dim=(0, 2)).flatten()
    return Rotation(heads, tuple(sums.argsort(stable=True).tolist()))


def test_rotation_over_heads_and_order_take_error_away():
    """Some channels of one head are hot, and all have an offset, as those of keys before their rotation have."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 400, 128, generator=generator)
    x[:, 1, :, [3, 40, 77]] += torch.tensor([30.0, -30.0, 30.0])
    x += 0.5 * torch.randn(1, 4, 1, 128, generator=generator)
    plain, whole = error(x, None), error(x, ordered(x, 4))
    assert whole < plain / 20
    # Without the order, and with every head rotated by itself.
    assert whole < error(x, Rotation(4)) / 2
    assert whole < error(x, ordered(x, 1)) / 1.5


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("by_head", [False, True])
def test_lists_give_what_ranges_give(backend, by_head, monkeypatch):
    if backend:
        monkeypatch.setenv("KVOTE_BACKEND", backend)
    order = tuple(torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist())
    like = torch.empty(0, 16)
    keys, _ = Codec(4, 32, True, 1.0, Rotation(4, order)).lanes(4, like, 16)
    keys.add_sequences(2)
    x = torch.randn(2, 4, 150, 16)
    keys.append([0, 1], x)
    whole = keys.unpack([0, 1], range(150))
    assert float((whole - x).abs().max()) < 1
    lists = torch.stack([torch.randperm(150)[:40].sort().values for _ in range(2 * 8)]).view(2, 8, 40)
    lists = lists if by_head else lists[:, 0].contiguous()
    got = keys.unpack([0, 1], lists, room=3)
    wanted = whole.repeat_interleave(2, 1) if by_head else whole
    at = lists[..., None] if by_head else lists[:, None, :, None]
    torch.testing.assert_close(got[:, :, :40], wanted.gather(2, at.expand(-1, wanted.shape[1], -1, 16)))
    assert got.shape[2] == 43
    query = torch.randn(2, 8, 2, 16)
    torch.testing.assert_close(
        packed.scores(query, keys, [0, 1], range(5, 150)), kernels.scores(query, whole[:, :, 5:])
    )
