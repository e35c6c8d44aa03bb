"""TokenSelect's selection cache: decode steps that resemble the last selecting one reuse its tokens."""

import tiny
import torch
from selecting import Fed, spec


def drifting(fed: Fed, start: int, step: float) -> None:
    """Queries that leave their first one a little further each step, in raw form."""
    for slot in range(start + 1, fed.query.shape[2]):
        fed.query[:, :, slot] = fed.query[:, :, slot - 1] + step * torch.randn_like(fed.query[:, :, 0])


def test_a_threshold_above_one_always_selects(trace):
    fed = Fed(spec(theta=1.5))
    fed.query[:] = fed.query[:, :, :1]
    fed.feed(52)
    before = fed.layer.activity.selections
    for _ in range(10):
        fed.feed(1)
    assert fed.layer.activity.selections - before == 10
    assert fed.layer.activity.reused == 0
    assert fed.layer.memory is None


def test_drift_adds_up_against_the_query_that_selected():
    fed = Fed(spec(theta=0.9, reuse_span=32), n=68)
    fed.feed(36)
    drifting(fed, 36, 0.15)
    chosen = fed.query[0, :, 36].flatten()
    reselected = []
    for slot in range(36, 68):
        query = fed.query[0, :, slot].flatten()
        before = fed.layer.activity.reused
        fed.feed(1)
        fresh = slot == 36 or torch.cosine_similarity(query, chosen, dim=0) < 0.9
        assert fed.layer.activity.reused - before == (0 if fresh else 1)
        chosen = query if fresh else chosen
        reselected += [slot] * bool(fresh)
    assert 2 < len(reselected) < 30


def test_a_list_is_selected_anew_when_the_window_has_moved_by_the_span():
    fed = Fed(spec(theta=0.0, reuse_span=8), n=80)
    fed.query[:] = fed.query[:, :, :1]
    fed.feed(36)
    before = fed.layer.activity.selections
    for _ in range(32):
        fed.feed(1)
    assert fed.layer.activity.selections - before == 4
    assert fed.layer.activity.reused == 28


def test_sequences_of_a_batch_decide_for_themselves(trace):
    fed = Fed(spec(theta=0.9, reuse_span=32), rows=2)
    fed.feed(40)
    fed.query[0, :, 40:] = fed.query[0, :, 40:41]
    for _ in range(6):
        fed.feed(1)
    # The first sequence asks the same each step, the second something new.
    assert fed.layer.activity.reused == 5
    steps = trace.selected[-6:]
    assert all(torch.equal(index[0, 0, :8], steps[0][0, 0, :8]) for index in steps)
    assert len({tuple(index[1, 0, :8].tolist()) for index in steps}) == 6
    assert len(trace.votes[-1]) == 1


def test_reordering_carries_the_selection_along(trace):
    fed = Fed(spec(theta=0.9, reuse_span=32), rows=2)
    fed.feed(40)
    fed.query[:, :, 40:] = fed.query[:, :, 40:41]
    fed.feed(1)
    before = trace.selected[-1][:, 0, 2:8].tolist()
    assert before[0] != before[1]
    fed.layer.select([1, 0])
    fed.query, fed.key, fed.value = fed.query.flip(0), fed.key.flip(0), fed.value.flip(0)
    fed.feed(1)
    assert trace.selected[-1][:, 0, 2:8].tolist() == before[::-1]
    assert fed.layer.activity.reused == 2


def test_cropping_forgets_the_selection():
    fed = Fed(spec(theta=0.0, reuse_span=32))
    fed.feed(40)
    fed.feed(1)
    fed.layer.crop(1)
    fed.at -= 1
    before = fed.layer.activity.selections
    fed.feed(1)
    assert fed.layer.activity.selections == before + 1


def test_a_prompt_neither_uses_nor_fills_the_selection_cache():
    fed = Fed(spec(theta=-1.0, tail=5))
    fed.feed(60, tail_queries=5)
    assert fed.layer.activity.reused == 0
    assert fed.layer.memory.nbytes == 0


def test_generation_reuses_selections_and_says_so():
    net = tiny.model()
    cache = tiny.cache(net, spec(theta=0.0, tail=3))
    tiny.generate(net, tiny.ids(2, 40), cache, max_new_tokens=12)
    for layer in cache.report().layers:
        assert layer.reused > 0
        assert layer.selections > 0
        assert 2 + 6 + 4 < layer.tokens_read <= 2 + 6 + 4 + 32
