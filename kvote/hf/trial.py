"""The trial of a model: what it does with attention, found out by running it once on a few tokens.

Nothing here goes by names of classes or flags: the model runs with its own attention and with kvote's, every attention
module is seen at work and called again at another position, and what comes out is compared.
"""

import contextlib
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvote.errors import UnsupportedModelError
from kvote.hf.cache_layer import CacheLayer
from kvote.hf.guard import throws_away
from kvote.hf.layer_facts import ROWS, LayerFacts, LayerFinder, first_line
from kvote.hf.mask import padding_of
from kvote.hf.model import innermost, is_full_attention, name_of, native_layers, uncompiled_model
from kvote.hf.recording import AttentionCall, PassRecord, RecordedCache, recording
from kvote.hf.rope import coarsest
from kvote.hf.switch import attach, names_kept_on_failure
from kvote.hf.undisturbed import undisturbed
from kvote.layer import Layer
from kvote.method import Method
from kvote.phase import AnnouncedPrompt

# Tokens of the first pass; the second has one more, as a decode step.
_TOKENS = 6


@dataclass(frozen=True)
class Facts:
    """The outcome of a trial: the full-attention layers by index, the length of text behind which the model throws a
    cache away (None: it does not), and the seconds that the trial took."""

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
        """The inputs of two passes, the second a decode step."""
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
            runner = _adapted(model, uncompiled_model(model), prompt)
            native = _native(model, runner, prompt)
        try:
            padded = _logits(runner, prompt.padded(), RecordedCache(config=model.config))
        except Exception:
            padded = None  # The model takes no padding, with any cache.
        attach(model)
        with _refusing("{} does not run with kvote's attention ({}).", model):
            layers, finite = _compare_native(model, runner, prompt, native)
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


def _adapted(model: PreTrainedModel, runner: Any, prompt: _Prompt) -> Any:
    """The model below a wrapper of adapters, where the wrapper leaves the cache alone: prompt tuning puts tokens of its
    own before every pass that generate() has not prepared. Raises UnsupportedModelError where it does not."""
    base = innermost(runner)
    if base is runner:
        return runner
    with recording() as record:
        _forward(runner, prompt.passes()[0], RecordedCache(config=model.config))
    if not record.updates:
        raise UnsupportedModelError(_OWN_CACHE.format(name_of(model)))
    return base


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
    ids = torch.tensor([row[:_TOKENS]] * ROWS)
    ids[1, -1] = row[_TOKENS + 1]
    ids, after = (x.to(_device(model)) for x in (ids, torch.tensor([[row[_TOKENS]]] * ROWS)))
    positions = "position_ids" in inspect.signature(uncompiled_model(model).forward).parameters
    return _Prompt(ids, torch.ones_like(ids), after, positions)


def _special_ids(config: Any) -> set[int]:
    """Tokens that stand for something else than text, such as images."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index", "_token_ids", "_index")):
            found |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    return found


def _device(model: PreTrainedModel) -> torch.device:
    """The device of the inputs. Raises UnsupportedModelError for weights that hold no numbers."""
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
    cache = RecordedCache(config=model.config)
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


def _compare_native(
    model: PreTrainedModel, runner: Any, prompt: _Prompt, native: list[Tensor]
) -> tuple[dict[int, LayerFacts], bool]:
    """Runs the switched model with a native cache, compares its logits, and says what each layer does, and whether all
    keys were finite."""
    cache = RecordedCache(config=model.config)
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
    finder = LayerFinder(model, first, second)
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


def _only_call(model: PreTrainedModel, index: int, record: PassRecord) -> AttentionCall:
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


def _compare_dense(
    model: PreTrainedModel, runner: Any, prompt: _Prompt, native: list[Tensor], layers: dict[int, LayerFacts]
) -> None:
    """Runs both passes with kvote's dense attention in place of the model's. Raises UnsupportedModelError where the
    logits are others."""
    cache = RecordedCache(config=model.config)
    announced, previous = AnnouncedPrompt(), None
    for index in layers:
        cache.layers[index] = previous = CacheLayer(Layer(index, Method(), None), announced, previous)
    for inputs, expected in zip(prompt.passes(), native, strict=True):
        logits = _forward(runner, inputs, cache)
        if not _agree(model, logits, expected, inputs["attention_mask"]):
            worst = float((logits - expected)[inputs["attention_mask"][:, -logits.shape[1] :].bool()].abs().max())
            raise UnsupportedModelError(
                f"{name_of(model)} gave other logits with kvote's dense attention than with its own (by up to "
                f"{worst:.2g}, on {_TOKENS} tokens); it asks something of attention that kvote does not know."
            )
