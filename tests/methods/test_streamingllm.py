"""StreamingLLM: the proofs of its card (arXiv 2309.17453)."""

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ONE = {"num_hidden_layers": 1}


def formula(length: int, sinks: int, window: int) -> list[int]:
    if length <= sinks + window:
        return list(range(length))
    return [*range(sinks), *range(length - window, length)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    passes=st.lists(st.sampled_from([1, 2, 5, 30, 70]), min_size=1, max_size=6),
    sinks=st.sampled_from([0, 1, 4]),
    window=st.sampled_from([1, 3, 20, 64]),
)
def test_kept_tokens_equal_the_formula_at_every_length_with_any_passes(passes, sinks, window):
    net = tiny.model(**ONE)
    cache = tiny.cache(net, f"streamingllm(sinks={sinks}, window={window})")
    for count in passes:
        tiny.feed(net, cache, tiny.ids(1, count))
        expected = formula(cache.get_seq_length(), sinks, window)
        assert all(lane.tolist() == expected for lane in cache.positions(0)[0])


def test_memory_is_constant_after_warm_up():
    net = tiny.model(**ONE)
    cache = tiny.cache(net, "streamingllm(sinks=4, window=60)")
    tiny.feed(net, cache, tiny.ids(1, 200), passes=50)
    bytes_held = []
    for _ in range(12):
        tiny.feed(net, cache, tiny.ids(1, 50))
        bytes_held.append(cache.nbytes())
    assert len(set(bytes_held)) == 1
    assert cache.report().layers[0].tokens_held == 64


@pytest.mark.parametrize("family", ["llama", "phi3-partial", "cohere", "gpt-oss", "olmo2"])
@pytest.mark.parametrize(("sinks", "window"), [(0, 7), (4, 7), (2, 1)])
def test_one_layer_equals_a_dense_forward_on_the_kept_tokens_at_positions_from_zero(family, sinks, window):
    changes = {**ONE, **({"layer_types": ["full_attention"]} if family == "gpt-oss" else {})}
    tokens = tiny.ids(1, 40)
    kept = [formula(stop, sinks, window) for stop in range(1, 41)]
    net = tiny.model(family, **changes)
    expected = torch.cat([tiny.feed(net, None, tokens[:, index])[:, -1:] for index in kept], dim=1)
    for passes in (0, 1, 9):
        net = tiny.model(family, **changes)
        got = tiny.feed(net, tiny.cache(net, f"streamingllm(sinks={sinks}, window={window})"), tokens, passes=passes)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("sinks", "window", "burst"), [(2, 9, 3), (0, 9, 9), (3, 4, 64)])
def test_in_bursts_a_query_reads_what_is_held_at_positions_from_zero(sinks, window, burst):
    net, tokens, size = tiny.model(**ONE), tiny.ids(1, 60), sinks + window
    cache = tiny.cache(net, f"streamingllm(sinks={sinks}, window={window}, burst={burst})")
    tiny.feed(net, cache, tokens[:, :30])
    held, sizes = formula(30, sinks, window), set()
    for at in range(30, 60):
        got = tiny.feed(net, cache, tokens[:, at : at + 1])
        held = [*held, at]
        # Never more than the window, whether or not room has been made.
        seen = [*held[:sinks], *held[sinks:][-window:]]
        expected = tiny.feed(net, None, tokens[:, seen])
        torch.testing.assert_close(got[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
        held = held if len(held) <= size else [*held[:sinks], *held[-max(1, window - burst + 1) :]]
        assert all(lane.tolist() == held for lane in cache.positions(0)[0])
        sizes.add(len(held))
    assert sizes == set(range(sinks + max(1, window - burst + 1), size + 1))


@pytest.mark.parametrize("length", [1, 3, 6, 7, 8, 20])
def test_no_token_counts_twice_when_sinks_and_window_overlap(length):
    tokens = tiny.ids(1, length)
    net = tiny.model()
    expected = tiny.feed(net, None, tokens)
    for sinks, window in ((length, length), (length - 1, 3), (2, length - 1 or 1)):
        if sinks + window >= length:
            cache = tiny.cache(net, f"streamingllm(sinks={sinks}, window={window})")
            torch.testing.assert_close(tiny.feed(net, cache, tokens), expected, atol=1e-4, rtol=1e-4)
            assert all(lane.tolist() == list(range(length)) for lane in cache.positions(0)[0])


def test_what_left_the_window_is_gone():
    net = tiny.model(**ONE)
    tokens = tiny.ids(1, 60)
    other = tokens.clone()
    other[:, 20:40] = tiny.ids(1, 20, seed=8)
    method = "streamingllm(sinks=4, window=10)"
    one, two = (tiny.feed(net, tiny.cache(net, method), x) for x in (tokens, other))
    assert torch.equal(one[:, 50:], two[:, 50:])
    assert not torch.allclose(one[:, 20:50], two[:, 20:50], atol=1e-3)


def test_sinks_are_the_first_tokens_of_the_text_not_of_the_padding():
    net = tiny.model(**ONE)
    tokens, mask = tiny.padded(2, 60, [25, 0])
    cache = tiny.cache(net, "streamingllm(sinks=4, window=10)")
    padded = tiny.feed(net, cache, tokens, mask)
    alone = tiny.feed(net, tiny.cache(net, "streamingllm(sinks=4, window=10)"), tokens[:1, 25:])
    torch.testing.assert_close(padded[:1, 25:], alone, atol=1e-5, rtol=1e-5)
    assert cache.positions(0)[0][0].tolist() == formula(35, 4, 10)


def test_a_million_tokens_away_is_as_near_as_ever():
    """Positions are those in the cache: the text's own may be anything."""
    net = tiny.model(**ONE)
    tokens = tiny.ids(1, 30)
    method = "streamingllm(sinks=4, window=10)"
    near, far = tiny.cache(net, method), tiny.cache(net, method)
    with torch.no_grad():
        one = net(tokens, past_key_values=near).logits
        two = net(tokens, past_key_values=far, position_ids=torch.arange(4000, 4030)[None]).logits
    torch.testing.assert_close(one, two, atol=2e-3, rtol=2e-3)
