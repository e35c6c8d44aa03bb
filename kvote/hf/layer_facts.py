"""Facts about a layer with full attention, from the records of two passes: its shapes, and how it rotates keys."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvote.hf.model import name_of
from kvote.hf.recording import AttentionCall, ModuleCall, PassRecord, RecordedCache, Stop, recording
from kvote.hf.rope import RotatedState, coarsest, identity, rope_of, rotary_calls, same, undoes
from kvote.hf.rotary import RotaryPositions, positions_given
from kvote.rope import Rope

# Rows of a trial's passes.
ROWS = 2
# The token of the first pass whose key is made again at the position of the second.
_AGAIN = 2


@dataclass(frozen=True)
class LayerFacts:
    """The facts that a trial found about a layer with full attention.

    ``rope`` is None where kvote cannot undo the model's rotation, for the reason in ``why_no_rope``; ``rotated`` is
    False where nothing rotates keys. ``rotary`` stands where attention is not told positions as the rotary module is.
    """

    index: int
    heads: int
    key_heads: int
    head_size: int
    value_size: int
    rope: Rope | None = None
    rotated: bool = True
    why_no_rope: str = ""
    rotary: RotaryPositions | None = None


def first_line(error: BaseException) -> str:
    """The message of an exception in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@dataclass
class LayerFinder:
    """Finds the rope of each layer from the records of two passes; layers that rotate alike share one."""

    model: PreTrainedModel
    first: PassRecord
    second: PassRecord
    _found: list[tuple[Any, Rope]] = field(default_factory=list)
    _identity: Rope = field(default_factory=identity)
    _watched: dict[torch.nn.Module, RotaryPositions] = field(default_factory=dict)

    def facts(self, call: AttentionCall, index: int) -> LayerFacts:
        """The facts about a layer, from its attention call in the first pass."""
        seen = LayerFacts(index, call.query.shape[1], call.key.shape[1], call.key.shape[3], call.value.shape[3])
        again = self._again(call)
        if isinstance(again, str):
            return replace(seen, why_no_rope=again)
        dtype = coarsest(self.model)
        before = call.key[:, :, _AGAIN : _AGAIN + 1], call.query[:, :, _AGAIN : _AGAIN + 1]
        after = again.key[:, :, -1:], again.query
        if same(before[0], after[0], dtype):
            if not same(before[1], after[1], dtype):
                return replace(seen, why_no_rope=self._why(index, "changes queries, but not keys, by their positions"))
            return replace(seen, rope=self._identity, rotated=False)
        for rotary in self._candidates(call):
            places = self._places(rotary)
            if places is None:
                continue
            keys, queries = (
                (RotatedState(a, places[0]), RotatedState(b, places[1])) for a, b in zip(before, after, strict=True)
            )
            rope = self._shared(rotary, keys) or rope_of(rotary, keys, dtype)
            if rope is not None and not undoes(rope, queries, dtype):
                return replace(seen, why_no_rope=self._why(index, "scales queries by their positions"))
            if rope is not None:
                self._found.append((self._kind(rotary), rope))
                return replace(seen, rope=rope, rotary=self._noted_positions(call, rotary, places))
        return replace(seen, why_no_rope=self._why(index, "rotates keys in a way that kvote cannot undo"))

    def _why(self, index: int, what: str) -> str:
        return (
            f"{name_of(self.model)} {what} (layer {index}), so its tokens cannot be placed anew; use a method that "
            "leaves keys as they are, such as 'dense'."
        )

    def _again(self, call: AttentionCall) -> AttentionCall | str:
        """The attention call that the hidden states of one token of the first pass bring about in the second, at its
        position; or why there is none, as a sentence."""
        module = call.module
        calls = self.first.calls(module), self.second.calls(module)
        name = f"{type(module).__name__} of {name_of(self.model)}"
        if len(calls[0]) != 1 or len(calls[1]) != 1:
            return f"{name} is called in a way in which its rotation cannot be seen; use a method such as 'dense'."
        (early,), (late,) = calls
        cache, tokens = RecordedCache(config=self.model.config), call.query.shape[2]

        def changed(old: Any, new: Any) -> Any:
            if isinstance(new, RecordedCache):
                return cache
            if _is_hidden(old, tokens) and _is_hidden(new, 1):
                return old[:, _AGAIN : _AGAIN + 1]
            return new

        args = [changed(a, b) for a, b in zip(early.args, late.args, strict=True)]
        kwargs = {key: changed(early.kwargs.get(key), value) for key, value in late.kwargs.items()}
        try:
            with recording(stops=True) as record:
                module(*args, **kwargs)
        except Stop:
            return record.attention[0]
        except Exception as error:
            return (
                f"{name} does not run by itself ({first_line(error)}), so its rotation cannot be seen; use a method "
                "such as 'dense'."
            )
        return f"{name} does not call attention when it runs by itself; use a method such as 'dense'."

    def _candidates(self, call: AttentionCall) -> list[ModuleCall]:
        """The rotary calls of the second pass that may have given this layer its angles, the likely ones first: those
        whose output its module was given."""
        given = [id(x) for own in self.second.calls(call.module) for x in _tensors(own)]
        calls = rotary_calls(self.second.modules)
        return sorted(calls, key=lambda rotary: not any(id(x) in given for x in _flat(rotary.output)))

    def _places(self, rotary: ModuleCall) -> tuple[Tensor, Tensor] | None:
        """The positions [b or 1, 1] of the token that was seen twice, as the rotary module was given them."""
        early = next((c for c in self.first.calls(rotary.module) if self._kind(c) == self._kind(rotary)), None)
        places = [positions_given(call) for call in (early, rotary) if call is not None]
        if len(places) < 2 or any(x is None for x in places):
            return None
        flat = [x.reshape(-1, x.shape[-1]) if x.dim() < 3 else x[0] for x in places if x is not None]
        if flat[0].shape[-1] <= _AGAIN or flat[1].shape[-1] != 1:
            return None
        return flat[0][:, _AGAIN : _AGAIN + 1].expand(ROWS, -1), flat[1].expand(ROWS, -1)

    def _kind(self, rotary: ModuleCall) -> Any:
        """The identity of a rotary call: the module, and its arguments that are no tensors."""
        rest: list[Any] = [(i, x) for i, x in enumerate(rotary.args) if not isinstance(x, Tensor)]
        rest += [(name, x) for name, x in sorted(rotary.kwargs.items()) if not isinstance(x, Tensor)]
        return rotary.module, rest

    def _shared(self, rotary: ModuleCall, keys: tuple[RotatedState, RotatedState]) -> Rope | None:
        """A rope found for another layer, if it is this one's too."""
        kind = self._kind(rotary)
        for known, rope in self._found:
            if known[0] is kind[0] and known[1] == kind[1] and undoes(rope, keys, coarsest(self.model)):
                return rope
        return None

    def _noted_positions(
        self, call: AttentionCall, rotary: ModuleCall, places: tuple[Tensor, Tensor]
    ) -> RotaryPositions | None:
        """An object that notes the rotary module's positions, where attention is not told them, or is told one of
        several dimensions; else None."""
        told, given = call.kwargs.get("position_ids"), positions_given(rotary)
        plain = given is not None and given.dim() < 3
        if plain and isinstance(told, Tensor) and told.dim() == 2 and told.shape[-1] > _AGAIN:
            early = told[:, _AGAIN : _AGAIN + 1].expand(ROWS, -1)
            if torch.equal(early.to(places[0].device), places[0]):
                return None
        return self._watched.setdefault(rotary.module, RotaryPositions.of(rotary.module))


def _is_hidden(x: Any, tokens: int) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3 and x.shape[:2] == (ROWS, tokens)


def _tensors(call: ModuleCall) -> list[Tensor]:
    return _flat([*call.args, *call.kwargs.values()])


def _flat(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        return _flat(list(x.values()))
    return [t for each in x for t in _flat(each)] if isinstance(x, list | tuple) else []
