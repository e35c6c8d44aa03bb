"""Which methods may be joined: pairs that make no sense are refused when they are built, by name, with the reason."""

import pytest

from kvote.errors import MethodError
from kvote.keep.allocate.heads import KeepByHead
from kvote.keep.evict import sinks_and_recent
from kvote.method import Method
from kvote.read.labels import LabelWinners
from kvote.spec import parse

LABELS = Method("labels", read=LabelWinners({}, 8, 0.5, 0))
HEADS = Method("heads", keep=KeepByHead(frozenset({(0, 0)}), ((0, 2),), sinks_and_recent(1, 4)))

REFUSED = [
    (parse("snapkv"), parse("tokenselect"), "takes one list of tokens for all heads.*per_head=False"),
    (parse("h2o"), parse("kivi"), "decoded and encoded again"),
    (parse("mikv"), parse("tokenselect"), "can only be read as a whole"),
    (parse("kivi"), LABELS, "kept beside keys as the model made them"),
    (parse("kivi"), parse("quest"), "scores page bounds, and they are kept beside keys as the model made them"),
    (HEADS, LABELS, "all key heads of a layer held together"),
    (parse("h2o"), parse("tidaldecode"), "layers do not keep the same tokens"),
    (parse("think"), LABELS, "kept beside keys as the model made them"),
    (parse("xkv"), LABELS, "the store holds keys without rotation"),
    (parse("think"), parse("tokenselect"), "made of keys as the model rotated them, but the reader needs them without"),
    (parse("xkv"), parse("tidaldecode"), "scores keys as the model rotated them, but the store holds keys without"),
    (parse("xkv"), parse("snapkv(per_head=False)"), "layers share what is stored of a token"),
    (parse("tokenselect(head_map='paper')"), HEADS, "pairs query and key heads by their places.*write head_map='gqa'"),
    (parse("xkv"), HEADS, "layers share what is stored of a token"),
]


@pytest.mark.parametrize(("left", "right", "reason"), REFUSED, ids=lambda part: getattr(part, "spec", None))
def test_a_pair_that_makes_no_sense_is_refused_by_name(left, right, reason):
    for a, b in ((left, right), (right, left)):
        with pytest.raises(MethodError, match=reason) as refusal:
            a | b
        assert str(refusal.value).startswith(f"{a.spec} | {b.spec}: ")


@pytest.mark.parametrize(
    "spec",
    [
        "snapkv(per_head=False) | tokenselect",
        "snapkv | kivi",
        "kivi | tokenselect",
        "cake(per_head=False, evict_generated=False) | kivi | tokenselect",
        "streamingllm",
        "snapkv | think",
        "think | tidaldecode",
        "xkv | tokenselect",
        "streamingllm | xkv",
    ],
)
def test_pairs_that_answer_different_questions_are_joined(spec):
    assert parse(spec).spec == spec
