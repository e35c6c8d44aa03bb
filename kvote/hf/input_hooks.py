"""Token ids, hidden states and layer inputs of a pass, noted by hooks on the model while a cache exists whose method
needs them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor
from transformers import Cache as TransformersCache

from kvote.errors import InputError
from kvote.extra_inputs import HIDDEN, IDS, INPUTS, MARKS, ExtraInputs
from kvote.hf.compiling import uncompiled
from kvote.phase import AnnouncedPrompt


class InputHooks:
    """The hooks of one model. They are removed with the last cache that holds this object."""

    def __init__(self, model: torch.nn.Module) -> None:
        inner: Any = getattr(model, "get_decoder", None)
        decoder = model if inner is None else inner()
        outer = {id(module): module for module in (model, getattr(model, "base_model", model), decoder)}
        self.model = ref(model)
        self._handles = []
        for module in outer.values():
            self._handles.append(module.register_forward_pre_hook(_note_ids, with_kwargs=True))
            self._handles.append(module.register_forward_hook(_forget, with_kwargs=True, always_call=True))
        for module in _layers(model):
            self._handles.append(module.register_forward_pre_hook(_note_inputs, with_kwargs=True))
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                self._handles.append(module.register_forward_pre_hook(_note_hidden, with_kwargs=True))

    def __del__(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> "InputHooks":
        return self


# By the identity of the model, which a watch outlives only where nobody asks for it again.
_hooks: "WeakValueDictionary[int, InputHooks]" = WeakValueDictionary()


def input_hooks(model: torch.nn.Module) -> InputHooks:
    """The ``InputHooks`` of ``model``, one for all its caches; what it notes is set as ``AnnouncedPrompt.extra_inputs``
    of the cache in use."""
    found = _hooks.get(id(model))
    if found is None or found.model() is not model:
        found = _hooks[id(model)] = InputHooks(model)
    return found


def noted_inputs(
    announced: AnnouncedPrompt,
    needs: frozenset[str],
    spec: str,
    rows: int,
    columns: range,
    at: tuple[int, int] | None,
    device: torch.device,
) -> ExtraInputs:
    """The extra inputs of the new ``columns`` of ``rows`` sequences. ``at``: the columns of this cache, in a batch of
    several caches.

    Raises InputError where something that the method ``needs`` is missing.
    """
    noted = announced.extra_inputs or ExtraInputs()
    # Hidden states and inputs belong to one layer.
    announced.extra_inputs = ExtraInputs(noted.ids)
    found = {IDS: noted.ids, HIDDEN: noted.hidden, INPUTS: noted.inputs}
    if at is not None:
        found = {name: None if x is None else x[:, slice(*at)] for name, x in found.items()}
    for name in sorted(needs & found.keys()):
        x = found[name]
        if x is None or x.shape[:2] != (rows, len(columns)):
            how = "call the model with input_ids, not with inputs_embeds" if name == IDS else "use another method"
            raise InputError(f"{spec} needs the {name} of all tokens, which this pass does not show; {how}.")
    ids, hidden, inputs = (found[name] if name in needs else None for name in (IDS, HIDDEN, INPUTS))
    if MARKS not in needs:
        return ExtraInputs(ids, hidden, inputs=inputs)
    if not announced.marked:
        raise InputError(
            f"{spec} needs to know what spans of the text are, and none is marked; call cache.mark_span(name, start, "
            "stop) before they are read."
        )
    return ExtraInputs(ids, hidden, announced.marked.shown(rows, columns, device), inputs)


@uncompiled
def _note_ids(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = kwargs.get("input_ids", args[0] if args else None)
    ids = given if isinstance(given, Tensor) and not given.is_floating_point() and given.dim() == 2 else None
    all_announced = _all_announced(args, kwargs)
    for row, announced in enumerate(all_announced):
        if ids is not None:
            announced.extra_inputs = ExtraInputs(_of_row(ids, row, len(all_announced)))


@uncompiled
def _note_hidden(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for announced, states in _states(args, kwargs):
        announced.extra_inputs = replace(announced.extra_inputs or ExtraInputs(), hidden=states)


@uncompiled
def _note_inputs(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for announced, states in _states(args, kwargs):
        announced.extra_inputs = replace(announced.extra_inputs or ExtraInputs(), inputs=states)


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[AnnouncedPrompt, Tensor | None]]:
    """The hidden states that a module was given, cut by cache."""
    given = kwargs.get("hidden_states", args[0] if args else None)
    hidden = given.detach() if isinstance(given, Tensor) and given.dim() == 3 else None
    all_announced = _all_announced(args, kwargs)
    return [
        (announced, None if hidden is None else _of_row(hidden, row, len(all_announced)))
        for row, announced in enumerate(all_announced)
    ]


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The members of lists of modules that attention is in."""
    for modules in model.modules():
        if isinstance(modules, torch.nn.ModuleList):
            yield from (m for m in modules if any(isinstance(getattr(n, "layer_idx", None), int) for n in m.modules()))


@uncompiled
def _forget(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    for announced in _all_announced(args, kwargs):
        announced.extra_inputs = None


def _of_row(x: Tensor, row: int, of: int) -> Tensor:
    return x if of == 1 else x[row : row + 1]


def _all_announced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[AnnouncedPrompt]:
    """The prompts announced to the caches that a module was given: one cache, or several that have joined a batch."""
    for given in (*kwargs.values(), *args):
        if isinstance(given, TransformersCache):
            members = getattr(given, "caches", None) or (given,)
            return [
                announced
                for each in members
                if isinstance(announced := getattr(each, "announced", None), AnnouncedPrompt)
            ]
    return []
