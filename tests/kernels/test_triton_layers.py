"""Models and layers read with the GPU kernels answer as with the reference, and a GPU is never waited for."""

import pytest
import selecting
import tiny
import torch
from on_gpu import runs

import kvote
from kvote import kernels
from kvote.store.raw import RawSegment

pytestmark = runs
SPEC = "tokenselect(top_k=8, sinks=2, window=8, chunk=16, tail=2, theta={theta}, sketch={sketch!r})"


def answers(monkeypatch, backend: str, method: str, columns: int, **options):
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
        "streamingllm(sinks=2, window=12)",
        "h2o(budget=24)",
    ],
)
def test_a_model_answers_as_with_the_reference(monkeypatch, method):
    law, theirs = answers(monkeypatch, "reference", method, 36)
    mine, cache = answers(monkeypatch, "triton", method, 36)
    segment = cache.managed[0].segment
    assert isinstance(segment, RawSegment)
    assert segment._backend == "triton"
    torch.testing.assert_close(mine, law, rtol=1e-4, atol=1e-4)
    assert [(x.selections, x.reused) for x in cache.report().layers] == [
        (x.selections, x.reused) for x in theirs.report().layers
    ]


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
    assert fed.layer.segment.sketch_bits == {"int8": 8, "int4": 4}[sketch]
    assert fed.layer.segment.pool.sketch.numel() > 0
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
    assert kernels.chosen(torch.zeros(1, 64)) != "triton"
    assert kernels.chosen(torch.zeros(1, 63)) == "reference"


def test_what_is_not_read_falls_back_to_the_reference(monkeypatch):
    monkeypatch.setenv("KVOTE_BACKEND", "triton")
    assert kernels.chosen(torch.zeros(1, 64)) == "triton"
    assert kernels.chosen(torch.zeros(1, 64, dtype=torch.float64)) == "reference"
    assert kernels.chosen(torch.zeros(1, 272)) == "reference"


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setenv("KVOTE_BACKEND", "triton")
    monkeypatch.setattr(kernels.gpu, "_installed", lambda: False)
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
