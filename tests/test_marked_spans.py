"""Spans of a text that are marked reach the methods that ask for marks, with the tokens that they are about."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from talking import Words
from torch import Tensor

import kvote
from kvote.extra_inputs import MARKS
from kvote.keep.keeper import Kept
from kvote.keep.policies import KeeperDefaults
from kvote.method import Method
from kvote.needs import KeeperOffers, Needs
from kvote.read.reader import ReaderDefaults, everything


class Marks:
    """Which of the tokens held are in an image, by sequence."""

    nbytes = 0

    def __init__(self) -> None:
        self.image: dict[int, Tensor] = {}

    def select(self, index: list[int]) -> None:
        self.image = {row: self.image[old] for row, old in enumerate(index)}

    def keep(self, row: int, slots: Tensor) -> None:
        self.image[row] = self.image[row][slots]

    def truncate(self, row: int, length: int) -> None:
        self.image[row] = self.image[row][:length]


@dataclass(frozen=True)
class WithoutImages(KeeperDefaults):
    """Lets go of the tokens of images."""

    budget = None
    needs = Needs(extra_inputs=frozenset({MARKS}))
    offers = KeeperOffers(equal_layers=True, adds_up=True)

    def new_memory(self) -> Marks:
        return Marks()

    def observes(self, prompt_left: int | None) -> bool:
        return True

    def observe(self, seen: Any, memory: Marks) -> None:
        for row, marked in zip(seen.rows, seen.extra_inputs.marked("image"), strict=True):
            memory.image[row] = torch.cat([memory.image.get(row, marked[:0]), marked])

    def survivors(self, held: Any, memory: Marks) -> Kept | None:
        stay = (~memory.image[held.row]).nonzero()[:, 0]
        return None if len(stay) == held.length else Kept(stay)


@dataclass(frozen=True)
class NotesMarks(ReaderDefaults):
    """Reads everything, and writes down which tokens of the first layer were marked, by name."""

    shown: Any
    needs = Needs(extra_inputs=frozenset({MARKS}))

    def __deepcopy__(self, memo: Any) -> "NotesMarks":
        return self

    def read(self, reading: Any) -> Any:
        if reading.layer == 0:
            assert reading.extra_inputs.ids is None
            self.shown.append({name: marked.int().tolist() for name, marked in reading.extra_inputs.marks.items()})
        yield everything(reading)


METHOD = Method("withoutimages", keep=WithoutImages())


def held(cache: kvote.Cache, row: int = 0) -> list[int]:
    """Positions of the tokens held, the same in all layers and heads."""
    lanes = [lane.tolist() for layer in range(len(cache.layers)) for lane in cache.positions(layer)[row]]
    assert all(lane == lanes[0] for lane in lanes)
    return lanes[0]


def without(columns: int, *spans: tuple[int, int]) -> list[int]:
    return [i for i in range(columns) if not any(a <= i < b for a, b in spans)]


WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "chunked": {"prefill_chunk_size": 7}}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_marks_of_each_prompt_reach_its_rows_however_it_is_read(how):
    net = tiny.model()
    cache = kvote.Cache(net, METHOD)
    cache.mark_span("image", [3, 12], [9, 17])
    cache.mark_span("image", 1, 2)
    tiny.generate(net, tiny.ids(2, 20), cache, max_new_tokens=5, **how)
    rows, columns = len(cache.positions(0)), cache.get_seq_length()
    spans = [(3, 9), (12, 17)]
    assert [held(cache, row) for row in range(rows)] == [
        without(columns, (1, 2), spans[row * 2 // rows]) for row in range(rows)
    ]


def test_columns_count_padding_and_tokens_do_not():
    net = tiny.model()
    cache = kvote.Cache(net, METHOD)
    tokens, mask = tiny.padded(2, 20, [5, 0])
    cache.mark_span("image", 4, 8)
    tiny.generate(net, tokens, cache, mask, max_new_tokens=3)
    columns = cache.get_seq_length()
    assert held(cache, 0) == without(columns - 5, (0, 3))
    assert held(cache, 1) == without(columns, (4, 8))


def test_rows_of_several_caches_have_marks_of_their_own():
    net = tiny.model()
    rows, caches = kvote.Rows(net), [kvote.Cache(net, METHOD) for _ in range(2)]
    for cache, span in zip(caches, ((2, 5), (10, 14)), strict=True):
        rows.join(cache)
        cache.mark_span("image", *span)
    with torch.no_grad():
        net(**rows.inputs([tiny.ids(1, 12)[0], tiny.ids(1, 11)[0]]))
        net(**rows.inputs([tiny.ids(1, 2)[0], tiny.ids(1, 5)[0]]))
    assert [held(cache) for cache in caches] == [without(14, (2, 5)), without(16, (10, 14))]


def test_copies_and_files_go_on_with_the_marks(tmp_path):
    net, shown = tiny.model(), []
    method, text = Method("notesmarks", read=NotesMarks(shown)), tiny.ids(1, 10)
    cache = kvote.Cache(net, method)
    cache.mark_span("image", 2, 8)
    tiny.feed(net, cache, text[:, :6])
    cache.save(tmp_path / "marked")
    loaded = kvote.Cache.load(tmp_path / "marked", net, method)
    assert loaded.equals(cache)
    for each in (loaded, copy.deepcopy(cache), cache.fork(), cache):
        shown.clear()
        tiny.feed(net, each, text[:, 6:])
        assert shown == [{"image": [[1, 1, 0, 0]]}]


def test_a_crop_forgets_the_marks_of_what_goes_and_a_reset_all():
    net, shown = tiny.model(), []
    cache = kvote.Cache(net, Method("notesmarks", read=NotesMarks(shown)))
    cache.mark_span("system", 0, 2)
    cache.mark_span("image", 4, 7)
    cache.mark_span("question", 9, 10)
    tiny.feed(net, cache, tiny.ids(1, 8))
    cache.crop(-3)
    tiny.feed(net, cache, tiny.ids(1, 5))
    assert shown[1] == {"system": [[0] * 5], "image": [[0] * 5], "question": [[0, 0, 0, 0, 1]]}
    cache.reset()
    with pytest.raises(kvote.InputError, match=r"none is marked; call cache\.mark_span"):
        tiny.feed(net, cache, tiny.ids(1, 5))


def test_a_document_marks_itself_and_its_questions():
    net, shown = tiny.model(), []
    document = kvote.Document(net, Words(), "w1 w2 w3 w4 w5", Method("notesmarks", read=NotesMarks(shown)))
    n = len(document)
    assert shown == [{"document": [[1] * n]}]
    for question in ("w6 w7", "w8 w9 w10"):
        shown.clear()
        document.ask(question, max_new_tokens=2)
        assert shown[0]["document"] == [[0] * len(shown[0]["question"][0])]
        assert shown[0]["question"] == [[1] * len(shown[0]["question"][0])]
        assert shown[1] == {"document": [[0]], "question": [[0]]}


def test_what_is_no_span_is_refused():
    net = tiny.model()
    cache = kvote.Cache(net, METHOD)
    with pytest.raises(kvote.InputError, match="none is marked"):
        tiny.feed(net, cache, tiny.ids(1, 5))
    for span in ((3, 3), (-1, 2), (0.5, 2), ([1, 2], [3]), ([], [])):
        with pytest.raises(kvote.InputError, match="A span is from a column up to a later one"):
            cache.mark_span("image", *span)
    with pytest.raises(kvote.InputError, match="A mark has a name"):
        cache.mark_span("", 0, 2)
    cache.mark_span("image", [0, 0], [2, 3])
    with pytest.raises(kvote.InputError, match="'image' is marked in 2 prompts; got spans for 3"):
        cache.mark_span("image", [0, 0, 0], [2, 3, 4])
    with pytest.raises(kvote.InputError, match="'image' is marked in 2 prompts, and the batch has 3 rows"):
        tiny.feed(net, cache, tiny.ids(3, 5))
    tiny.feed(net, cache, tiny.ids(2, 5))
    with pytest.raises(kvote.InputError, match="The first 5 columns have been read already"):
        cache.mark_span("image", 4, 7)
    with pytest.raises(kvote.MethodError, match="asks for more of a pass than its token ids"):
        Method("odd", read=type("Odd", (NotesMarks,), {"needs": Needs(extra_inputs=frozenset({"images"}))})([]))
