"""MInference: the proofs of its card (arXiv 2407.02490)."""

from typing import Any

import pytest
import scored
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor

from kvote import Cache, InputError, MethodError
from kvote.calibration import Calibration, Fingerprint
from kvote.calibration.measure import measure_patterns
from kvote.calibration.patterns import CANDIDATES, KIND, PatternSearch, candidates, patterns_of
from kvote.method import Method
from kvote.methods import minference
from kvote.read.patterns import Pattern
from kvote.spec import parse

N, BLOCK, LAST, FIRST, NEAREST = 90, 8, 12, 2, 4
SMALL = f"block={BLOCK}, last={LAST}, first={FIRST}, nearest={NEAREST}"
SLASHES, WINDOWS, BLOCKS = (6, 9), (3, 13), (4,)
PATTERNS = {
    "vertical_slash": (SLASHES, f"vertical={SLASHES[0]}, slash={SLASHES[1]}"),
    "a_shape": (WINDOWS, f"sinks={WINDOWS[0]}, local={WINDOWS[1]}"),
    "block_sparse": (BLOCKS, f"blocks={BLOCKS[0]}"),
}


def spec(kind: str) -> str:
    return f"minference(pattern={kind!r}, {PATTERNS[kind][1]}, {SMALL})"


def sums(fed: Fed, head: int) -> tuple[list[float], list[float]]:
    """Of one query head: softmax weights of the last queries, added up by column and by diagonal, number by number."""
    query, key = fed.rotated(fed.query, 0, N)[0, head], fed.rotated(fed.key, 0, N)[0, head // 2]
    columns, diagonals = [0.0] * N, [0.0] * N
    for slot in range(N - LAST, N):
        for j, weight in enumerate((key[: slot + 1] @ query[slot] / DIM**0.5).softmax(0).tolist()):
            columns[j] += weight
            diagonals[slot - j] += weight
    return columns, diagonals


def largest(scores: list[float], k: int, forced: int) -> list[int]:
    """The forced ones, and then the best of the others."""
    rest = sorted(range(forced, len(scores)), key=lambda i: -scores[i])
    return [*range(forced), *rest[: k - forced]]


def wanted(fed: Fed, kind: str, sizes: tuple[int, ...], head: int) -> list[tuple[set[int], list[int]]]:
    """By block of rows: the tokens before it that a head's pattern has, and the others, those that come nearest
    first."""
    columns, diagonals = sums(fed, head)
    query, key = fed.rotated(fed.query, 0, N)[0, head], fed.rotated(fed.key, 0, N)[0, head // 2]
    found = []
    for start in range(0, N, BLOCK):
        if kind == "vertical_slash":
            chosen = set(largest(columns, sizes[0], FIRST))
            for o in largest(diagonals, sizes[1], NEAREST):
                chosen |= set(range(start - o, start + BLOCK - o))
            order = sorted(range(start), key=lambda j: -columns[j])
        elif kind == "a_shape":
            chosen = {j for j in range(start) if j < sizes[0] or j > start - sizes[1]}
            order = list(range(start))[::-1]
        else:
            mean = query[start : start + BLOCK].mean(0)
            scores = [float(mean @ key[j : j + BLOCK].mean(0)) for j in range(0, start, BLOCK)]
            best = sorted(range(len(scores)), key=lambda i: -scores[i])
            chosen = {BLOCK * i + j for i in best[: sizes[0] - 1] for j in range(BLOCK)}
            order = [BLOCK * i + j for i in best for j in range(BLOCK)]
        chosen = {j for j in chosen if 0 <= j < start}
        found.append((chosen, [j for j in order if j not in chosen]))
    return found


def mask(fed: Fed, patterns: list[tuple[str, tuple[int, ...]]]) -> Tensor:
    """What each row of each head sees [heads, n, n]."""
    seen = torch.zeros(len(patterns), N, N, dtype=torch.bool)
    each = [wanted(fed, kind, sizes, head) for head, (kind, sizes) in enumerate(patterns)]
    for i, start in enumerate(range(0, N, BLOCK)):
        rows = slice(start, start + BLOCK)
        most = max(len(heads[i][0]) for heads in each)
        for head, heads in enumerate(each):
            chosen, rest = heads[i]
            seen[head, rows, sorted(chosen) + rest[: most - len(chosen)]] = True
        seen[:, rows, rows] = True
    return seen & torch.ones(N, N).tril().bool()


def answer(fed: Fed, seen: Tensor) -> Tensor:
    query, key = fed.rotated(fed.query, 0, N), fed.rotated(fed.key, 0, N)
    key, value = (x.repeat_interleave(2, 1) for x in (key, fed.value[:, :, :N]))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen[None]).transpose(1, 2)


def fed(method: Any, n: int = N) -> tuple[Fed, Tensor]:
    torch.manual_seed(0)
    made = Fed(method, n=N + 3)
    return made, made.feed(n)


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("more", ["", " | tokenselect(top_k=8, sinks=2, window=6, tail=0)"])
def test_answers_are_those_of_the_published_mask(kind, more):
    """Keys may be held with the model's rotation or without."""
    made, got = fed(spec(kind) + more)
    seen = mask(made, [(kind, PATTERNS[kind][0])] * 4)
    assert 0.1 < float(seen.float().mean()) / 0.5 < 0.9
    torch.testing.assert_close(got, answer(made, seen), atol=1e-5, rtol=1e-5)


OTHERS = {
    "columns alone": ("vertical_slash", (6, 4)),
    "diagonals alone": ("vertical_slash", (2, 9)),
    "fewer blocks": ("block_sparse", (3,)),
    "a shorter window": ("a_shape", (3, 5)),
    "no sinks": ("a_shape", (0, 13)),
}


@pytest.mark.parametrize(("kind", "sizes"), OTHERS.values(), ids=OTHERS)
def test_other_sizes_answer_something_else(kind, sizes):
    made, got = fed(spec(kind))
    assert not torch.allclose(got, answer(made, mask(made, [(kind, sizes)] * 4)), atol=1e-3)


def test_the_last_queries_judge_and_forced_columns_and_diagonals_are_taken(monkeypatch):
    made, got = fed(spec("vertical_slash"))
    for name, other in (("LAST", 4), ("FIRST", 0), ("NEAREST", 0)):
        with monkeypatch.context() as patch:
            patch.setitem(globals(), name, other)
            assert not torch.allclose(got, answer(made, mask(made, [("vertical_slash", SLASHES)] * 4)), atol=1e-4), name


def calibrated(net: Any, layers: dict[str, Any]) -> Calibration:
    return Calibration(KIND, Fingerprint.of(net), {"tokens": 9, "layers": layers})


def test_every_head_reads_in_its_own_pattern_and_shorter_lists_are_filled_up():
    each = [("a_shape", (3, 13)), ("vertical_slash", (6, 9)), ("block_sparse", (4,)), ("vertical_slash", (9, 12))]
    held = calibrated(tiny.model(), {"0": [[kind, *sizes] for kind, sizes in each]})
    method = parse("dense") | minference(held, block=BLOCK, last=LAST, first=FIRST, nearest=NEAREST)
    torch.manual_seed(0)
    made = Fed("dense", n=N + 3)
    made.layer.__init__(0, method, made.rope)
    got = made.feed(N)
    torch.testing.assert_close(got, answer(made, mask(made, each)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, answer(made, mask(made, each[::-1])), atol=1e-3)


@pytest.mark.parametrize("sizes", ["vertical=90", "slash=500", "pattern='a_shape', sinks=50, local=40"])
def test_sizes_that_cover_a_prompt_are_dense_attention_bit_by_bit(sizes):
    made, got = fed(f"minference({sizes}, {SMALL})".replace("vertical=90", "vertical=90, slash=100"))
    assert made.layer.activity.selections == 0
    assert torch.equal(got, fed("dense")[1])


def test_every_row_sees_itself_and_nothing_after_it():
    torch.manual_seed(0)
    made = Fed(spec("vertical_slash"), n=N)
    # A query that looks at itself alone answers its own value, and nothing reaches it from behind.
    made.query, made.key = 40 * made.key.repeat_interleave(2, 1), 40 * made.key
    own = made.value.repeat_interleave(2, 1).transpose(1, 2)
    torch.testing.assert_close(made.feed(N), own, atol=1e-3, rtol=1e-3)


def test_generated_tokens_read_everything():
    made, _ = fed(spec("vertical_slash"))
    for _ in range(3):
        torch.testing.assert_close(made.feed(1), made.dense(1), atol=1e-5, rtol=1e-5)
    assert made.layer.activity.tokens_read == N + 3


STEPS = ("quest(token_budget=12, page=4, dense_layers=0)", "oracle(top_k=5)", "sparq(rank=4, top_k=6, local=2)")


@pytest.mark.parametrize("steps", STEPS)
def test_joined_with_another_reader_each_reads_its_own_part(steps):
    """Prompts as without the other, generated tokens as the other reads the same keys."""
    (alone, prompt), (joint, got) = fed(spec("vertical_slash")), fed(f"{steps} | {spec('vertical_slash')}")
    assert torch.equal(prompt, got)
    other, _ = fed(steps)
    for _ in range(3):
        step = joint.feed(1)
        assert torch.equal(step, other.feed(1))
        assert not torch.allclose(step, alone.feed(1), atol=1e-3)


def test_what_is_joined_is_kept_apart_by_name():
    for other in ("infllm", "actqkv", "streamingllm", "sentencekv(ends=(7,))"):
        with pytest.raises(MethodError, match="must have read them itself"):
            parse(f"minference | {other}")
    for both in ("minference | minference", "quest | tokenselect", "quest | minference | oracle"):
        with pytest.raises(MethodError, match="both decide what to read"):
            parse(both)
    assert parse("minference | tokenselect").needs.keys is parse("tokenselect").needs.keys
    held = calibrated(tiny.model(), {"0": [["a_shape", 3, 13]] * 4})
    razor = scored.file(scored.razor(tiny.model(), [[0.1, 0.9]] * 2))
    with pytest.raises(MethodError, match=r"by their places in the whole layer.*leave patterns out"):
        minference(held) | parse(f"razorattention(heads={razor!r})")
    assert parse(f"razorattention(heads={razor!r}) | minference").read.pattern.kind == "vertical_slash"


@pytest.mark.parametrize("kind", ["vertical_slash", "block_sparse"])
def test_passes_are_judged_by_their_own_last_queries(kind):
    whole, parts = fed(spec(kind))[1], fed(spec(kind), 45)
    assert not torch.allclose(torch.cat([parts[1], parts[0].feed(N - 45)], 1), whole, atol=1e-3)


@pytest.mark.parametrize("cut", [1, 40, 45])
def test_a_window_does_not_depend_on_passes(cut):
    whole, parts = fed(spec("a_shape"))[1], fed(spec("a_shape"), cut)
    torch.testing.assert_close(torch.cat([parts[1], parts[0].feed(N - cut)], 1), whole, atol=1e-5, rtol=1e-5)


def test_the_pattern_whose_answers_differ_from_dense_attention_in_the_fewest_numbers_is_found(monkeypatch):
    for name, size in {"N": 300, "BLOCK": 64, "LAST": 64, "FIRST": 30, "NEAREST": 100}.items():
        monkeypatch.setitem(globals(), name, size)
    tried = (Pattern("vertical_slash", (40, 101)), Pattern("a_shape", (40, 90)), Pattern("block_sparse", (2,)))
    torch.manual_seed(0)
    made, search = Fed("dense", n=N), PatternSearch(tried)
    made.query *= 2
    made.layer.__init__(0, Method("search", read=search), made.rope)
    dense = made.feed(N)
    for i, (kind, sizes) in enumerate(tried):
        for head in range(4):
            one = torch.eye(N, dtype=torch.bool)
            for start, (chosen, _) in zip(range(0, N, BLOCK), wanted(made, kind, sizes, head), strict=True):
                one[start : start + BLOCK, sorted(chosen) + list(range(start, min(N, start + BLOCK)))] = True
            got = answer(made, (one & torch.ones(N, N).tril().bool()).expand(4, -1, -1))[:, :, head]
            differ = int(((got - dense[:, :, head]).abs() > 5e-3).sum())
            assert abs(int(search.apart[0][i, head]) - differ) <= 3
    best = search.apart[0].argmin(0).tolist()
    assert search.data(9)["layers"] == {"0": [[tried[i].kind, *tried[i].sizes] for i in best]}
    assert len({*map(tuple, search.apart[0].tolist())}) == 3


def test_patterns_are_measured_and_belong_to_their_model():
    net = tiny.model()
    held = measure_patterns(net, tiny.ids(1, 300))
    found = patterns_of(held)
    assert list(found) == [0, 1]
    assert all(len(heads) == 4 and set(heads) <= set(candidates(300)) for heads in found.values())
    cache = Cache(net, minference(held))
    tiny.feed(net, cache, tiny.ids(1, 250))
    assert all(layer.selections == 1 for layer in cache.report().layers)
    with pytest.raises(InputError, match="made for another model"):
        Cache(tiny.model(num_hidden_layers=4), minference(held))
    with pytest.raises(InputError, match="leave nothing out of 100 tokens"):
        measure_patterns(net, tiny.ids(1, 100))


def test_patterns_tried_are_the_published_ones_but_in_short_texts():
    assert candidates(20_000) == list(CANDIDATES)
    assert all(size >= 30 for kind, (size, *_) in candidates(500) if kind == "vertical_slash")
    assert all(sizes[1] >= 100 for kind, sizes in candidates(500) if kind == "vertical_slash")


@pytest.mark.parametrize(
    "layers",
    [{}, {"9": []}, {"0": [["a_shape", 1, 2]]}, {"0": [["x", 1]] * 4}, {"0": [["a_shape", 1]] * 4}],
)
def test_files_that_make_no_sense_are_refused(layers):
    with pytest.raises(InputError):
        patterns_of(calibrated(tiny.model(), layers))


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"pattern": "stripes"}, "pattern must be 'a_shape', 'vertical_slash', 'block_sparse'; got 'stripes'"),
        ({"patterns": 7}, "patterns must be the name of a file; got 7"),
        ({"vertical": 20}, "vertical must be a whole number of at least 30; got 20"),
        ({"slash": 99}, "slash must be a whole number of at least 100; got 99"),
        ({"pattern": "block_sparse", "blocks": 0}, "blocks must be a whole number of at least 1"),
        ({"last": 0}, "last must be a whole number of at least 1; got 0"),
        ({"block": 0}, "block must be"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, sentence):
    with pytest.raises(MethodError, match=sentence):
        minference(**parameters)


def test_a_row_reads_the_same_whatever_the_others_of_its_batch_are():
    net, tokens = tiny.model(), tiny.ids(3, N)
    caches = [tiny.cache(net, spec("vertical_slash")) for _ in range(2)]
    together, alone = tiny.feed(net, caches[0], tokens), tiny.feed(net, caches[1], tokens[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("announced", [True, False])
def test_drafts_behind_a_prompt_read_everything_and_the_prompt_does_not(announced):
    net, tokens = tiny.model(), tiny.ids(1, N)
    caches = [tiny.cache(net, spec("a_shape")) for _ in range(2)]
    for cache in caches:
        if announced:
            cache.expect(N - 4)
    caches[0].activate_past_recording()
    got = tiny.feed(net, caches[0], tokens)
    expected = tiny.feed(net, caches[1], tokens[:, : N - 4])
    steps = tiny.feed(net, caches[1], tokens[:, N - 4 :], passes=1)
    torch.testing.assert_close(got[:, : N - 4], expected, atol=1e-4, rtol=1e-4)
    # Who is not told where the prompt ends takes all of the first pass for it.
    assert torch.allclose(got[:, N - 4 :], steps, atol=1e-3) == announced
