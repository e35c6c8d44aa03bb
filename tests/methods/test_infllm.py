"""InfLLM: the proofs of its card (arXiv 2402.04617)."""

from collections.abc import Callable

import pytest
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor

from kvote import Cache, CropError, InputError, InterruptedPassError, MethodError
from kvote.methods import infllm
from kvote.read.local_mass import Blocks, LocalMass
from kvote.spec import parse

SINKS, WINDOW, BLOCK, TOP, REPRESENTATIVES, CHUNK = 3, 10, 4, 2, 2, 6
SPEC = f"infllm(block={BLOCK}, sinks={SINKS}, window={WINDOW}, top_k={TOP}, representatives=2, chunk={CHUNK})"
N, PROMPT = 80, 73


class Published:
    """The published rule, query by query and head by head, over one sequence that was fed to a layer."""

    def __init__(self, fed: Fed, row: int = 0) -> None:
        self.fed, self.row = fed, row
        self.heads = fed.query.shape[1]
        self.head_groups = self.heads // fed.key.shape[1]
        self.true_query, self.true_key = fed.rotated(fed.query, 0, N)[row], fed.rotated(fed.key, 0, N)[row]
        cos, sin = fed.rope.angles(torch.full((1, 1), WINDOW), torch.float32)
        self.far_query = fed.rope.apply(fed.query[row], (cos[0], sin[0]))
        self.mass = torch.zeros(self.heads, N)
        self.blocks: list[range] = []
        self.read: dict[int, list[int]] = {}

    def key(self, head: int) -> int:
        return head // self.head_groups

    def represented(self, head: int, block: range) -> Tensor:
        best = self.mass[head, block.start : block.stop].topk(REPRESENTATIVES).indices + block.start
        return self.fed.key[self.row, self.key(head), best].mean(0)

    def score(self, block: range, queries: range) -> float:
        means = self.far_query[:, queries.start : queries.stop].mean(1)
        return float(sum(means[head] @ self.represented(head, block) for head in range(self.heads)))

    def answers(self, score: Callable[["Published", range, range], float] = score, together: bool = True) -> Tensor:
        """[N, heads, dv]; with another ``score``, or with far tokens at their own distances."""
        out, start = torch.zeros(N, self.heads, DIM), 0
        while start < N:
            size = 1 if start >= PROMPT else CHUNK - start % CHUNK
            queries = range(start, min(start + size, PROMPT if start < PROMPT else N))
            edge = SINKS + BLOCK * len(self.blocks)
            while edge + BLOCK <= start - WINDOW:
                self.blocks.append(range(edge, edge + BLOCK))
                edge += BLOCK
            # Rows that are read whole choose nothing, so they are left out of the mean.
            choosing = range(max(start, min(SINKS + WINDOW, queries.stop)), queries.stop)
            best = sorted(self.blocks, key=lambda block: -score(self, block, choosing))[:TOP]
            for s in queries:
                near = list(range(max(0, s - WINDOW + 1), s + 1))
                far = [*range(min(SINKS, near[0])), *(t for b in best for t in b), *range(edge, near[0])]
                if s < SINKS + WINDOW:
                    near, far = list(range(s + 1)), []
                self.read[s] = sorted(far)
                for head in range(self.heads):
                    true_key, raw_key = self.true_key[self.key(head)], self.fed.key[self.row, self.key(head)]
                    query = self.far_query[head, s] if together else self.true_query[head, s]
                    logits = torch.cat(
                        [true_key[near] @ self.true_query[head, s], (raw_key if together else true_key)[far] @ query]
                    )
                    weights = (logits * DIM**-0.5).softmax(0)
                    self.mass[head, near] += weights[: len(near)]
                    out[s, head] = weights @ self.fed.value[self.row, self.key(head), near + far]
            start = queries.stop
        return out


def fed(method: str, heads: int = 4, passes: int = PROMPT, rows: int = 2) -> tuple[Fed, Tensor]:
    """A layer after a prompt, so many tokens at a time, and some generated tokens; and all answers."""
    torch.manual_seed(3)
    made = Fed(method, heads=heads, rows=rows, n=N)
    made.query *= 2
    out = []
    while made.at < PROMPT:
        count = min(passes, PROMPT - made.at)
        out.append(made.feed(count, prompt_left=PROMPT - made.at - count))
    out += [made.feed(1) for _ in range(N - PROMPT)]
    return made, torch.cat(out, dim=1)


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("passes", [PROMPT, 2 * CHUNK])
def test_answers_are_those_of_the_published_rule(heads, passes):
    made, got = fed(SPEC, heads, passes)
    for row in range(2):
        torch.testing.assert_close(got[row], Published(made, row).answers(), atol=1e-5, rtol=1e-4)
    assert made.layer.activity.selections > 0


def first_tokens(rule: Published, block: range, queries: range) -> float:
    """Blocks represented by their first token, whatever attention it received."""
    means = rule.far_query[:, queries.start : queries.stop].mean(1)
    return float(sum(means[h] @ rule.fed.key[rule.row, rule.key(h), block.start] for h in range(rule.heads)))


def best_tokens(rule: Published, block: range, queries: range) -> float:
    """The best of the representatives instead of their mean."""
    means, total = rule.far_query[:, queries.start : queries.stop].mean(1), 0.0
    for head in range(rule.heads):
        best = rule.mass[head, block.start : block.stop].topk(REPRESENTATIVES).indices + block.start
        total += float((rule.fed.key[rule.row, rule.key(head), best] @ means[head]).max())
    return total


@pytest.mark.parametrize("score", [first_tokens, best_tokens])
def test_other_representatives_choose_other_blocks(score):
    made, got = fed(SPEC)
    rule = Published(made)
    assert not torch.allclose(got[0], rule.answers(score), atol=1e-3)


def test_far_tokens_stand_at_one_distance():
    made, got = fed(SPEC)
    assert not torch.allclose(got[0], Published(made).answers(together=False), atol=1e-3)


def test_the_order_of_what_is_far_does_not_matter():
    """With all blocks read, far tokens may change places."""
    spec = SPEC.replace(f"top_k={TOP}", "top_k=50")
    torch.manual_seed(3)
    made, other = (Fed(spec, n=N) for _ in range(2))
    far = torch.randperm(40) + SINKS
    for part in ("query", "key", "value"):
        setattr(other, part, getattr(made, part).clone())
    for part in ("key", "value"):
        getattr(other, part)[:, :, SINKS : SINKS + 40] = getattr(made, part)[:, :, far]
    answers = []
    for each in (made, other):
        each.feed(N - 1)
        answers.append(each.feed(1))
    torch.testing.assert_close(answers[0], answers[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(made.dense(1), other.dense(1), atol=1e-3)


@pytest.mark.parametrize("window", [N - SINKS, 500])
def test_a_text_within_sinks_and_window_is_dense_attention(window):
    made, got = fed(f"infllm(sinks={SINKS}, window={window})")
    assert made.layer.activity.selections == 0
    torch.testing.assert_close(got, made.dense(N), atol=1e-5, rtol=1e-4)


def test_what_is_read_and_remembered_is_bounded():
    net, tokens = tiny.model(), tiny.ids(1, 230)
    cache = tiny.cache(net, SPEC)
    tiny.feed(net, cache, tokens[:, :229])
    tiny.feed(net, cache, tokens[:, 229:])
    for layer, told in zip(cache.managed, cache.report().layers, strict=True):
        assert told.tokens_read <= SINKS + WINDOW + TOP * BLOCK + BLOCK
        memory = layer.memory
        assert isinstance(memory, LocalMass)
        blocks = (229 - WINDOW - SINKS) // BLOCK
        # A key per query head and block, and a number per query head and token that is in no block.
        waiting = 230 - SINKS - blocks * BLOCK
        assert memory.nbytes == 4 * (blocks * 4 * 16 + 4 * waiting)


def test_a_rollback_needs_to_be_announced():
    net, tokens = tiny.model(), tiny.ids(1, 60)
    cache = tiny.cache(net, SPEC)
    tiny.feed(net, cache, tokens)
    assert not cache.is_croppable
    with pytest.raises(CropError, match="has added up attention"):
        cache.crop(-1)


def test_several_passes_are_taken_back_one_after_the_other():
    net, tokens, more = tiny.model(), tiny.ids(2, 70), tiny.ids(2, 10, seed=5)
    method = SPEC.replace(f"chunk={CHUNK}", "chunk=1")
    cache, fresh = tiny.cache(net, method), tiny.cache(net, method)
    tiny.feed(net, cache, tokens[:, :35])
    cache.activate_past_recording()
    tiny.feed(net, cache, tokens[:, 35:50])
    tiny.feed(net, cache, tokens[:, 50:])
    cache.crop(-30)
    tiny.feed(net, fresh, tokens[:, :40])
    got, expected = (tiny.feed(net, each, more, passes=1) for each in (cache, fresh))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_methods_that_drop_tokens_are_refused():
    with pytest.raises(MethodError, match="the reader adds up the attention that every token receives"):
        parse("knorm(per_head=False) | infllm")


@pytest.mark.parametrize("name", ["block", "window", "top_k", "representatives", "chunk"])
def test_parameters_that_make_no_sense_are_refused(name):
    with pytest.raises(MethodError, match=f"{name} must be a whole number of at least 1; got 0"):
        infllm(**{name: 0})


def test_packed_prompts_are_read_the_same_in_passes():
    net, tokens = tiny.model(), tiny.ids(2, 90)
    method = "kivi(residual=32) | " + SPEC
    whole, parts = tiny.cache(net, method), tiny.cache(net, method)
    for cache, passes in ((whole, 0), (parts, 3 * CHUNK)):
        cache.expect(80)
        tiny.feed(net, cache, tokens[:, :80], passes=passes)
    got, expected = (tiny.feed(net, cache, tokens[:, 80:], passes=1) for cache in (parts, whole))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert all(layer.selections for layer in whole.report().layers)


def test_a_file_with_blocks_of_tokens_that_are_not_there_is_refused(tmp_path):
    net = tiny.model()
    cache = tiny.cache(net, SPEC)
    tiny.feed(net, cache, tiny.ids(1, 80))
    held = cache.managed[0].memory.held
    held[0] = Blocks(torch.cat([held[0].keys] * 2), held[0].mass)
    cache.save(tmp_path / "cache.kv")
    with pytest.raises(InputError, match="a reader remembers tokens that are not held"):
        Cache.load(tmp_path / "cache.kv", net)


def interrupted(stage: str, layer: int) -> tuple[Cache, Cache, Tensor]:
    """A cache that was interrupted in a layer, one that was not, and what both are fed next."""
    net, tokens = tiny.model(), tiny.ids(1, 60)
    cache, calm = tiny.cache(net, SPEC), tiny.cache(net, SPEC)
    for each in (cache, calm):
        tiny.feed(net, each, tokens[:, :40])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.managed[layer].segment, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.feed(net, cache, tokens[:, 40:])
    return cache, calm, tokens[:, 40:]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["observe_queries", "attend"])
def test_a_pass_interrupted_in_its_first_layer_leaves_no_trace(stage):
    cache, calm, tokens = interrupted(stage, 0)
    for _ in range(2):
        torch.testing.assert_close(*(tiny.feed(tiny.model(), each, tokens) for each in (cache, calm)))


def test_a_pass_interrupted_later_needs_a_reset():
    cache, _, tokens = interrupted("observe_queries", 1)
    with pytest.raises(InterruptedPassError, match=r"call cache\.reset\(\)"):
        tiny.feed(tiny.model(), cache, tokens)
