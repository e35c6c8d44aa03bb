"""RazorAttention's head search (arXiv 2407.15891): echo and induction on repeated random tokens."""

import pytest
import tiny
import torch
from torch import Tensor

from kvote import InputError
from kvote.calibration import retrieval
from kvote.calibration.heads import RAZOR, scores_of
from kvote.calibration.retrieval import SHORTEST, measure_razor, scores

PERIOD, TIMES = 12, 4


def written_out(weights: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """The sums of ``weights`` [heads, t, t], query by query and copy by copy: echo and induction of each head."""
    own = weights[:, 1:, 1:]
    n = own.shape[1]
    echo, induction = torch.zeros(len(own)), torch.zeros(len(own))
    for i in range(period, n):
        for j in range(i % period, i, period):
            echo += own[:, i, j]
            if j + 1 <= i:
                induction += own[:, i, j + 1]
    return echo / (n - period), induction / (n - period)


def planted(kind: str) -> tuple[Tensor, Tensor]:
    """Query and key [1, t, d] of a head that looks at the same token before, at what followed it, or anywhere."""
    draw = torch.Generator().manual_seed(0)
    words = torch.randn(PERIOD + 1, 32, generator=draw)
    words /= words.norm(dim=1, keepdim=True)
    tokens = torch.tensor([PERIOD, *list(range(PERIOD)) * TIMES])
    query = words[tokens]
    before = torch.cat([torch.full((1,), PERIOD), tokens[:-1]])
    key = {"echo": words[tokens], "induction": words[before], "neither": torch.randn(len(tokens), 32, generator=draw)}
    # The later, the less: a token looks the same as its copies, and is not to look at itself.
    late = torch.arange(len(tokens))[:, None] / PERIOD
    query, found = torch.cat([40 * query, torch.ones(len(tokens), 1)], 1), torch.cat([key[kind], -8 * late], 1)
    return query[None], found[None]


def softmax(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention [heads, t, t] and the log-sum-exp of its logits [heads, t]."""
    t = query.shape[1]
    logits = query @ key.repeat_interleave(len(query) // len(key), 0).mT * scale
    logits = logits.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
    return logits.softmax(-1), logits.logsumexp(-1)


@pytest.mark.parametrize(("kind", "best", "other"), [("induction", 1, 0), ("echo", 0, 1)])
def test_a_head_built_by_hand_scores_as_what_it_is(kind, best, other):
    query, key = planted(kind)
    found = scores(query, key, softmax(query, key, 1.0)[1], PERIOD, 1.0)
    assert float(found[best]) > 0.99
    assert float(found[other]) < 0.01


def test_a_head_that_looks_anywhere_scores_as_neither():
    query, key = planted("neither")
    found = scores(query, key, softmax(query, key, 0.02)[1], PERIOD, 0.02)
    assert all(0 < float(score) < 0.2 for score in found)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (7, 1)])
@pytest.mark.parametrize("held", [1, 200, 1 << 24])
def test_scores_are_those_of_the_sums_written_out(heads, kv_heads, held, monkeypatch):
    """In blocks of queries of any size; a key head scores as its best query head."""
    monkeypatch.setattr(retrieval, "_WEIGHTS_HELD", held)
    t = 1 + PERIOD * TIMES
    query, key = torch.randn(heads, t, 16), torch.randn(kv_heads, t, 16)
    weights, lse = softmax(query, key, 0.5)
    found = scores(query, key, lse, PERIOD, 0.5)
    for mine, expected in zip(found, written_out(weights, PERIOD), strict=True):
        torch.testing.assert_close(mine, expected.reshape(kv_heads, -1).amax(1))


def test_a_soft_cap_is_respected():
    t = 1 + PERIOD * TIMES
    query, key = torch.randn(2, t, 16), torch.randn(2, t, 16)
    capped = 2 * torch.tanh(query @ key.mT / 2)
    capped = capped.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
    found = scores(query, key, capped.logsumexp(-1), PERIOD, 1.0, softcap=2.0)
    for mine, expected in zip(found, written_out(capped.softmax(-1), PERIOD), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt-oss"])
def test_a_model_is_searched_as_its_own_attention_weights_say(family):
    net = tiny.model(family)
    made = measure_razor(net, SHORTEST)
    assert made.data["tokens"] == 1 + 4 * SHORTEST
    found = scores_of(made, RAZOR)
    full = [1] if family in ("gemma3", "gpt-oss") else [0, 1]
    assert list(found["echo"]) == list(found["induction"]) == full
    eager = tiny.model(family, native="eager")
    with torch.no_grad():
        ids = retrieval._repeated(eager, SHORTEST, (), 0)
        weights = eager(ids, output_attentions=True).attentions
    for layer in full:
        echo, induction = written_out(weights[layer][0], SHORTEST)
        for mine, expected in ((found["echo"][layer], echo), (found["induction"][layer], induction)):
            torch.testing.assert_close(torch.tensor(mine), expected.reshape(2, -1).amax(1), atol=2e-5, rtol=1e-4)


def test_the_text_begins_once_and_repeats_usual_tokens():
    net = tiny.model()
    ids = retrieval._repeated(net, 50, avoid=range(100), seed=0)[0]
    assert ids[0] == net.config.bos_token_id == 1
    words = ids[1:].reshape(4, 50)
    assert bool((words == words[0]).all())
    assert len(set(words[0].tolist())) == 50
    assert int(words.min()) >= 100
    assert not torch.equal(ids, retrieval._repeated(net, 50, avoid=range(100), seed=1)[0])


def test_the_text_is_not_longer_than_the_model_was_made_for(monkeypatch):
    net = tiny.model()
    assert retrieval._period(net) == (8192 - 1) // 4
    monkeypatch.setattr(net.config, "max_position_embeddings", 10**6)
    assert retrieval._period(net) == 2500


@pytest.mark.parametrize("period", [0, 1, 31, 255])
def test_a_period_that_cannot_be_is_refused(period):
    with pytest.raises(
        InputError, match=rf"must be from 32 to 25\d long, .*from 129 to 1,0\d\d; got a period of {period}\."
    ):
        measure_razor(tiny.model(), period)


def test_numbers_that_are_not_finite_are_refused():
    net = type(tiny.model())(tiny.model().config)
    net.model.layers[1].self_attn.k_proj.weight.data[:] = float("nan")
    with pytest.raises(InputError, match=r"Layer 1 gave numbers that are not finite"):
        measure_razor(net.eval(), SHORTEST)
