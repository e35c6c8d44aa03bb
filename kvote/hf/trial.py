"""What a model does with attention, found out by running it once on a few tokens.

Nothing here goes by names of classes or flags: the model runs with its own attention and with kvote's, every attention
module is seen at work and called again at another position, and what comes out is compared.
"""

import contextlib
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvote.errors import UnsupportedModelError
from kvote.hf.cache_layer import CacheLayer, Turn
from kvote.hf.guard import throws_away
from kvote.hf.mask import padding_of
from kvote.hf.model import is_full_attention, name_of, native_layers
from kvote.hf.rope import Turned, coarsest, identity, rope_of, rotary_calls, same, undoes
from kvote.hf.rotary import RotaryPositions, positions_given
from kvote.hf.switch import attach, names_kept_on_failure
from kvote.hf.undisturbed import undisturbed
from kvote.hf.watch import AttentionCall, ModuleCall, Record, Stop, WatchedCache, recording
from kvote.layer import Layer
from kvote.method import Method
from kvote.rope import Rope

# Tokens of the first pass; the second has one more, as a decode step.
_TOKENS = 6
_ROWS = 2
# The token of the first pass whose key is made again at the position of the second.
_AGAIN = 2


@dataclass(frozen=True)
class LayerFacts:
    """What the trial saw of a layer with full attention.

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


@dataclass(frozen=True)
class Facts:
    """What the trial found out about a model: its full-attention layers by index, the length of text behind which it
    throws a cache away (None: it does not), and the seconds that finding out took."""

    layers: dict[int, LayerFacts]
    throws_away: int | None
    seconds: float


@dataclass(frozen=True)
class _Prompt:
    """Tokens of a first pass [b, t], their mask, and one more token a row [b, 1]."""

    ids: Tensor
    mask: Tensor
    next: Tensor
    # Whether the model takes positions, which generate() then counts from the mask.
    positions: bool

    def passes(self) -> list[dict[str, Tensor]]:
        """What the model is given in two passes, the second as a decode step."""
        longer = torch.cat([self.mask, torch.ones_like(self.next)], dim=1)
        inputs = [
            {"input_ids": self.ids, "attention_mask": self.mask},
            {"input_ids": self.next, "attention_mask": longer},
        ]
        if self.positions:
            places = (longer.cumsum(dim=1) - 1).clamp(min=0)
            inputs[0]["position_ids"], inputs[1]["position_ids"] = places[:, :-1], places[:, -1:]
        return inputs

    def padded(self) -> "_Prompt":
        """The same with the first row padded on the left; models may go another way without a mask."""
        mask = self.mask.clone()
        mask[0, :2] = 0
        return replace(self, mask=mask)


def find_out(model: PreTrainedModel) -> Facts:
    """Runs ``model`` and leaves it switched to kvote's attention.

    Raises UnsupportedModelError with the reason why kvote cannot manage its cache; then it is left as it was.
    """
    begin = time.perf_counter()
    native_layers(model)
    prompt = _prompt(model)
    # A model that is attached already stays so meanwhile: other caches may be at work.
    with undisturbed(model), names_kept_on_failure(model):
        with _refusing("{} does not run on a few tokens with transformers' default cache ({}).", model):
            runner = _adapted(model, _runner(model), prompt)
            native = _native(model, runner, prompt)
        try:
            padded = _logits(runner, prompt.padded(), WatchedCache(config=model.config))
        except Exception:
            padded = None  # The model takes no padding, with any cache.
        attach(model)
        with _refusing("{} does not run with kvote's attention ({}).", model):
            layers, finite = _watch(model, runner, prompt, native)
            # Weights that are no numbers say nothing about attention; who asks such a model is told so.
            if finite:
                _compare_dense(model, runner, prompt, native, layers)
            if finite and padded is not None:
                _compare_dense(model, runner, prompt.padded(), padded, layers)
        length = throws_away(runner)
    return Facts(layers, length, time.perf_counter() - begin)


@contextlib.contextmanager
def _refusing(sentence: str, model: PreTrainedModel) -> Iterator[None]:
    """Any exception as an UnsupportedModelError: ``sentence`` with the model's name and what the exception says."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(sentence.format(name_of(model), first_line(error))) from error


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _runner(model: Any) -> Any:
    """The model below a wrapper of torch.compile, which would compile for the trial."""
    return getattr(model, "_orig_mod", model)


def _adapted(model: PreTrainedModel, runner: Any, prompt: _Prompt) -> Any:
    """The model below a wrapper of adapters, where the wrapper leaves the cache alone: prompt tuning puts tokens of its
    own before every pass that generate() has not prepared. Raises UnsupportedModelError where it does not."""
    base = getattr(runner, "get_base_model", None)
    if base is None:
        return runner
    with recording() as record:
        _forward(runner, prompt.passes()[0], WatchedCache(config=model.config))
    if not record.updates:
        raise UnsupportedModelError(_OWN_CACHE.format(name_of(model)))
    return base()


_OWN_CACHE = (
    "{} does not store keys in the cache that it is given, but in one of its own; kvote manages the cache that a model "
    "is given."
)


def _prompt(model: PreTrainedModel) -> _Prompt:
    config = model.config.get_text_config(decoder=True)
    size = int(getattr(config, "vocab_size", None) or model.get_input_embeddings().num_embeddings)
    special = _special_ids(model.config) | _special_ids(config)
    plain = [token for token in range(min(size, 4096)) if token not in special]
    if len(plain) < 4:
        raise UnsupportedModelError(f"{name_of(model)} has no plain tokens in its vocabulary to try it with.")
    # Far from each other, and none twice in a row.
    row = [plain[(7 * i + 3) % len(plain)] for i in range(_TOKENS + 2)]
    # A text, and the same with another last token.
    ids = torch.tensor([row[:_TOKENS]] * _ROWS)
    ids[1, -1] = row[_TOKENS + 1]
    ids, after = (x.to(_device(model)) for x in (ids, torch.tensor([[row[_TOKENS]]] * _ROWS)))
    positions = "position_ids" in inspect.signature(_runner(model).forward).parameters
    return _Prompt(ids, torch.ones_like(ids), after, positions)


def _special_ids(config: Any) -> set[int]:
    """Tokens that stand for something else than text, such as images."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index", "_token_ids", "_index")):
            found |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    return found


def _device(model: PreTrainedModel) -> torch.device:
    """Where inputs go. Raises UnsupportedModelError for weights that hold no numbers."""
    tensors = [*model.parameters(), *model.buffers()]
    if not any(tensor.is_meta for tensor in tensors):
        return tensors[0].device if tensors else torch.device("cpu")
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    devices = [d for hook in hooks for d in _execution_devices(hook)]
    if not devices:
        raise UnsupportedModelError(
            f"The weights of {name_of(model)} are on the meta device, where they hold no numbers; load them first."
        )
    return torch.device(devices[0])


def _execution_devices(hook: Any) -> list[Any]:
    """Devices on which offloaded modules run, as accelerate's hooks know."""
    hooks = getattr(hook, "hooks", [hook])
    return [device for h in hooks if (device := getattr(h, "execution_device", None)) is not None]


def _native(model: PreTrainedModel, runner: Any, prompt: _Prompt) -> list[Tensor]:
    """The logits of both passes with the model's own attention and cache."""
    cache = WatchedCache(config=model.config)
    with recording() as record:
        logits = _logits(runner, prompt, cache)
    if not record.updates:
        raise UnsupportedModelError(_OWN_CACHE.format(name_of(model)))
    first, whole = logits[0], torch.ones_like(prompt.mask[:1, :-1])
    if not _agree(model, first[:1, :-1], first[1:2, :-1], whole):
        raise UnsupportedModelError(
            f"{name_of(model)} is not causal: what comes later in a text changes what comes before; kvote stores a "
            "token once, as it was when it came."
        )
    return logits


def _logits(runner: Any, prompt: _Prompt, cache: Any) -> list[Tensor]:
    return [_forward(runner, inputs, cache) for inputs in prompt.passes()]


def _forward(runner: Any, inputs: dict[str, Tensor], cache: Any) -> Tensor:
    columns = inputs["input_ids"].shape[1]
    logits = getattr(runner(**inputs, past_key_values=cache, use_cache=True), "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] < columns:
        raise UnsupportedModelError(
            f"{name_of(runner)} gives no logits of a next token for each token; give kvote a model for causal language "
            "modelling, such as AutoModelForCausalLM makes."
        )
    # Prompt tuning puts tokens of its own before the others.
    return logits[:, -columns:]


def _watch(
    model: PreTrainedModel, runner: Any, prompt: _Prompt, native: list[Tensor]
) -> tuple[dict[int, LayerFacts], bool]:
    """Runs the switched model with a native cache, compares its logits, and says what each layer does, and whether all
    keys were finite."""
    cache = WatchedCache(config=model.config)
    records = []
    for inputs, expected in zip(prompt.passes(), native, strict=True):
        with recording(runner) as record:
            logits = _forward(runner, inputs, cache)
        records.append(record)
        if not _agree(model, logits, expected, inputs["attention_mask"]):
            raise UnsupportedModelError(
                f"{name_of(model)} gives other logits with its own cache once kvote's attention is registered; it goes "
                "by the name of its attention implementation."
            )
    if not any(record.attention for record in records):
        raise UnsupportedModelError(
            f"{name_of(model)} does not route attention through transformers' AttentionInterface."
        )
    full = [index for index, layer in enumerate(cache.layers) if is_full_attention(layer)]
    first, second = records
    finder = _RopeFinder(model, first, second)
    layers = {
        index: finder.facts(_only_call(model, index, first), index)
        for index in full
        if any(update.layer == index for update in first.updates)
    }
    return layers, all(bool(call.key.isfinite().all()) for record in records for call in record.attention)


# How far logits may lie apart, relative to their size, where one sum is rounded in another order in every layer.
_APART = {torch.float64: 1e-4, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def _agree(model: PreTrainedModel, logits: Tensor, expected: Tensor, mask: Tensor) -> bool:
    """Whether two runs agree where tokens are no padding, but for the rounding of the model's weights."""
    valid = mask[:, -logits.shape[1] :].bool()
    a, b = logits.float()[valid], expected.float()[valid]
    # Models that forbid tokens give them no finite logits.
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = a[finite], b[finite]
    return bool((a - b).norm() <= _APART[coarsest(model)] * b.norm())


def _only_call(model: PreTrainedModel, index: int, record: Record) -> AttentionCall:
    """The one attention call that goes with the one update of a layer. Raises UnsupportedModelError if there are
    others, or if attention gets something else than the cache gave."""
    updates = [update for update in record.updates if update.layer == index]
    if len(updates) > 1:
        raise UnsupportedModelError(f"{name_of(model)} updates its cache {len(updates)} times in layer {index}.")
    key, value = updates[0].returned
    calls = [call for call in record.attention if call.key is key]
    if not calls:
        given = [c for c in record.attention if c.key.shape[1:3] != key.shape[1:3] and c.key.shape[2] == key.shape[2]]
        what = "caches latents and makes keys of them in every step" if given else "changes keys after they were cached"
        raise UnsupportedModelError(
            f"{name_of(model)} {what} (layer {index}); kvote's attention needs the keys that the cache holds."
        )
    if len(calls) > 1:
        raise UnsupportedModelError(
            f"{name_of(model)} attends {len(calls)} times to the keys of layer {index}, as where later layers share "
            "them; kvote stores keys when they are attended to, and that once."
        )
    call = calls[0]
    if call.value is not value:
        raise UnsupportedModelError(
            f"{name_of(model)} changes values after they were cached (layer {index}); kvote stores what is cached."
        )
    if call.mask is not None and padding_of(call.mask) is None:
        raise UnsupportedModelError(
            f"{name_of(model)} gives the attention of layer {index} a mask of its own; kvote has but the causal one."
        )
    return call


@dataclass
class _RopeFinder:
    """Finds the rope of each layer from the records of two passes; layers that rotate alike share one."""

    model: PreTrainedModel
    first: Record
    second: Record
    _found: list[tuple[Any, Rope]] = field(default_factory=list)
    _identity: Rope = field(default_factory=identity)
    _watched: dict[torch.nn.Module, RotaryPositions] = field(default_factory=dict)

    def facts(self, call: AttentionCall, index: int) -> LayerFacts:
        """What a layer does, from its attention call in the first pass."""
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
            keys, queries = ((Turned(a, places[0]), Turned(b, places[1])) for a, b in zip(before, after, strict=True))
            rope = self._shared(rotary, keys) or rope_of(rotary, keys, dtype)
            if rope is not None and not undoes(rope, queries, dtype):
                return replace(seen, why_no_rope=self._why(index, "scales queries by their positions"))
            if rope is not None:
                self._found.append((self._kind(rotary), rope))
                return replace(seen, rope=rope, rotary=self._watch(call, rotary, places))
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
        cache, tokens = WatchedCache(config=self.model.config), call.query.shape[2]

        def changed(old: Any, new: Any) -> Any:
            if isinstance(new, WatchedCache):
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
        return flat[0][:, _AGAIN : _AGAIN + 1].expand(_ROWS, -1), flat[1].expand(_ROWS, -1)

    def _kind(self, rotary: ModuleCall) -> Any:
        """What tells the angles of one rotary call from another's: the module and what it is given beside tensors."""
        rest: list[Any] = [(i, x) for i, x in enumerate(rotary.args) if not isinstance(x, Tensor)]
        rest += [(name, x) for name, x in sorted(rotary.kwargs.items()) if not isinstance(x, Tensor)]
        return rotary.module, rest

    def _shared(self, rotary: ModuleCall, keys: tuple[Turned, Turned]) -> Rope | None:
        """A rope found for another layer, if it is this one's too."""
        kind = self._kind(rotary)
        for known, rope in self._found:
            if known[0] is kind[0] and known[1] == kind[1] and undoes(rope, keys, coarsest(self.model)):
                return rope
        return None

    def _watch(self, call: AttentionCall, rotary: ModuleCall, places: tuple[Tensor, Tensor]) -> RotaryPositions | None:
        """Where attention has not been told the positions that the rotary module got, or these have dimensions of
        which it is told one, something that tells them."""
        told, given = call.kwargs.get("position_ids"), positions_given(rotary)
        plain = given is not None and given.dim() < 3
        if plain and isinstance(told, Tensor) and told.dim() == 2 and told.shape[-1] > _AGAIN:
            early = told[:, _AGAIN : _AGAIN + 1].expand(_ROWS, -1)
            if torch.equal(early.to(places[0].device), places[0]):
                return None
        return self._watched.setdefault(rotary.module, RotaryPositions.of(rotary.module))


def _is_hidden(x: Any, tokens: int) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3 and x.shape[:2] == (_ROWS, tokens)


def _tensors(call: ModuleCall) -> list[Tensor]:
    return _flat([*call.args, *call.kwargs.values()])


def _flat(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        return _flat(list(x.values()))
    return [t for each in x for t in _flat(each)] if isinstance(x, list | tuple) else []


def _compare_dense(
    model: PreTrainedModel, runner: Any, prompt: _Prompt, native: list[Tensor], layers: dict[int, LayerFacts]
) -> None:
    """Runs both passes with kvote's dense attention in place of the model's. Raises UnsupportedModelError where the
    logits are others."""
    cache = WatchedCache(config=model.config)
    turn, previous = Turn(), None
    for index in layers:
        cache.layers[index] = previous = CacheLayer(Layer(index, Method(), None), turn, previous)
    for inputs, expected in zip(prompt.passes(), native, strict=True):
        logits = _forward(runner, inputs, cache)
        if not _agree(model, logits, expected, inputs["attention_mask"]):
            worst = float((logits - expected)[inputs["attention_mask"][:, -logits.shape[1] :].bool()].abs().max())
            raise UnsupportedModelError(
                f"{name_of(model)} gave other logits with kvote's dense attention than with its own (by up to "
                f"{worst:.2g}, on {_TOKENS} tokens); it asks something of attention that kvote does not know."
            )
