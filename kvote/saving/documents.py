"""Documents as files: the cache, the token ids that are in it, and whose they are."""

import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kvote.cache import Cache
from kvote.document import Document
from kvote.errors import InputError, MethodError
from kvote.files import named
from kvote.method import Method
from kvote.prompt import Layout
from kvote.saving import caches, identity, recipe
from kvote.saving.block_file import BlockFile
from kvote.state import Describer, Maker

_MOST = 2**31 - 1


def save(document: Document, path: str | Path) -> None:
    """Does what ``Document.save`` does."""

    def more(describer: Describer) -> dict[str, Any]:
        return {
            "tokenizer": identity.of_tokenizer(document.tokenizer),
            "token_ids": identity.of_ids(document.token_ids),
            "document": {name: describer.value(getattr(document, name), f"document.{name}") for name in document.STATE},
        }

    with document.quiet() as cache:
        caches.save(cache, path, caches.DOCUMENT, more)


def load(
    path: str | Path,
    model: Any,
    tokenizer: Any,
    text: str | None = None,
    method: Method | str | None = None,
    reading: Mapping[str, Any] = MappingProxyType({}),
) -> Document:
    """Does what ``Document.load`` does."""
    try:
        return _loaded(path, model, tokenizer, text, method)
    except (InputError, MethodError) as error:
        if text is None:
            raise
        chosen = method if method is not None else method_of(path)
        if chosen is None:
            raise InputError(f"{error} To read the text again, give method= as well.") from error
        warnings.warn(f"{error} The text is read again.", stacklevel=3)
        return Document(model, tokenizer, text, chosen, **reading)


def _loaded(path: str | Path, model: Any, tokenizer: Any, text: str | None, method: Method | str | None) -> Document:
    def check(facts: dict[str, Any]) -> None:
        if facts["tokenizer"] != identity.of_tokenizer(tokenizer):
            raise InputError(f"{named(path)} was made with another tokenizer; read the text again with this one.")

    cache, facts, maker = caches.load(path, model, method, caches.DOCUMENT, check)
    with caches.sensible(path):
        made = _filled(cache, facts, maker, model, tokenizer)
    if text is not None and not torch.equal(made.ids_of(text), made.token_ids):
        raise InputError(f"{named(path)} holds another text.")
    return made


def _filled(cache: Cache, facts: dict[str, Any], maker: Maker, model: Any, tokenizer: Any) -> Document:
    made = object.__new__(Document)
    held = facts["document"]
    if held.keys() != set(Document.STATE):
        raise ValueError("a document has other attributes")
    for name, inner in held.items():
        setattr(made, name, maker.value(inner))
    made.model, made.tokenizer, made.cache = model, tokenizer, cache
    made._lock, made._asking, made._progress, made._library = threading.RLock(), False, None, None
    ids, known = made.token_ids, model.get_input_embeddings().weight.shape[0]
    if (
        ids.dtype != torch.int64
        or ids.shape != (1, cache.get_seq_length())
        or identity.of_ids(ids) != facts["token_ids"]
    ):
        raise ValueError("its tokens are not those of its cache")
    if not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise ValueError("it has tokens that the model does not know")
    asked = made._queries
    if asked is not None and (asked.dtype != torch.int64 or asked.dim() != 2 or not asked.numel()):
        raise ValueError("its queries are no tokens")
    if asked is not None and not 0 <= int(asked.min()) <= int(asked.max()) < known:
        raise ValueError("its queries are no tokens")
    if not isinstance(made.layout, Layout) or not all(
        isinstance(part, str | bool) for part in vars(made.layout).values()
    ):
        raise ValueError("it has no layout")
    per_pass, seconds = made._tokens_per_pass, made.prefill_seconds
    if type(per_pass) is not int or not 1 <= per_pass <= _MOST or not isinstance(seconds, float):
        raise ValueError("it was read in no passes that there are")
    return made


def method_of(path: str | Path) -> Method | None:
    """The method in a file whose header is whole, if it says how that is built."""
    try:
        with BlockFile(path) as file:
            return recipe.build(file.facts.get("method"))
    except (InputError, MethodError):
        return None
