"""Bytes of packed pages that hold no token are no state: files and comparisons find zeros there."""

from pathlib import Path

import pytest
import tiny
import torch

from kvote import Cache
from kvote.kernels import packing
from kvote.kernels.choice import chosen, named
from kvote.kernels.packing import PACKED, Packing
from kvote.saving.classes import forms
from kvote.saving.pages import describe_pool
from kvote.state import Describer
from kvote.store.packed import PackedLanes
from kvote.store.pages import PagePool

FORMS = {"keys by channel": (True, False), "keys by token": (True, True), "values": (False, False)}


def form_of(kind: str, bits: int, dim: int) -> Packing:
    are_keys, by_token = FORMS[kind]
    return Packing(bits, 32, dim, torch.float32, are_keys, by_token)


def lanes(form: Packing, backend: str) -> PackedLanes:
    like = torch.empty(0, form.dim)
    made = PackedLanes(2, form, like.device, backend=named("reference") if backend == "law" else chosen(like))
    made.add_sequences(1)
    return made


def described(held: PackedLanes) -> torch.Tensor:
    describer = Describer(forms())
    describe_pool(held.pool, describer, "pool")
    return describer.tensors["pool.pages"].make()


@pytest.mark.parametrize("backend", ["law", "fastest"])
@pytest.mark.parametrize("dim", [20, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", FORMS)
def test_equal_tokens_in_dirty_pages_are_equal_bytes(kind, bits, dim, backend):
    form, x = form_of(kind, bits, dim), torch.randn(2, 300, dim, generator=torch.Generator().manual_seed(0))[None]
    for n in (160, 256) if kind == "keys by channel" else (131, 145, 255, 256):
        clean, dirty = lanes(form, backend), lanes(form, backend)
        clean.append([0], x[:, :, :n])
        dirty.reserve([0], 300)
        dirty.pool.parts["pages"].fill_(0xA5)
        dirty.append([0], x[:, :, :n])
        cropped = lanes(form, backend)
        cropped.append([0], x[:, :, :288])
        cropped.append([0], 3 * x[:, :, :288])
        cropped.truncate(0, n)
        for other in (dirty, cropped):
            assert torch.equal(described(other), described(clean))
            assert torch.equal(other.unpack([0], range(n)), clean.unpack([0], range(n)))


def test_scales_of_a_group_that_is_cut_stay():
    form = form_of("keys by channel", 2, 16)
    held, x = lanes(form, "law"), torch.randn(1, 2, 128, 16, generator=torch.Generator().manual_seed(0))
    held.append([0], x)
    page = held.pool.parts["pages"][0].clone()
    packing.erase(form, page, 40)
    got = packing.unpack(page[None], form, torch.arange(PACKED))
    assert torch.equal(got[:40], held.unpack([0], range(128))[0, 0, :40])
    assert bool((got[64:] == 0).all())
    assert not bool((got[40:64] == 0).any())


@pytest.mark.parametrize("spec", ["kivi(residual=32)", "mikv(budget=20)"])
def test_caches_in_dirty_memory_write_the_same_file(spec, tmp_path: Path, monkeypatch):
    net, tokens, laid_out, files = tiny.model(), tiny.ids(1, 180), PagePool._laid_out, []
    for dirt in (0, 0xA5):

        def on_dirt(pool, part, old, new, pages, dirt=dirt):
            made = laid_out(pool, part, old, new, pages)
            made[sorted(set(range(pages)) - set(new.tolist()))] = dirt
            return made

        monkeypatch.setattr(PagePool, "_laid_out", on_dirt)
        cache = Cache(net, spec)
        tiny.feed(net, cache, tokens[:, :100])
        tiny.feed(net, cache, tokens[:, 100:], passes=1)
        cache.save(tmp_path / str(dirt))
        files.append((tmp_path / str(dirt)).read_bytes())
    assert files[0] == files[1]
