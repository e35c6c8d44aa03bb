"""Models and layers read with the GPU kernels, in Triton's interpreter, answer as with the reference."""

from unittest import mock

import pytest
import selecting
import tiny
import torch
from calibrated import double_sparsity
from on_gpu import runs
from torch.utils._python_dispatch import TorchDispatchMode

import kvote
from kvote import kernels
from kvote.kernels import gpu
from kvote.store import packed
from kvote.store.uncompressed import UncompressedSegment

pytestmark = [
    runs,
    pytest.mark.skipif(
        not gpu.interpreted(), reason="the models here are on the CPU; test_on_a_gpu.py has layers there"
    ),
]
SPEC = "tokenselect(top_k=8, sinks=2, window=8, chunk=16, tail=2, theta={theta}, sketch={sketch!r})"


def answers(monkeypatch, backend: str, method, columns: int, **options):
    """Logits [steps, rows, vocabulary] and the report of a generation with one backend."""
    monkeypatch.setenv("KVOTE_BACKEND", backend)
    net = tiny.model(num_hidden_layers=1)
    cache = tiny.cache(net, method)
    rows = options.pop("rows", 1)
    out = tiny.generate(net, tiny.ids(rows, columns), cache, max_new_tokens=3, **options)
    return torch.stack(out.logits), cache


@pytest.mark.parametrize(
    "method",
    [
        "dense",
        SPEC.format(theta=2.0, sketch="none"),
        SPEC.format(theta=-1.0, sketch="none"),
        SPEC.format(theta=2.0, sketch="none").replace(")", ", positions='original')"),
        "tokenselect(top_k=8, sinks=2, window=16, chunk=16, theta=-1.0, published=True)",
        "streamingllm(sinks=2, window=12)",
        "h2o(budget=24)",
    ],
)
def test_a_model_answers_as_with_the_reference(monkeypatch, method):
    law, theirs = answers(monkeypatch, "reference", method, 36)
    mine, cache = answers(monkeypatch, "triton", method, 36)
    segment = cache.managed[0].segment
    assert isinstance(segment, UncompressedSegment)
    assert segment.kernels is kernels.named("triton")
    torch.testing.assert_close(mine, law, rtol=1e-4, atol=1e-4)
    assert [(x.selections, x.reused) for x in cache.report().layers] == [
        (x.selections, x.reused) for x in theirs.report().layers
    ]


def packed_reads(monkeypatch) -> list[bool]:
    """Of every read of packed tokens from now on, whether a kernel answered it."""
    seen = []
    there = kernels.named("triton").packed
    for module, name in ((packed, "attend"), (there, "scores"), (there, "select"), (there, "decode")):
        read = getattr(module, name)

        def call(*given, read=read, **options):
            answer = read(*given, **options)
            seen.append(answer is not None)
            return answer

        monkeypatch.setattr(module, name, call)
    return seen


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("kivi(bits=2, residual=32)", 2),
        ("kivi(bits=4, group=64, residual=64)", 1),
        ("kivi(residual=32) | tokenselect(top_k=8, sinks=2, window=40, chunk=16, tail=0, theta=2.0)", 1),
    ],
)
def test_packed_tokens_are_read_from_their_codes(monkeypatch, method, rows):
    law, _ = answers(monkeypatch, "reference", method, 100, rows=rows)
    seen = packed_reads(monkeypatch)
    mine, cache = answers(monkeypatch, "triton", method, 100, rows=rows)
    assert cache.managed[0].segment.values.backend is kernels.named("triton")
    assert len(seen) >= 2
    assert all(seen)
    torch.testing.assert_close(mine, law, rtol=1e-4, atol=1e-4)


class NeverAsked(TorchDispatchMode):
    """Refuses the operations that would have to wait for a GPU: those that ask for a value or for a shape."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        asks = name in self.ASKING or (name.startswith("index") and self.by_mask(args[1]))
        assert not asks, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))

    @staticmethod
    def by_mask(places):
        listed = places if isinstance(places, list | tuple) else []
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in listed)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_that_packs_never_asks_the_device(monkeypatch, rows):
    """Nor does that in which a group of keys is full and a raw page is given back."""
    monkeypatch.setenv("KVOTE_BACKEND", "triton")
    fed = selecting.Fed("kivi(residual=32)", rows=rows, n=98)
    fed.feed(93)
    held = fed.layer.segment
    assert held._state(0) == (64, 61, 0)
    with NeverAsked():
        for _ in range(5):
            fed.feed(1)
    assert held._state(0) == (96, 66, 64)
    assert len(held.packed.positions(0)) == 1


def test_asking_the_device_is_noticed(monkeypatch):
    monkeypatch.setenv("KVOTE_BACKEND", "reference")
    fed = selecting.Fed("kivi(residual=32)", n=41)
    fed.feed(40)
    with NeverAsked(), pytest.raises(AssertionError, match="waits for the device"):
        fed.feed(1)


def test_tokens_in_two_precisions_answer_as_with_the_reference(monkeypatch):
    method = "mikv(budget=24, low_bits=4, group=32)"
    law, _ = answers(monkeypatch, "reference", method, 70)
    mine, cache = answers(monkeypatch, "triton", method, 70)
    assert cache.managed[0].segment.keys.backend is kernels.named("triton")
    torch.testing.assert_close(mine, law, rtol=1e-4, atol=1e-4)


def test_labels_are_scored_on_the_gpu_too(monkeypatch):
    method = double_sparsity(top_k=9, share=0.25, dense_layers=0)
    law, _ = answers(monkeypatch, "reference", method, 70)
    scored = mock.Mock(side_effect=kernels.named("triton").label_scores)
    monkeypatch.setattr(kernels.named("triton"), "label_scores", scored)
    mine, _ = answers(monkeypatch, "triton", method, 70)
    assert scored.called
    torch.testing.assert_close(mine, law, rtol=1e-4, atol=1e-4)


def test_a_batch_answers_as_with_the_reference(monkeypatch):
    method = SPEC.format(theta=0.5, sketch="none")
    law, _ = answers(monkeypatch, "reference", method, 30, rows=2)
    mine, _ = answers(monkeypatch, "triton", method, 30, rows=2)
    torch.testing.assert_close(mine, law, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sketch", ["int8", "int4"])
def test_a_sketch_selects_on_the_gpu_too(monkeypatch, sketch):
    """With as many winners as candidates but one, whatever the sketch loses does not show."""
    monkeypatch.setenv("KVOTE_BACKEND", "triton")
    fed = selecting.Fed(
        f"tokenselect(top_k=40, sinks=2, window=4, chunk=8, tail=0, theta=2.0, sketch={sketch!r})", n=60
    )
    fed.feed(59)
    out = fed.feed(1)
    codes, bits = fed.layer.segment.indexes["sketch"].coded
    assert bits == {"int8": 8, "int4": 4}[sketch]
    assert codes.numel() > 0
    assert bool(out.isfinite().all())
    assert fed.layer.activity.tokens_read == 2 + 40 + 5


def test_the_device_decides_like_the_host(monkeypatch):
    """The selection cache, step by step: what is reused, what is read, and what is counted."""
    lists, counts = {}, {}
    # Weights are made once per process, from a seed of their own.
    tiny.model()
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        monkeypatch.setenv("KVOTE_BACKEND", backend)
        fed = selecting.Fed(selecting.spec(theta=0.5, reuse_span=4, top_k=5), rows=2)
        # Queries that resemble each other, so that some steps reuse and some do not.
        fed.query = fed.query[:, :, :1] + 0.9 * fed.query
        fed.feed(30)
        read = []
        for _ in range(10):
            fed.feed(1)
            read.append(fed.layer.memory.index.clone())
        lists[backend] = torch.stack(read)
        counts[backend] = int(fed.layer.activity.selections), int(fed.layer.activity.reused)
    assert torch.equal(lists["triton"], lists["reference"])
    assert counts["triton"] == counts["reference"]
    assert counts["triton"][1] > 0
    # Rows decide for themselves: one selects anew where the other reuses.
    assert [len({tuple(each[row].tolist()) for each in lists["triton"]}) for row in range(2)] == [7, 4]


def test_the_interpreter_is_never_chosen_unasked(monkeypatch):
    monkeypatch.delenv("KVOTE_BACKEND", raising=False)
    assert kernels.chosen(torch.zeros(1, 64)).NAME != "triton"
    assert kernels.chosen(torch.zeros(1, 63)).NAME == "reference"


def test_what_is_not_read_falls_back_to_the_reference(monkeypatch):
    monkeypatch.setenv("KVOTE_BACKEND", "triton")
    assert kernels.chosen(torch.zeros(1, 64)).NAME == "triton"
    assert kernels.chosen(torch.zeros(1, 64, dtype=torch.float64)).NAME == "reference"
    assert kernels.chosen(torch.zeros(1, 272)).NAME == "reference"


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setenv("KVOTE_BACKEND", "triton")
    monkeypatch.setattr(gpu, "_installed", lambda: False)
    with pytest.raises(kvote.errors.InputError, match="Triton is not installed"):
        kernels.backend()


def test_bytes_of_page_tables_on_the_device_are_counted(monkeypatch):
    monkeypatch.setenv("KVOTE_BACKEND", "triton")
    fed = selecting.Fed("dense")
    fed.feed(10)
    tables = [t for lanes in fed.layer.segment.pool._tables.values() for t in lanes.tables.values()]
    assert tables
    before = fed.layer.nbytes
    fed.layer.segment.pool._tables.clear()
    assert before - fed.layer.nbytes == sum(t.nbytes for t in tables)
