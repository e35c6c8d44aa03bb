"""Which answers of the three rooms make sense together. The table in the docs is made from this, by trying."""

from kvote.keep.keeper import Keeper
from kvote.read.tokens import Reader
from kvote.store.segment import Store


def conflict(keep: Keeper, store: Store, read: Reader) -> str | None:
    """Why these parts cannot work together, as a clause without a full stop; None if they can."""
    if read.lists and not store.lists:
        return "the reader picks single tokens, but what is stored can only be read as a whole"
    if keep.per_head and read.one_list:
        return (
            "the tokens kept differ from head to head, but the reader takes one list of tokens for all heads, in which "
            "the same place would mean other tokens in every head; write per_head=False"
        )
    if getattr(keep, "uneven", False):
        if not getattr(store, "uneven", False):
            return "key heads would hold different numbers of tokens, and what is stored needs equally many"
        if not getattr(read, "uneven", False):
            return "key heads would hold different numbers of tokens, and the reader names one place in all of them"
    if store.regroups and keep.drops and keep.while_generating:
        return (
            "tokens would be dropped while generating, and every time what is stored would have to be decoded and "
            "encoded again; use a method that drops tokens with prompts only"
        )
    if keep.needs_plain_keys and (read.needs_raw_keys or store.needs_raw_keys):
        return (
            "what is kept of dropped tokens needs keys as the model rotated them, but the method it is joined with "
            "holds keys without rotation"
        )
    if read.needs_plain_keys and store.needs_raw_keys:
        return "the reader scores keys as the model rotated them, but the store holds keys without rotation"
    if store.needs_plain_keys and read.needs_raw_keys:
        return "what is stored is made of keys as the model rotated them, but the reader needs them without rotation"
    if keep.echo and not store.indexed:
        return (
            "a prompt is read again before it is known which of its tokens stay, and would be encoded by then; "
            "use a method that holds tokens as the model made them"
        )
    for index in read.indexes:
        if index.required and not store.indexed:
            return f"the reader scores {index.name}, and they are kept beside keys as the model made them only"
        if index.whole_layers and keep.splits:
            return "the reader needs all key heads of a layer held together, but some of them keep their tokens apart"
    if read.pairs_by_layer and keep.splits:
        return (
            "the reader pairs query and key heads by their places in the whole layer, but some of them keep their "
            "tokens apart; write head_map='gqa'"
        )
    if store.spans_layers and (keep.splits or (keep.drops and (keep.per_layer or keep.per_head))):
        return (
            "layers share what is stored of a token, but they, or their heads, would not keep the same tokens; use a "
            "method that keeps the same everywhere"
        )
    if getattr(read, "adds_up", False) and keep.drops:
        return "the reader adds up the attention that every token receives, and would lose count of tokens that move"
    if read.crosses_layers and keep.drops and keep.per_layer:
        return "the reader takes over the tokens that another layer has picked, but layers do not keep the same tokens"
    return None
