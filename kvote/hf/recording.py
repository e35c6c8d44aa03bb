"""Recording of a model while it runs in a trial: calls of its modules, of attention, and updates of the cache."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass
class AttentionCall:
    """One call of the attention function: ``query`` [b, heads, t, d], ``key`` [b, h, n, d], ``value`` [b, h, n, dv]."""

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any]


@dataclass
class Update:
    """One call of a cache's ``update``: what was handed to it, and what it handed back."""

    layer: int
    given: tuple[Tensor, Tensor]
    returned: tuple[Tensor, Tensor]


@dataclass
class ModuleCall:
    """A call of a module, and what it returned."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@dataclass
class PassRecord:
    """Everything seen in one forward pass, in order."""

    attention: list[AttentionCall] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    # Whether the attention function stops the pass by raising ``Stop`` once it has been recorded.
    stops: bool = False

    def calls(self, module: torch.nn.Module) -> list[ModuleCall]:
        """The calls of ``module``."""
        return [call for call in self.modules if call.module is module]


class Stop(Exception):  # noqa: N818 - not an error
    """Ends a pass in which only what reaches attention is of interest."""


_record: ContextVar[PassRecord | None] = ContextVar("kvote_record", default=None)


@contextlib.contextmanager
def recording(model: torch.nn.Module | None = None, *, stops: bool = False) -> Iterator[PassRecord]:
    """Records attention calls in this thread; with ``model``, also the calls of its modules."""
    record = PassRecord(stops=stops)
    token = _record.set(record)
    handles, running = [], dict[torch.nn.Module, ModuleCall]()

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Hooks are the model's, a record is one thread's.
        if _record.get() is not record:
            return
        running[module] = ModuleCall(module, args, dict(kwargs))
        record.modules.append(running[module])

    def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _record.get() is record and module in running:
            running.pop(module).output = output

    try:
        for module in () if model is None else model.modules():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield record
    finally:
        _record.reset(token)
        for handle in handles:
            handle.remove()


def note_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Called by kvote's attention function at every call; costs a look-up where nothing is recorded."""
    record = _record.get()
    if record is not None:
        record.attention.append(AttentionCall(module, query, key, value, mask, dict(kwargs)))
        if record.stops:
            raise Stop


class RecordedCache(DynamicCache):
    """transformers' default cache, which notes what it is handed while a pass is recorded."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        returned = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        record = _record.get()
        if record is not None:
            record.updates.append(Update(layer_idx, (key_states, value_states), returned))
        return returned
