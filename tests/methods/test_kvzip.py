"""KVzip: the proofs of its card (arXiv 2505.23416)."""

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import kvote
from kvote import InputError, InterruptedPassError, MethodError
from kvote.keep.score import repeat_attention
from kvote.keep.score.repeat_attention import RepeatAttention, RepeatMemory
from kvote.spec import parse

N, BUDGET, SINKS = 60, 20, 4
JOINT = f"kvzip(budget={BUDGET}, sinks={SINKS}"
SPEC = f"{JOINT}, even=True"


class Words:
    """A tokenizer that writes every instruction in three words."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        self.input_ids = [7, 8, 9] if len(text) > 1 else [6]
        return self


def attended(net: Any, read: Tensor, repeat: Tensor) -> Tensor:
    """Weights [layer, key heads, query heads of each, of the repeat, all] of a model with the whole text at hand."""
    with torch.no_grad():
        found = net(input_ids=torch.cat([read, repeat], dim=1), output_attentions=True, use_cache=False).attentions
    return torch.stack([layer[0, :, read.shape[1] :].unflatten(0, (2, -1)) for layer in found]).double()


def worth(read: Tensor, repeats: list[Tensor], chunk: int) -> Tensor:
    """The card's formula [layer, key heads, n], from dense attention of each repeat behind the text."""
    n, parts = read.shape[1], []
    for i, repeat in enumerate(repeats):
        start, stop = i * chunk, min(n, (i + 1) * chunk)
        weights = attended(tiny.model(native="eager"), read, repeat)
        allowed = [*range(min(SINKS, start)), *range(start, stop), *range(n, n + repeat.shape[1])]
        weights = weights[..., start:stop] / weights[..., allowed].sum(-1, keepdim=True)
        parts.append(weights.amax(dim=(2, 3)))
    return torch.cat(parts, dim=-1)


def repeats(read: Tensor, chunk: int, words: bool = True) -> list[Tensor]:
    """What is fed behind the text for each piece of it."""
    found = []
    for start in range(0, read.shape[1], chunk):
        told = [7, 8, 9] + ([*read[0, max(0, start - 8) : start].tolist(), 6] if start else [])
        piece = read[:, start : start + chunk]
        found.append(torch.cat([torch.tensor([told if words else []], dtype=torch.long), piece], dim=1))
    return found


def best(worth: Tensor, shared: bool = False) -> list[list[list[int]]]:
    """Slots by layer and head."""
    worth = worth.sum(1, keepdim=True).expand_as(worth) if shared else worth
    n = worth.shape[-1]
    chosen = worth[..., SINKS : n - 1].topk(BUDGET - SINKS - 1).indices + SINKS
    return [[[*range(SINKS), *sorted(head.tolist()), n - 1] for head in layer] for layer in chosen]


def kept(cache: kvote.Cache, row: int = 0) -> list[list[list[int]]]:
    return [[lane.tolist() for lane in cache.positions(i)[row]] for i in range(len(cache.layers))]


def read(spec: str, tokens: Tensor, mask: Tensor | None = None, tokenizer: Any = None, passes: int = 0) -> kvote.Cache:
    """A cache that has read ``tokens`` twice."""
    net = tiny.model()
    cache = tiny.cache(net, spec)
    cache.expect(tokens.shape[1])
    tiny.feed(net, cache, tokens, mask, passes)
    kvote.read_again(net, cache, tokens, tokenizer=tokenizer)
    return cache


@pytest.fixture
def received(monkeypatch):
    """What the tokens of each layer of row 0 had received when it was decided."""
    found: list[Tensor] = []
    of = RepeatAttention.of

    def noted(self: Any, held: Any, memory: RepeatMemory, edge: int) -> Tensor | None:
        got = of(self, held, memory, edge)
        found.extend([got.double()] if got is not None and held.row == 0 else [])
        return got

    monkeypatch.setattr(RepeatAttention, "of", noted)
    return found


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("chunk", [100, N, 23])
def test_worth_is_the_most_attention_of_a_repeat_over_sinks_chunk_and_itself(received, chunk, words):
    tokens = tiny.ids(1, N)
    cache = read(f"{SPEC}, chunk={chunk})", tokens, tokenizer=Words() if words else None)
    expected = worth(tokens, repeats(tokens, chunk, words), chunk)
    torch.testing.assert_close(torch.stack(received), expected, atol=1e-5, rtol=1e-3)
    assert kept(cache) == best(expected)


def test_where_one_piece_covers_the_text_it_is_dense_attention(received):
    tokens = tiny.ids(1, N)
    read(f"{SPEC})", tokens)
    dense = attended(tiny.model(native="eager"), tokens, tokens)[..., :N].amax(dim=(2, 3))
    torch.testing.assert_close(torch.stack(received), dense, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("chunk", [100, 23])
def test_layers_and_heads_compete_for_one_budget(chunk):
    tokens = tiny.ids(1, N)
    found = worth(tokens, repeats(tokens, chunk), chunk)[..., SINKS : N - 1]
    layers, heads, total = 2, 2, 2 * 2 * (BUDGET - SINKS - 1)
    won = found.flatten().topk(total).indices // found[0].numel()
    held = kept(read(f"{JOINT}, chunk={chunk})", tokens, tokenizer=Words()))
    counts = [sum(map(len, layer)) - heads * (SINKS + 1) for layer in held]
    assert sum(counts) == total
    for layer in range(layers):
        assert abs(counts[layer] - int((won == layer).sum())) <= heads
        best = found[layer].flatten().topk(counts[layer]).indices
        expected = [
            sorted((best[best // found.shape[-1] == head] % found.shape[-1] + SINKS).tolist()) for head in (0, 1)
        ]
        assert held[layer] == [[*range(SINKS), *own, N - 1] for own in expected]
    # It is not what each keeps by itself.
    assert len({len(lane) for layer in held for lane in layer}) > 1


def test_a_share_of_all_layers_is_exactly_the_budget_and_bytes_are_freed():
    net, tokens = tiny.model(num_hidden_layers=4), tiny.ids(2, 400)
    cache = tiny.cache(net, "kvzip(budget=0.3)")
    tiny.feed(net, cache, tokens)
    before = cache.nbytes()
    kvote.read_again(net, cache, tokens, tokenizer=Words())
    for row in range(2):
        assert sum(len(lane) for layer in kept(cache, row) for lane in layer) == 4 * 2 * 120
    assert cache.nbytes() < 0.7 * before
    extra = tiny.feed(net, cache, tiny.ids(2, 3, seed=1), passes=1)
    assert bool(extra.isfinite().all())


def test_heads_may_keep_the_same():
    tokens = tiny.ids(1, N)
    expected = best(worth(tokens, repeats(tokens, 23), 23), shared=True)
    assert kept(read(f"{SPEC}, chunk=23, per_head=False)", tokens, tokenizer=Words())) == expected


@pytest.mark.parametrize("passes", [0, 17])
def test_keys_held_without_rotation_receive_the_same(passes):
    tokens = tiny.ids(1, N)
    plain = read(f"{SPEC}, chunk=23, per_head=False)", tokens, tokenizer=Words(), passes=passes)
    raw = read(f"{SPEC}, chunk=23, per_head=False) | tokenselect(top_k=500)", tokens, tokenizer=Words(), passes=passes)
    assert kept(raw) == kept(plain)


def test_weights_of_a_long_repeat_are_taken_piece_by_piece(monkeypatch, received):
    monkeypatch.setattr(repeat_attention, "_LOGITS_HELD", 1000)
    test_worth_is_the_most_attention_of_a_repeat_over_sinks_chunk_and_itself(received, 23, True)


@pytest.mark.parametrize("chunk", [100, 23])
def test_padded_rows_keep_what_they_keep_alone(chunk):
    tokens, mask = tiny.padded(3, N, [11, 0, 30])
    cache = read(f"{SPEC}, chunk={chunk})", tokens, mask, tokenizer=Words())
    for row, pads in enumerate([11, 0, 30]):
        # Pieces are columns of the batch, so alone they are cut elsewhere.
        if chunk == 100 or not pads:
            alone = read(f"{SPEC}, chunk={chunk})", tokens[row : row + 1, pads:], tokenizer=Words())
            assert kept(cache, row) == kept(alone)
        assert {len(lane) for layer in kept(cache, row) for lane in layer} == {BUDGET}


def test_the_repeat_is_forgotten_and_what_is_generated_stays():
    net, tokens = tiny.model(), tiny.ids(1, N)
    cache = read(f"{SPEC}, chunk=23)", tokens, tokenizer=Words())
    assert cache.get_seq_length() == N
    assert not any(part.record_past or part.right_padded for part in cache.managed)
    before = kept(cache)
    tiny.feed(net, cache, tiny.ids(1, 9, seed=4))
    cache.crop(-9)
    assert kept(cache) == before
    tiny.feed(net, cache, tiny.ids(1, 9, seed=1))
    tiny.feed(net, cache, tiny.ids(1, 3, seed=2), passes=1)
    assert kept(cache) == [[[*lane, *range(N, N + 12)] for lane in layer] for layer in before]


def test_covering_everything_equals_dense_and_needs_no_repeat():
    net, tokens = tiny.model(), tiny.ids(2, N)
    expected = tiny.generate(net, tokens).sequences
    assert torch.equal(tiny.generate(net, tokens, tiny.cache(net, "kvzip(budget=100)")).sequences, expected)
    cache = read("kvzip(budget=1.0, chunk=23)", tokens[:, :-1], tokenizer=Words())
    assert torch.equal(tiny.generate(net, tokens, cache).sequences, expected)
    assert all(layer.dropped == 0 for layer in cache.report().layers)


def test_a_prompt_above_the_budget_that_was_not_read_again_is_refused_and_nothing_is_lost():
    net, tokens = tiny.model(), tiny.ids(1, N)
    cache = tiny.cache(net, f"{SPEC})")
    with pytest.raises(InputError, match=r"which it was not; call kvote.read_again\(model, cache, ids\)"):
        tiny.generate(net, tokens, cache)
    assert cache.get_seq_length() == N
    cache.crop(-1)
    with pytest.raises(InputError, match="read_again"):
        tiny.feed(net, cache, tokens[:, -1:])
    kvote.read_again(net, cache, tokens[:, :-1])
    assert tiny.generate(net, tokens, cache).sequences.shape == (1, N + 8)
    assert kept(cache)[0][0][:SINKS] == [0, 1, 2, 3]


def test_a_rolled_back_prompt_is_judged_anew():
    net, tokens = tiny.model(), tiny.ids(1, N)
    cache = tiny.cache(net, f"{SPEC}, chunk=23)")
    cache.expect(N)
    tiny.feed(net, cache, tiny.ids(1, N, seed=5))
    cache.crop(-N)
    cache.expect(N)
    tiny.feed(net, cache, tokens)
    kvote.read_again(net, cache, tokens, tokenizer=Words())
    assert kept(cache) == kept(read(f"{SPEC}, chunk=23)", tokens, tokenizer=Words()))


def test_copies_and_beams_hold_what_was_kept():
    net, tokens = tiny.model(), tiny.ids(1, N)
    cache = read(f"{SPEC})", tokens)
    twin = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    tiny.feed(net, cache, tiny.ids(2, 5, seed=1))
    assert kept(twin) == [[lane[:-5] for lane in layer] for layer in kept(cache, 1)]


def test_other_ids_or_a_second_time_are_refused():
    net, tokens = tiny.model(), tiny.ids(1, N)
    cache = tiny.cache(net, f"{SPEC})")
    tiny.feed(net, cache, tokens)
    with pytest.raises(InputError, match="all that the cache has read, 1 by 60; got 1 by 59"):
        kvote.read_again(net, cache, tokens[:, 1:])
    kvote.read_again(net, cache, tokens)
    with pytest.raises(InputError, match="cut down already"):
        kvote.read_again(net, cache, tokens)


def test_methods_that_do_not_ask_are_not_read_again():
    net, tokens = tiny.model(), tiny.ids(1, N)
    cache = tiny.cache(net, "knorm(budget=20)")
    tiny.feed(net, cache, tokens)
    calls = cache.report().layers[0].calls
    kvote.read_again(net, cache, tokens)
    assert cache.report().layers[0].calls == calls


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_repeat_is_not_gone_on_with(monkeypatch, after):
    net, tokens = tiny.model(), tiny.ids(1, N)
    cache = tiny.cache(net, f"{SPEC}, chunk=23)")
    tiny.feed(net, cache, tokens)
    observe, calls = RepeatAttention.observe, []

    def interrupted(*args: Any) -> None:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        observe(*args)

    monkeypatch.setattr(RepeatAttention, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvote.read_again(net, cache, tokens)
    with pytest.raises(InterruptedPassError, match="reset"):
        tiny.feed(net, cache, tokens[:, :1])
    monkeypatch.undo()
    cache.reset()
    tiny.feed(net, cache, tokens)
    kvote.read_again(net, cache, tokens)
    assert kept(cache) == kept(read(f"{SPEC}, chunk=23)", tokens))


def _mean(self, seen, i, chunk):
    received = seen.mass()[i, :, chunk.start : chunk.stop]
    return received / seen.count


def _everything(self, seen, i, chunk):
    return seen.weights(0, seen.count)[i, :, :, chunk.start : chunk.stop].unflatten(0, (2, -1)).amax(dim=(1, 2))


@pytest.mark.parametrize("fault", [_mean, _everything])
def test_a_rule_switched_off_shows(monkeypatch, received, fault):
    monkeypatch.setattr(RepeatAttention, "_most", fault)
    with pytest.raises(AssertionError):
        test_worth_is_the_most_attention_of_a_repeat_over_sinks_chunk_and_itself(received, 23, True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kvzip(budget=5)", "budget must exceed the 4 sinks and the window of 1"),
        ("kvzip(even=1)", "even must be True or False"),
        ("kvzip(chunk=0)", "chunk must be a whole number"),
        ("kvzip(per_head=False) | kivi", "a prompt is read again before it is known"),
        ("kvzip | tokenselect", "differ from head to head"),
        ("kvzip | quest", "different numbers of tokens"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
