"""Methods: what a spec may say, and how methods join."""

import re
from dataclasses import replace

import pytest

import kvote
from kvote import MethodError, methods
from kvote.keep.evict import sinks_and_recent
from kvote.keep.policies import KeepAll
from kvote.method import METHODS, Method
from kvote.read.head_votes import HeadVotes
from kvote.read.reader import Everything
from kvote.spec import parse


@pytest.mark.parametrize("name", [name for name in methods.__all__ if "kvote calibrate" not in METHODS[name].needs])
def test_a_name_alone_gives_the_defaults(name):
    assert parse(name) == parse(f"{name}()") == parse(f"  {name} ( ) ") == getattr(methods, name)()


def test_parameters_arrive():
    read = parse("tokenselect(top_k=7, theta=0.5, head_map='paper')").read
    assert isinstance(read, HeadVotes)
    assert (read.top_k, read.theta, read.head_map, read.sinks) == (7, 0.5, "paper", 128)


def test_the_spec_of_a_method_builds_it_again():
    for spec in ("dense", "streamingllm(sinks=2, window=9)", "tokenselect(top_k=7, sinks=1, window=2, chunk=3)"):
        assert parse(parse(spec).spec) == parse(spec)


def test_the_spec_of_a_method_tells_every_parameter_that_differs_from_its_default():
    for spec in ("tokenselect(theta=2.0)", "tokenselect(tail=0)", "random(seed=3)", "tokenselect(max_pool=5)"):
        assert parse(parse(spec).spec) == parse(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tokenselekt", "There is no method 'tokenselekt'; did you mean tokenselect?"),
        ("xyz", "There is no method 'xyz'; there are actqkv, adakv, cake, "),
        ("tokenselect(topk=5)", "tokenselect has no parameter 'topk'; it has top_k, sinks"),
        ("dense(x=1)", "dense has no parameter 'x'; it has none"),
        ("tokenselect(512)", "with named parameters"),
        ("tokenselect(*[1])", "with named parameters"),
        ("tokenselect(**{'top_k': 1})", "with named parameters"),
        ("", "is not a method"),
        ("tokenselect(", "is not a method"),
        ("tokenselect | ", "is not a method"),
        ("tokenselect & dense", "is not a method"),
        ("'dense'", "is not a method"),
        ("dense\x00", "is not a method"),
        ("dense\ndense", "is not a method"),
        ("dense | " * 5000 + "dense", "is not a method"),
        ("(" * 500 + "dense" + ")" * 500, "is not a method"),
        ("tokenselect(top_k=1, top_k=2)", "tokenselect is given a parameter twice"),
    ],
    ids=lambda value: value[:24],
)
def test_a_spec_that_makes_no_sense_is_refused(spec, message):
    with pytest.raises(MethodError, match=re.escape(message)):
        parse(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "__import__('os').system('true')",
        "tokenselect(top_k=__import__('os').getpid())",
        "tokenselect.__class__",
        "tokenselect(top_k=[x for x in (1,)][0])",
        "(lambda: dense)()",
        "dense if 1 else dense",
        "tokenselect(top_k=f'{1}')",
        "tokenselect(top_k=open('/etc/passwd'))",
        "tokenselect(top_k=9**9**9)",
        "tokenselect(top_k={[]: 1})",
        "tokenselect(top_k={1, []})",
        "eval('1')",
        "METHODS",
    ],
)
def test_nothing_in_a_spec_is_evaluated(spec):
    with pytest.raises(MethodError):
        parse(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tokenselect(top_k=0)", "top_k must be a whole number of at least 1; got 0"),
        ("tokenselect(sinks=-1)", "sinks must be"),
        ("tokenselect(chunk=0)", "chunk must be"),
        ("tokenselect(top_k=1.5)", "top_k must be a whole number"),
        ("tokenselect(top_k='many')", "top_k must be a whole number"),
        ("tokenselect(sinks=True)", "sinks must be a whole number"),
        ("tokenselect(tensor_parallel='yes')", "tensor_parallel must be True or False"),
        ("tokenselect(theta='x')", "theta"),
        ("tokenselect(theta=None)", "theta"),
        ("tokenselect(max_pool=-1)", "max_pool"),
        ("tokenselect(max_pool='x')", "max_pool"),
        ("tokenselect(theta=1e999)", "theta must be a finite number; got inf"),
        ("tokenselect(theta=True)", "theta must be a finite number; got True"),
        ("tokenselect(head_map='mod')", "head_map must be 'gqa' or 'paper'"),
        ("tokenselect(selection='best')", "selection must be one of soft_vote, head_vote, logit_sum"),
        ("tokenselect(positions='none')", "positions must be"),
        ("random(seed='x')", "seed"),
        ("streamingllm(sinks=-1)", "streamingllm needs whole numbers sinks >= 0"),
        ("streamingllm(window=0)", "window >= 1"),
        ("streamingllm(window='x')", "streamingllm needs whole numbers"),
        ("streamingllm(window=2.5)", "window"),
        ("streamingllm(sinks=True)", "streamingllm needs whole numbers"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused_when_the_method_is_built(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)


def test_a_refused_spec_leaves_no_trail_of_other_errors():
    with pytest.raises(MethodError) as caught:
        parse("tokenselect(top_k=open)")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_methods_that_answer_different_questions_join():
    keeps = Method("keeper", keep=sinks_and_recent(1, 2))
    joined = keeps | methods.tokenselect(top_k=5)
    assert joined.keep == keeps.keep
    assert joined.read == methods.tokenselect(top_k=5).read
    assert joined.spec.startswith("keeper | tokenselect(top_k=5")
    swapped = methods.tokenselect(top_k=5) | keeps
    assert (swapped.keep, swapped.read) == (joined.keep, joined.read)


def test_dense_joins_with_anything():
    joined = parse("dense | tokenselect(top_k=5) | dense")
    assert joined.read == methods.tokenselect(top_k=5).read
    assert isinstance(joined.keep, KeepAll)
    assert isinstance(parse("dense | dense").read, Everything)


@pytest.mark.parametrize(
    ("spec", "room"),
    [
        ("tokenselect | random", "read"),
        ("streamingllm | streamingllm(window=9)", "keep"),
        ("streamingllm | tokenselect", "read"),
        ("dense | tokenselect | random", "read"),
    ],
)
def test_two_answers_to_one_question_are_refused_naming_both(spec, room):
    with pytest.raises(MethodError, match=f"both decide what to {room}") as caught:
        parse(spec)
    for name in set(spec.replace("(window=9)", "").split(" | ")) - {"dense"}:
        assert name in str(caught.value)


@pytest.mark.parametrize("published", METHODS.values(), ids=METHODS)
def test_every_method_says_where_it_comes_from_and_what_it_does(published):
    assert published.source
    assert published.needs
    assert published.summary.endswith(".")
    if "kvote calibrate" in published.needs:
        with pytest.raises(MethodError, match=f"{published.name} needs to know .*`kvote calibrate .*FILE"):
            published.build()
        return
    assert published.build().spec.startswith(published.name)


def test_errors_can_be_caught_as_one_kind():
    with pytest.raises(kvote.KvoteError):
        parse("nothing")
    with pytest.raises(ValueError, match="There is no method"):
        parse("nothing")


def test_methods_are_values():
    method = methods.tokenselect(top_k=5)
    assert method == methods.tokenselect(top_k=5) != methods.tokenselect(top_k=6)
    assert replace(method, spec="other").read == method.read
