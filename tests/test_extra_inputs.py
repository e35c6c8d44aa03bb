"""Token ids and hidden states reach a method that says that it needs them, in every way of generating."""

import copy
import gc
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import kvote
from kvote.extra_inputs import HIDDEN, IDS
from kvote.keep.keeper import Kept
from kvote.keep.policies import KeeperDefaults
from kvote.method import Method
from kvote.needs import KeeperOffers, Needs
from kvote.read.reader import ReaderDefaults, everything


def goes(ids: Tensor) -> Tensor:
    """Which tokens the keeper of these tests drops, as one would drop punctuation."""
    return ids % 3 == 0


class Text:
    """Ids and hidden states of the tokens held, by sequence."""

    def __init__(self) -> None:
        self.ids: dict[int, Tensor] = {}
        self.hidden: dict[int, Tensor] = {}

    def select(self, index: list[int]) -> None:
        for held in (self.ids, self.hidden):
            old = dict(held)
            held.clear()
            held.update({row: old[i] for row, i in enumerate(index) if i in old})

    def keep(self, row: int, slots: Tensor) -> None:
        for held in (self.ids, self.hidden):
            held[row] = held[row][slots]

    def truncate(self, row: int, length: int) -> None:
        for held in (self.ids, self.hidden):
            if row in held:
                held[row] = held[row][:length]

    nbytes = 0


@dataclass(frozen=True)
class DropsWords(KeeperDefaults):
    """Lets tokens go by their ids, and remembers the hidden states of those that stay."""

    budget: None = None
    needs = Needs(extra_inputs=frozenset({IDS, HIDDEN}))
    # Else a rollback would make it forget all that it remembers.
    offers = KeeperOffers(equal_layers=True, adds_up=True)

    def new_memory(self) -> Text:
        return Text()

    def observes(self, prompt_left: int | None) -> bool:
        return True

    def observe(self, seen: Any, memory: Text) -> None:
        for held, new in ((memory.ids, seen.extra_inputs.ids), (memory.hidden, seen.extra_inputs.hidden)):
            for i, row in enumerate(seen.rows):
                before = held.get(row, new[i][:0])
                assert len(before) == seen.first
                held[row] = torch.cat([before, new[i]])

    def survivors(self, held: Any, memory: Text) -> Kept | None:
        stay = (~goes(memory.ids[held.row])).nonzero()[:, 0]
        return None if len(stay) == held.length else Kept(stay)


METHOD = Method("dropswords", keep=DropsWords())


def assert_in_line(net: Any, cache: kvote.Cache, row: int = 0) -> Tensor:
    """The values that are stored are made of the hidden states and, in the first layer, of the ids that were noted for
    them. Returns the ids held."""
    for layer, held in zip(net.model.layers, cache.managed, strict=True):
        text, segment = held.record.memory, held.segment
        ids, hidden = text.ids[row], text.hidden[row]
        assert 0 < len(ids) == segment.length(row)
        assert not goes(ids).any()
        stored = segment.decode([row], 0, len(ids))[1][0].transpose(0, 1).flatten(1)
        with torch.no_grad():
            torch.testing.assert_close(stored, layer.self_attn.v_proj(hidden))
            if held.index == 0:
                made = layer.self_attn.v_proj(layer.input_layernorm(net.model.embed_tokens(ids)))
                torch.testing.assert_close(stored, made)
    return ids


WAYS = {
    "greedy": (1, {}),
    "batch": (3, {}),
    "beams": (2, {"num_beams": 3}),
    "chunked": (2, {"prefill_chunk_size": 7}),
    "assisted": (1, {"prompt_lookup_num_tokens": 4}),
}


@pytest.mark.parametrize(("rows", "how"), WAYS.values(), ids=WAYS)
def test_ids_and_hidden_states_belong_to_the_tokens_held(rows, how):
    net = tiny.model()
    cache = kvote.Cache(net, METHOD)
    tokens = tiny.ids(rows, 24).repeat(1, 2)
    out = tiny.generate(net, tokens, cache, max_new_tokens=12, **how).sequences
    held = [assert_in_line(net, cache, row) for row in range(rows)]
    if "num_beams" not in how:
        said = out[0, : cache.get_seq_length()]
        assert torch.equal(held[0], said[~goes(said)])


def test_padding_has_no_ids():
    net = tiny.model()
    cache = kvote.Cache(net, METHOD)
    tokens, mask = tiny.padded(3, 20, [5, 0, 9])
    tiny.generate(net, tokens, cache, mask, max_new_tokens=6)
    for row, pads in enumerate([5, 0, 9]):
        prompt = tokens[row, pads:]
        prompt = prompt[~goes(prompt)]
        assert torch.equal(assert_in_line(net, cache, row)[: len(prompt)], prompt)


def test_rows_of_several_caches_have_their_own():
    net = tiny.model()
    rows, caches = kvote.Rows(net), [kvote.Cache(net, METHOD) for _ in range(2)]
    for cache in caches:
        rows.join(cache)
    texts = [tiny.ids(1, 12, seed=1)[0], tiny.ids(1, 19, seed=2)[0]]
    with torch.no_grad():
        net(**rows.inputs(texts))
        net(**rows.inputs([texts[1][:3], texts[0][:1]]))
    for cache, text in zip(
        caches, (torch.cat([texts[0], texts[1][:3]]), torch.cat([texts[1], texts[0][:1]])), strict=True
    ):
        assert torch.equal(assert_in_line(net, cache), text[~goes(text)])


def test_a_fork_and_a_copy_go_on_where_the_first_cache_is_gone():
    net = tiny.model()
    cache, text = kvote.Cache(net, METHOD), tiny.ids(1, 12)
    tiny.feed(net, cache, text)
    others = [cache.fork(), copy.deepcopy(cache)]
    del cache
    gc.collect()
    for other in others:
        tiny.feed(net, other, tiny.ids(1, 8, seed=3), passes=1)
        assert_in_line(net, other)


@pytest.mark.parametrize("rows", [1, 2])
def test_embeddings_without_ids_are_refused(rows):
    net = tiny.model()
    cache = kvote.Cache(net, METHOD)
    embedded = net.get_input_embeddings()(tiny.ids(rows, 9))
    with torch.no_grad():
        for call in (net, net.model):
            with pytest.raises(kvote.InputError, match="dropswords needs the token ids of all tokens"):
                call(inputs_embeds=embedded, past_key_values=cache)
        # Nothing was stored, and no ids of another pass are taken for those of this one.
        assert cache.get_seq_length() == 0
        tiny.feed(net, cache, tiny.ids(rows, 9))
        with pytest.raises(kvote.InputError, match="call the model with input_ids"):
            net.model(inputs_embeds=embedded, past_key_values=cache)


def test_a_pass_that_never_shows_hidden_states_is_refused():
    net = tiny.model()
    cache = kvote.Cache(net, METHOD)
    attention = net.model.layers[1].self_attn
    hooks = dict(attention._forward_pre_hooks)
    attention._forward_pre_hooks.clear()
    with pytest.raises(kvote.InputError, match="needs the hidden states of all tokens"):
        tiny.feed(net, cache, tiny.ids(1, 9))
    attention._forward_pre_hooks.update(hooks)


def test_models_have_no_hooks_where_no_method_needs_them():
    net = tiny.model()

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules())

    gc.collect()
    dense = kvote.Cache(net, "dense")
    before = hooks()
    needing = [kvote.Cache(net, METHOD), kvote.Cache(net, METHOD)]
    assert hooks() > before
    needing.pop()
    gc.collect()
    assert hooks() > before
    needing.clear()
    gc.collect()
    assert hooks() == before
    tiny.feed(net, dense, tiny.ids(1, 5))
    assert dense.announced.extra_inputs is None


@dataclass(frozen=True)
class NotesIds(ReaderDefaults):
    """Reads everything, and writes down which ids it was shown."""

    needs = Needs(extra_inputs=frozenset({IDS}))
    shown: Any = None

    def read(self, reading: Any) -> Any:
        assert reading.extra_inputs.hidden is None
        self.shown.append(reading.extra_inputs.ids)
        yield everything(reading)


def test_a_reader_is_shown_the_ids_of_its_queries():
    net, shown = tiny.model(), []
    cache, text = kvote.Cache(net, Method("notesids", read=NotesIds(shown=shown))), tiny.ids(2, 9)
    tiny.feed(net, cache, text, passes=4)
    assert torch.equal(torch.cat(shown[::2], dim=1), text)
    assert torch.equal(torch.cat(shown[1::2], dim=1), text)
