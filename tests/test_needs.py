"""What parts of a method say of themselves, joined and compared."""

import pytest

from kvote.errors import MethodError
from kvote.keep.policies import AttentionFreeKeeper, KeepAll
from kvote.method import Method
from kvote.needs import ANYWHERE, NOTHING, WHOLE, Cuts, Keys, Needs
from kvote.read.reader import Everything
from kvote.read.recent import SinksAndRecent
from kvote.spec import parse
from kvote.store.quantised import Quantised
from kvote.store.uncompressed import Uncompressed


def test_keys_that_serve_two_parts_are_those_of_the_one_that_minds():
    assert Keys.ANY | Keys.ROTATED is Keys.ROTATED | Keys.ANY is Keys.ROTATED
    assert Keys.ANY | Keys.UNROTATED is Keys.UNROTATED
    assert Keys.ANY | Keys.ANY is Keys.ANY


def test_two_prefixes_may_be_cut_where_both_may():
    assert Cuts(6) & Cuts(4) == Cuts(12)
    assert ANYWHERE & Cuts(4) == Cuts(4)
    assert Cuts(4) & WHOLE == WHOLE & ANYWHERE == WHOLE


@pytest.mark.parametrize(
    ("spec", "every"),
    [
        ("dense", 1),
        ("oracle", 1),
        ("tokenselect(chunk=24)", 24),
        ("tokenselect(chunk=24, sketch='int8')", None),
        ("random(chunk=24)", None),
        ("streamingllm", None),
        ("snapkv", None),
        ("kivi | tokenselect(chunk=24)", None),
    ],
)
def test_a_method_says_where_its_prefixes_may_be_cut(spec, every):
    assert parse(spec).cuts.every == every


def test_a_method_needs_what_its_parts_need():
    joined = parse("expectedattention(per_head=False) | tokenselect(sketch='int8')").needs
    assert joined.keys is Keys.UNROTATED
    assert joined.rotation
    assert joined.equal_heads
    assert [index.name for index in joined.indexes] == ["sketch"]
    assert parse("dense").needs == Needs()
    assert parse("kvzip(chunk=77)").needs.repeat_chunk == 77


class Keeps(AttentionFreeKeeper):
    """A keeper of another package, which says only what is special about it."""

    budget = None
    survivors = None

    def __init__(self, **needs):
        self.own = Needs(**needs)

    @property
    def needs(self):
        return self.own


class Stores(Quantised):
    needs = NOTHING


class Lasting(Uncompressed):
    needs = Needs(lasting=True)


class Asking(Uncompressed):
    needs = Needs(extra_inputs=frozenset({"token ids"}))


@pytest.mark.parametrize(
    ("keep", "store", "read", "reason"),
    [
        (
            Keeps(keys=Keys.ROTATED),
            Uncompressed(),
            SinksAndRecent(2, 6),
            "what is kept of dropped tokens needs keys as the",
        ),
        (Keeps(uneven_heads=True), Stores(4, 32, 64), Everything(), "what is stored needs equally many"),
        (Keeps(uneven_heads=True), Uncompressed(), SinksAndRecent(2, 6), "the reader names one place in all of them"),
        (Keeps(repeat_chunk=9), Stores(4, 32, 64), Everything(), "a prompt is read again"),
        (Keeps(), Lasting(), Everything(), "dropped while generating"),
        (KeepAll(), Asking(), Everything(), "a store is shown queries, keys and values"),
    ],
)
def test_what_another_part_does_not_offer_is_refused(keep, store, read, reason):
    with pytest.raises(MethodError, match=reason):
        Method("theirs", keep, store, read)
