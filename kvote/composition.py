"""Which answers of the three rooms make sense together: what each needs of the others, and what these offer. The table
in the docs is made from this, by trying."""

from collections.abc import Callable
from typing import NamedTuple

from kvote.extra_inputs import HIDDEN, IDS, INPUTS, MARKS
from kvote.keep.keeper import Keeper
from kvote.needs import Keys
from kvote.read.reader import Reader
from kvote.store.segment import Store


class Parts(NamedTuple):
    """The answers of a method."""

    keep: Keeper
    store: Store
    read: Reader


class Rule(NamedTuple):
    """Parts that it is ``broken`` by cannot work together; the ``reason`` is a clause without a full stop, in which
    "{index}" is an index that cannot be had."""

    broken: Callable[[Parts], bool]
    reason: str


def _index_lacks_heads(parts: Parts) -> bool:
    return not parts.keep.offers.whole_layers and any(index.whole_layers for index in parts.read.needs.indexes)


def _index_lacks_keys(parts: Parts) -> bool:
    return not parts.store.offers.as_made and any(index.required for index in parts.read.needs.indexes)


def _layers_differ(parts: Parts) -> bool:
    needs, offers = parts.store.needs, parts.keep.offers
    return (
        (needs.equal_heads and not offers.equal_heads)
        or (needs.equal_layers and not offers.equal_layers)
        or (needs.whole_layers and not offers.whole_layers)
    )


# The first that is broken is told.
RULES = (
    Rule(
        lambda of: of.read.needs.lists and not of.store.offers.lists,
        "the reader picks single tokens, but what is stored can only be read as a whole",
    ),
    Rule(
        lambda of: of.read.needs.equal_heads and not of.keep.offers.equal_heads,
        "the tokens kept differ from head to head, but the reader takes one list of tokens for all heads, in which "
        "the same place would mean other tokens in every head; write per_head=False",
    ),
    Rule(
        lambda of: of.keep.needs.uneven_heads and not of.store.offers.uneven_heads,
        "key heads would hold different numbers of tokens, and what is stored needs equally many",
    ),
    Rule(
        lambda of: of.keep.needs.uneven_heads and not of.read.offers.uneven_heads,
        "key heads would hold different numbers of tokens, and the reader names one place in all of them",
    ),
    Rule(
        lambda of: of.store.needs.lasting and of.keep.offers.drops and of.keep.offers.drops_generated,
        "tokens would be dropped while generating, and every time what is stored would have to be decoded and "
        "encoded again; use a method that drops tokens with prompts only",
    ),
    Rule(
        lambda of: of.keep.needs.keys is Keys.ROTATED and Keys.UNROTATED in (of.read.needs.keys, of.store.needs.keys),
        "what is kept of dropped tokens needs keys as the model rotated them, but the method it is joined with "
        "holds keys without rotation",
    ),
    Rule(
        lambda of: of.read.needs.keys is Keys.ROTATED and of.store.needs.keys is Keys.UNROTATED,
        "the reader scores keys as the model rotated them, but the store holds keys without rotation",
    ),
    Rule(
        lambda of: of.store.needs.keys is Keys.ROTATED and of.read.needs.keys is Keys.UNROTATED,
        "what is stored is made of keys as the model rotated them, but the reader needs them without rotation",
    ),
    Rule(
        lambda of: of.keep.needs.repeat_chunk > 0 and not of.store.offers.as_made,
        "a prompt is read again before it is known which of its tokens stay, and would be encoded by then; "
        "use a method that holds tokens as the model made them",
    ),
    Rule(_index_lacks_keys, "the reader scores {index}, and they are kept beside keys as the model made them only"),
    Rule(
        _index_lacks_heads,
        "the reader needs all key heads of a layer held together, but some of them keep their tokens apart",
    ),
    Rule(
        lambda of: of.read.needs.whole_layers and not of.keep.offers.whole_layers,
        "the reader pairs query and key heads by their places in the whole layer, but some of them keep their "
        "tokens apart; write head_map='gqa', or leave patterns out",
    ),
    Rule(
        _layers_differ,
        "layers share what is stored of a token, but they, or their heads, would not keep the same tokens; use a "
        "method that keeps the same everywhere",
    ),
    Rule(
        lambda of: of.read.offers.adds_up and of.keep.offers.drops,
        "the reader adds up the attention that every token receives, and would lose count of tokens that move",
    ),
    Rule(
        lambda of: (
            not of.keep.offers.equal_layers
            and (of.read.needs.equal_layers or of.keep.offers.layers_alike % of.read.needs.layers_alike > 0)
        ),
        "the reader takes over the tokens that another layer has picked, but layers do not keep the same tokens",
    ),
    Rule(
        lambda of: of.read.offers.apart and of.read.needs.prompts,
        "prompts would be read by a reader of their own, and the other one must have read them itself",
    ),
    Rule(
        lambda of: bool(of.store.needs.extra_inputs - {INPUTS}),
        "a store is shown queries, keys and values, and of all else only what enters the layer",
    ),
    Rule(
        lambda of: bool((of.keep.needs.extra_inputs | of.read.needs.extra_inputs) - {IDS, HIDDEN, MARKS}),
        "a part asks for more of a pass than its token ids, hidden states and marks",
    ),
)


def conflict(keep: Keeper, store: Store, read: Reader) -> str | None:
    """Why these parts cannot work together, as a clause without a full stop; None if they can."""
    parts = Parts(keep, store, read)
    for rule in RULES:
        if rule.broken(parts):
            named = next((index.name for index in read.needs.indexes if index.required), "")
            return rule.reason.format(index=named)
    return None
