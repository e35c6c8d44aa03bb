"""Which classes hold state, and what of it is derived. A class that is split or renamed changes one line here; a
package with a method whose reader or keeper remembers something lists its own with ``register``."""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch

from kvote.saving import checks as check
from kvote.saving.disk import describe_disk, fill_disk
from kvote.saving.pages import describe_pool, fill_pool
from kvote.state import FILED, Describer, Form, Maker
from kvote.step import Step
from kvote.store.pages import UncompressedPool
from kvote.store.segment import Scaling

_registered: dict[str, tuple[str, Form]] = {}
# Heads and channels that no model reaches.
_WIDEST = 65_536


def register(name: str, kind: str, derived: str = "", **more: Any) -> None:
    """Lists the class ``kind``, such as "kvote.read.reader:Activity", under the ``name`` that files give it.
    ``derived``: attributes that are no state, with spaces between; the rest as ``Form`` has it. Raises ValueError for a
    name that another class has."""
    if _registered.get(name, (kind,))[0] != kind:
        raise ValueError(f"{name!r} is what files call {_registered[name][0]}, and not {kind}.")
    _registered[name] = kind, Form(frozenset(derived.split()), **more)
    forms.cache_clear()


@functools.cache
def forms() -> Mapping[type, tuple[str, Form]]:
    """All of them, by class."""
    found = {}
    for name, (kind, form) in _registered.items():
        module, _, attribute = kind.partition(":")
        found[getattr(importlib.import_module(module), attribute)] = name, form
    return found


_LAYER = (
    "index method rope layers stack others_drop passes number counted one_call_step reads keeps step_rope "
    "shares_layers _hears _looks_across"
)


def _describe_layer(layer: Any, describer: Describer, path: str) -> dict[str, Any]:
    facts = describer.attributes(layer, frozenset(_LAYER.split()), path)
    if layer.segment is not None:
        pool = _uncompressed_pool(layer.segment)
        dtype = describer.value(pool.keys.dtype, path)["dtype"]
        facts["form"] = [layer.sequences, layer.segment.heads, pool.keys.shape[-1], pool.values.shape[-1], dtype]
    return facts


def _uncompressed_pool(segment: Any) -> UncompressedPool:
    """The pool in which the latest tokens lie, uncompressed."""
    inner = list(vars(segment).values())
    for held in inner:
        if isinstance(held, UncompressedPool):
            return held
    return next(held.pool for held in inner if isinstance(getattr(held, "pool", None), UncompressedPool))


def _fill_layer(layer: Any, facts: dict[str, Any], maker: Maker) -> None:
    """Starts the layer as its first pass would, with no token, and fills what that has made."""
    form = facts.pop("form", None)
    if (form is None) != (facts.get("segment") is None):
        raise ValueError("a layer does not say what its tokens are like")
    if form is not None:
        match form:
            case [int(rows), int(heads), int(dim), int(value_dim), str(dtype)]:
                sizes = (rows, heads, dim, value_dim)
            case _:
                raise ValueError("the form of a layer is none")
        if any(not 0 < size <= _WIDEST for size in sizes):
            raise ValueError("a layer has more sequences, heads or channels than there can be")
        kind = maker.value({"dtype": dtype})
        key = torch.empty(rows, heads, 0, dim, dtype=kind, device=maker.device)
        value = torch.empty(rows, heads, 0, value_dim, dtype=kind, device=maker.device)
        none = torch.empty(rows, 0, dtype=torch.int64, device=maker.device)
        layer.start(Step(key, key, value, none, None, 0, Scaling(1.0)))
    maker.attributes(layer, facts, frozenset(_LAYER.split()), False)
    layer.record.waiting = [replace(seen, rope=layer.rope) for seen in layer.record.waiting]
    check.layer(layer)
    layer.count()


def _parts(**places: str) -> dict[str, Any]:
    """How a class is described whose files name parts by other names than its attributes, such as "a.b", have."""

    def describe(made: Any, describer: Describer, path: str) -> dict[str, Any]:
        return {name: describer.value(attrgetter(at)(made), f"{path}.{name}") for name, at in places.items()}

    def fill(made: Any, facts: dict[str, Any], maker: Maker) -> None:
        if facts.keys() != places.keys():
            raise ValueError(f"a {type(made).__name__} has other parts than {', '.join(sorted(facts))}"[:200])
        for name, inner in facts.items():
            *owners, attribute = places[name].split(".")
            owner = attrgetter(".".join(owners))(made) if owners else made
            maker.attributes(owner, {FILED.get(attribute, attribute): inner}, frozenset(), False)

    return {"describe": describe, "fill": fill}


_QUANTISED = _parts(raw="uncompressed", keys="packed.keys", values="packed.values", _before="packed.before")


def _describe_quantised(segment: Any, describer: Describer, path: str) -> dict[str, Any]:
    before = segment.packed.before
    more = {"_first": [part.shape[1] for part in before], "_alike": [len(part) == 1 for part in before]}
    return {**_QUANTISED["describe"](segment, describer, path), **more}


def _fill_quantised(segment: Any, facts: dict[str, Any], maker: Maker) -> None:
    parts, packed = {name: inner for name, inner in facts.items() if name not in ("_first", "_alike")}, segment.packed
    _QUANTISED["fill"](segment, parts, maker)
    if any(not isinstance(part, torch.Tensor) or part.dim() != 2 for part in packed.before):
        raise ValueError("packed tokens stand at other positions than there are")
    first, alike = facts.get("_first"), facts.get("_alike")
    if first != [part.shape[1] for part in packed.before] or not isinstance(alike, list) or len(alike) != len(first):
        raise ValueError("packed tokens stand at other positions than there are")
    for row, same in enumerate(alike):
        if not same:
            packed.before[row] = packed.before[row].expand(segment.heads, -1)


def _describe_apart(segment: Any, describer: Describer, path: str) -> dict[str, Any]:
    held = _describe_quantised(segment, describer, path)
    for name, inner in {"exact": segment.packed.exact, "largest": segment.largest}.items():
        held[name] = describer.value(inner, f"{path}.{name}")
    return held


def _fill_apart(segment: Any, facts: dict[str, Any], maker: Maker) -> None:
    rest = {name: inner for name, inner in facts.items() if name not in ("exact", "largest")}
    # Objects are numbered in the order in which they were described.
    _fill_quantised(segment, rest, maker)
    segment.packed.exact = maker.value(facts["exact"])
    segment.largest = maker.value(facts["largest"])


def _fill_native(layer: Any, facts: dict[str, Any], maker: Maker) -> None:
    """A native layer gets some of its attributes with its first token only."""
    layer.dtype = None
    maker.attributes(layer, facts, frozenset(_NATIVE.split()), False)
    layer.device = maker.device


_NATIVE = "device _sliding_window_tensor"

register("layer", "kvote.layer:Layer", _LAYER, describe=_describe_layer, fill=_fill_layer)
register("layer in groups", "kvote.heads:HeadGroups", "index method")
register("head group", "kvote.heads:HeadGroup", "heads")
register(
    "cache layer",
    "kvote.hf.cache_layer:CacheLayer",
    "announced previous rotary needs_positions extra_inputs pending followed keys values",
)
register("layout", "kvote.prompt:Layout")
register("turn", "kvote.phase:AnnouncedPrompt", "extra_inputs")
register("marked", "kvote.marked:Marked")
register("beside", "kvote.extra_inputs:ExtraInputs", "inputs")
register("passes", "kvote.passes:Passes", "corrupt has_native_states thread held peak joined lock repeats")
register("record", "kvote.keep.record:Record", "keeper")
register("activity", "kvote.read.reader:Activity")
for _name in (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
):
    register(f"native {_name}", f"transformers.cache_utils:{_name}", _NATIVE, fill=_fill_native)

# Tokens.
register("pool", "kvote.store.pages:PagePool", describe=describe_pool, fill=fill_pool)
register("raw pool", "kvote.store.pages:UncompressedPool", describe=describe_pool, fill=fill_pool)
_UNCOMPRESSED = "heads rope kernels _step _only _most_heads _coded _written indexes"
register("raw", "kvote.store.uncompressed:UncompressedSegment", _UNCOMPRESSED, check=check.uncompressed)
register("uneven", "kvote.store.uneven:UnevenSegment", _UNCOMPRESSED, check=check.uneven)
register("packed", "kvote.store.packed:PackedLanes", "heads form backend transform", check=check.packed)
register(
    "quantised",
    "kvote.store.quantised:QuantisedSegment",
    describe=_describe_quantised,
    fill=_fill_quantised,
    check=check.quantised,
)
register(
    "sinks apart",
    "kvote.store.apart:ApartSegment",
    describe=_describe_apart,
    fill=_fill_apart,
    check=check.apart,
)
_PROBED = _parts(tail="uncompressed", bodies="prompts.bodies", probes="probes", heard="scaling")
register("probed prompt", "kvote.store.probed:ProbedSegment", check=check.probed, **_PROBED)
register("probes", "kvote.store.saliency:Probes")
register("salient body", "kvote.store.salient:SalientBody", check=check.salient)
register("salient part", "kvote.store.salient:Part")
register("bits", "kvote.store.salient:Bits")
register("exact tokens", "kvote.store.apart:Exact", check=check.exact)
register("largest", "kvote.store.apart:Largest", check=check.largest)
_PROMPT = _parts(tail="uncompressed", bodies="prompts.bodies", waiting="waiting")
register("prompt", "kvote.store.prompt:PromptSegment", check=check.prompt, **_PROMPT)
register("waiting", "kvote.store.prompt:Waiting")
register("thin body", "kvote.store.thin:ThinBody", check=check.thin)
register("basis", "kvote.store.low_rank:Basis", "_last", check=check.basis)
register("low-rank body", "kvote.store.low_rank:LowRankBody", check=check.low_rank)
register("side", "kvote.store.pair:Side", check=check.side)
register("pair", "kvote.store.pair:Pair", "_last", check=check.pair)
register("merged body", "kvote.store.merged:MergedBody", check=check.merged)
register("offloaded", "kvote.store.offloaded:OffloadedSegment", "heads rope regions recent", check=check.offloaded)
register("disk region", "kvote.store.disk_region:DiskRegion", describe=describe_disk, fill=fill_disk)
_TWO = "kvote.store.two_precisions:TwoPrecisionSegment"
register("two precisions", _TWO, f"{_UNCOMPRESSED} balanced", check=check.two_precisions)
register("balance", "kvote.store.two_precisions:Balance")

# What readers and keepers remember.
register("selection", "kvote.read.reuse:SelectionMemory", "in_place _known")
register("chosen", "kvote.read.persistent:ChosenTokens")
register("running sentence", "kvote.read.running:Running")
register("sentences", "kvote.read.running:Sentences", "grouped")
register("exchange", "kvote.read.exchanges:Exchange")
register("exchange shown", "kvote.read.exchanges:Shown")
register("exchanges", "kvote.read.exchanges:Exchanges", "window")
register("passed", "kvote.read.local_mass:Passed")
register("blocks", "kvote.read.local_mass:Blocks")
register("local mass", "kvote.read.local_mass:LocalMass", "sinks block")
register("habit", "kvote.read.probed:Habit")
register("probed", "kvote.read.probed:Probed", "sinks block")
register("mass", "kvote.keep.score.mass:Mass")
register("visible", "kvote.keep.subtasks:Visible")
register("most attention", "kvote.keep.score.any_query:Most")
register("noised mass", "kvote.keep.score.noised:NoisedMass")
register("signs", "kvote.keep.score.hybrid_memory:HybridMemory")
register("prompt mass", "kvote.keep.score.prompt_attention:PromptMass")
register("importance", "kvote.keep.score.overall_or_recent:Importance")
register("moments", "kvote.keep.score.votes:Moments")
register("vote", "kvote.keep.score.votes:Vote")
register("votes", "kvote.keep.score.votes:Votes")
register("prompts ended", "kvote.keep.score.random_score:EndedPrompts")
register("repeated", "kvote.keep.score.repeat_attention:RepeatMemory")
register("gaussian", "kvote.keep.score.gaussians:Gaussian")
register("gaussians", "kvote.keep.score.gaussians:Gaussians")
register("mean", "kvote.keep.merge.means:Mean")
register("means", "kvote.keep.merge.means:Means")
register("observation", "kvote.keep.observation:Observation", "rope")
register("queries", "kvote.read.reader:Queries")
register("span", "kvote.read.reader:Span")
register("token set", "kvote.read.reader:TokenSet")
register("logits", "kvote.store.segment:Scaling")
