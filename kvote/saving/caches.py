"""Caches and documents as files: what is written, whose it is, and how it is loaded again."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvote.cache import Cache
from kvote.calibration.fingerprint import Fingerprint
from kvote.errors import InputError, MethodError
from kvote.files import named
from kvote.method import Method
from kvote.saving import identity, recipe
from kvote.saving.block_file import BlockFile, damaged, write
from kvote.saving.classes import forms
from kvote.spec import parse
from kvote.state import Describer, Maker, same_bits

CACHE, DOCUMENT = "cache", "document"


def describe(cache: Cache, describer: Describer) -> dict[str, Any]:
    """All that a cache holds, as facts; the tensors that they name are the describer's.

    Raises InputError for what kvote cannot describe, and what ``Cache.check`` raises.
    """
    cache.passes.claim(cache)
    cache.check()
    return {
        "turn": describer.object(cache.announced, "turn"),
        "passes": describer.object(cache.passes, "passes"),
        "layers": [describer.object(layer, f"layers.{i}") for i, layer in enumerate(cache.layers)],
    }


def save(
    cache: Cache, path: str | Path, kind: str = CACHE, more: Callable[[Describer], dict[str, Any]] | None = None
) -> int:
    """Writes ``cache`` into a file and returns its size. ``more``: facts beside it, and tensors that they name.

    Raises InputError where nothing can be written, and as ``describe``.
    """
    # Forks that share its pages may move them.
    with cache._exclusive:
        describer = Describer(forms())
        facts = {
            "kind": kind,
            "cache": describe(cache, describer),
            "method": recipe.describe(cache.method),
            "model": identity.of_model(cache.model),
            "tokens": cache.get_seq_length(),
            "nbytes": cache.nbytes(),
        }
        if more is not None:
            facts |= more(describer)
        return write(path, facts, describer.tensors)


def equal(one: Cache, other: Cache) -> bool:
    """Whether two caches of one model and method hold the same, bit by bit."""
    if not recipe.same(one.method, other.method) or one.model is not other.model:
        return False
    mine, theirs = Describer(forms()), Describer(forms())
    if describe(one, mine) != describe(other, theirs) or mine.tensors.keys() != theirs.tensors.keys():
        return False
    return all(same_bits(block.make(), theirs.tensors[name].make()) for name, block in mine.tensors.items())


def parts(cache: Cache) -> tuple[Any, ...]:
    """The arguments of ``restored``, as a pickle needs them."""
    describer = Describer(forms())
    facts = describe(cache, describer)
    return cache.model, cache.method, facts, {name: block.make() for name, block in describer.tensors.items()}


def restored(model: Any, method: Method, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Cache:
    """The cache again."""
    cache = Cache(model, method)
    _fill(cache, facts, Maker(forms(), tensors, _device(model)))
    return cache


def load(
    path: str | Path,
    model: Any,
    method: Method | str | None = None,
    kind: str = CACHE,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Cache, dict[str, Any], Maker]:
    """The cache in a file, for the model that it was made with; all facts of the file, and what makes values of them.

    ``method``: that of the saved cache, where the file cannot tell how to build it. ``check`` is given the facts before
    anything is read. Raises InputError for a file that is damaged, of another kind, or another model's.
    """
    with BlockFile(path) as file, sensible(path):
        facts = file.facts
        if facts["kind"] != kind:
            raise InputError(f"{named(path)} holds a {str(facts['kind'])[:20]}, not a {kind}.")
        _check_model(facts["model"], model, path)
        if check is not None:
            check(facts)
        cache = Cache(model, _method(facts["method"], method, path))
        maker = Maker(forms(), file.tensors(), _device(model))
        _fill(cache, facts["cache"], maker)
        if cache.get_seq_length() != facts["tokens"]:
            raise ValueError("its layers have not seen its tokens")
        return cache, facts, maker


def told(file: BlockFile) -> dict[str, Any]:
    """The facts in a file, for people. Raises DamagedFileError where they make no sense."""
    with sensible(file.path):
        facts, model = file.facts, file.facts["model"]
        found = {
            "kind": facts["kind"],
            "method": facts["method"]["spec"],
            "model": model["class"],
            "model_type": model["fingerprint"]["model_type"],
            "layers": model["fingerprint"]["layers"],
            "dtype": model["dtype"],
            "tokens": facts["tokens"],
            "nbytes": facts["nbytes"],
        }
        for name, value in found.items():
            if type(value) is not (int if name in ("layers", "tokens", "nbytes") else str):
                raise ValueError(f"{name} is a {type(value).__name__}")
        return found


def _fill(cache: Cache, held: dict[str, Any], maker: Maker) -> None:
    maker.value(held["turn"], cache.announced)
    maker.value(held["passes"], cache.passes)
    for facts, layer in zip(held["layers"], cache.layers, strict=True):
        if maker.value(facts, layer) is not layer:
            raise ValueError("a layer is of another kind")
    if len({(part.seen, part.sequences) for part in cache.managed}) != 1:
        raise ValueError("its layers have seen unequally many tokens")
    cache.check()


@contextmanager
def sensible(path: str | Path) -> Iterator[None]:
    """Turns errors of a file that kvote did not write into DamagedFileError."""
    try:
        yield
    except (InputError, MethodError):
        raise
    except ValueError as error:
        raise damaged(path, f"it was not written by kvote ({error})") from error
    except (
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RuntimeError,
        OverflowError,
        AssertionError,
        StopIteration,
    ) as error:
        raise damaged(path, f"it was not written by kvote ({type(error).__name__})") from error


def _method(facts: Any, given: Method | str | None, path: str | Path) -> Method:
    if given is None:
        return recipe.build(facts)
    method = parse(given) if isinstance(given, str) else given
    if recipe.spec_of(method) != facts["spec"]:
        raise InputError(f"{named(path)} was made with {facts['spec'][:200]!r}, not with {method.spec!r}.")
    return method


def _check_model(held: Any, model: Any, path: str | Path) -> None:
    """Raises InputError, by the first difference, for another model than that of the file."""
    mine = json.loads(json.dumps(identity.of_model(model)))
    if held == mine:
        return
    why = "its weights differ"
    if held["class"] != mine["class"]:
        why = f"a {str(held['class'])[:60]}, and this is a {mine['class']}"
    elif held["dtype"] != mine["dtype"]:
        why = f"it was in {str(held['dtype'])[:20]}, and this one is in {mine['dtype']}"
    elif held["fingerprint"] != mine["fingerprint"]:
        one, other = (
            Fingerprint(**{**f, "sample": tuple(f["sample"]), "rope": tuple(sorted(f["rope"].items()))})
            for f in (held["fingerprint"], mine["fingerprint"])
        )
        why = one.difference(other) or why
    raise InputError(f"{named(path)} was made with another model ({why}); read the text again with this one.")


def _device(model: Any) -> torch.device:
    devices = {weight.device for weight in model.parameters()} - {torch.device("meta")}
    if len(devices) != 1:
        raise InputError("A cache is loaded for a model that lies on one device, and this one is spread over several.")
    return devices.pop()
