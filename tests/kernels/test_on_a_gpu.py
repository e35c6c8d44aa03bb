"""What only a GPU can show: real sizes, no waiting, captured graphs. Run with ``-m gpu`` (without TRITON_INTERPRET)."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from on_gpu import (
    PacksThere,
    There,
    append_stores_and_sketches,
    attend_equals_the_law,
    decode_equals_the_law,
    gather_fetches_and_turns,
    kernels,
    label_scores_equal_the_law,
    mass_equals_the_law,
    pack_writes_what_the_law_writes,
    packed_attend_equals_the_law,
    packed_scores_equal_the_law,
    sketch_is_that_of_the_law,
    unpack_gives_what_the_law_gives,
    votes_equal_the_law,
)
from packs import PackCase
from paged import Case

from kvote.kernels import gpu
from kvote.layer import Layer, Step
from kvote.rope import Rope
from kvote.spec import parse
from kvote.store.segment import Scaling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu.interpreted() or gpu.why_not() is not None, reason=str(gpu.why_not())),
    # torch says this the first time it is asked to look; as an error it would leave that mode on for all that follow.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(BF16, 128, 7), (BF16, 256, 2), (F16, 80, 4), (F16, 64, 8), (F32, 96, 1)]
METHODS = ["dense", *(f"tokenselect(top_k=256, sinks=16, window=64, theta={theta})" for theta in (2.0, 0.9, -1.0))]
METHODS += [f"tokenselect(top_k=256, sinks=16, window=64, theta=2.0, sketch={s!r})" for s in ("int8", "int4")]
METHODS += ["kivi", "kivi(bits=4, group=64, residual=64)"]


@contextmanager
def never_waiting() -> Iterator[None]:
    """What waits for the device in here is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("dtype", "d", "groups"), SHAPES)
@pytest.mark.parametrize("n", [1, 1000, 20_001])
def test_kernels_equal_the_reference_at_real_sizes(n, dtype, d, groups):
    case = Case(n=n, sequences=2, groups=groups, d=d, dtype=dtype)
    decode_equals_the_law(case, range(n))
    decode_equals_the_law(case, range(n), stops=[max(1, n // 3), n], softcap=20.0)
    decode_equals_the_law(case, min(n, 2688), pairs=d // 2)
    mass_equals_the_law(case, 0, [n] * 2)
    gather_fetches_and_turns(case, min(n, 2688), d // 2, interleaved=True)
    append_stores_and_sketches(case, 1, [n - 1] * 4, 8, d)
    for bits in (0, 8, 4):
        votes_equal_the_law(case, 0, [n], min(n, 300), bits)
    for bits in (8, 4):
        sketch_is_that_of_the_law(case, bits)


@pytest.mark.parametrize(("dtype", "d", "groups"), SHAPES)
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (2, 128), (4, 32), (4, 64)])
@pytest.mark.parametrize("n", [1, 1000, 20_001])
def test_packed_tokens_equal_the_reference_at_real_sizes(n, bits, group, dtype, d, groups):
    case = Case(n=n, sequences=2, groups=groups, d=d, dtype=dtype)
    for pack in (PackCase(case, bits, group), PackCase(case, bits, group, by_token=True)):
        packed_attend_equals_the_law(pack, range(n))
        packed_attend_equals_the_law(pack, range(n // 2, n), stops=[n // 3, n], softcap=20.0)
        packed_attend_equals_the_law(pack, range(n), recent=range(5, 200))
        packed_scores_equal_the_law(pack, range(n // 3, n), 2)
        pack_writes_what_the_law_writes(pack, [0, n // 3, n // 2, n // 2 + 1], n // 3)
        unpack_gives_what_the_law_gives(pack, range(n // 3, n))
        unpack_gives_what_the_law_gives(pack, min(n, 2688))
    label_scores_equal_the_law(case, n // 3, n, 1, d // 16)


def test_reading_packed_tokens_never_waits_and_can_be_captured():
    """One captured call serves every length that the device names."""
    held = PacksThere(PackCase(Case(n=5000, groups=4, d=128, dtype=BF16)))
    (keys, values), raw = held.there(), There(Case(n=200, d=128, dtype=BF16))
    query = torch.randn(1, 8, 128, dtype=BF16, device="cuda")
    stops = torch.tensor([5000], dtype=torch.int32, device="cuda")
    recent = raw.keys, raw.values, raw.table(), range(200)

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        attend = kernels().packed.attend
        return attend(query, keys, values, range(5000), recent=recent, scale=0.1, softcap=None, stops=stops)

    read()
    kernels().packed.scores(query[:, :, None], keys, range(5000))
    with never_waiting():
        read()
        kernels().packed.scores(query[:, :, None], keys, range(5000))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = read()
    for stop in (4000, 130, 0):
        stops.fill_(stop)
        graph.replay()
        torch.cuda.synchronize()
        for mine, other in zip(captured, read(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "d", "groups"), SHAPES)
@pytest.mark.parametrize("t", [1, 100, 512])
def test_chunks_equal_the_reference_at_real_sizes(t, dtype, d, groups):
    case = Case(n=2688, groups=groups, d=d, dtype=dtype)
    attend_equals_the_law(case, t)
    attend_equals_the_law(case, t, causal=False)
    attend_equals_the_law(case, t, window=300, softcap=20.0)


def rotary(positions, dtype):
    frequencies = 1e6 ** (-torch.arange(0, 128, 2, device=positions.device) / 128)
    angles = positions[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def step(position: int, t: int, seed: int) -> Step:
    random = torch.Generator("cuda").manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, t, 128, dtype=BF16, device="cuda", generator=random) for heads in (8, 2, 2)
    )
    positions = torch.arange(position, position + t, device="cuda")[None]
    ahead = None if t == 1 else 0
    return Step(query, key, value, positions, None, 1, Scaling(128**-0.5), decode=t == 1, ahead=ahead)


def filled(method: str) -> Layer:
    """A layer after a prompt and two steps: tables are made, kernels compiled."""
    layer = Layer(0, parse(method), Rope(rotary))
    layer.expect(5000)
    layer.attend(step(0, 3000, 0))
    for i in range(2):
        layer.attend(step(3000 + i, 1, 1 + i))
    return layer


@pytest.mark.parametrize("method", METHODS)
def test_a_decode_step_never_waits_for_the_device(method):
    layer, following = filled(method), [step(3002 + i, 1, 3) for i in range(3)]
    with never_waiting():
        for each in following:
            layer.attend(each)
    assert layer.seen == 3005


def test_a_step_that_fills_a_group_of_keys_never_waits_either():
    """Nor one that gives a raw page back, or takes a new one."""
    layer, following = filled("kivi"), [step(3002 + i, 1, 3) for i in range(150)]
    assert layer.segment is not None
    before = layer.segment.keys.length(0)
    with never_waiting():
        for each in following:
            layer.attend(each)
    assert layer.segment.keys.length(0) > before


@pytest.mark.parametrize("method", METHODS)
def test_a_decode_step_can_be_captured(method):
    """A replayed graph gives what the step gives when it is called."""
    expected = filled(method).attend(step(3002, 1, 3)).clone()
    layer, asked = filled(method), step(3002, 1, 3)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = layer.attend(asked)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_answers_as_with_the_reference(method, monkeypatch):
    """In float32, where both must select the same tokens; sketches choose among nearly equal ones, so not with them."""
    if "sketch" in method:
        pytest.skip("a sketch is lossy, and the reference has none")

    def answers() -> torch.Tensor:
        layer = Layer(0, parse(method), Rope(rotary))
        outs = []
        for position, t, seed in ((0, 3000, 0), (3000, 1, 1), (3001, 1, 2)):
            given = step(position, t, seed)
            wide = {name: getattr(given, name).float() for name in ("query", "key", "value")}
            outs.append(layer.attend(Step(**{**vars(given), **wide})))
        return torch.cat(outs, dim=1)

    mine = answers()
    monkeypatch.setenv("KVOTE_BACKEND", "reference")
    torch.testing.assert_close(mine, answers(), rtol=1e-3, atol=1e-4)
