"""Generation from a cache that is checked at every step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from kvote.errors import UnsupportedModelError
from kvote.hf.guard import switches_at


def generate(
    model: PreTrainedModel,
    ids: Tensor,
    cache: Any,
    settings: dict[str, Any],
    told: Callable[[], None],
    **more: Any,
) -> list[int]:
    """The tokens that follow ``ids`` [1, n], of which ``cache`` holds the first, with all ``settings`` of generate()
    and ``more`` arguments of it; ``told`` is called before each token is chosen.

    Raises LogitsError if the model gives logits that are no numbers, and UnsupportedModelError if it did not answer
    from ``cache``.
    """
    own = [_StepChecks(model, cache, told), *(settings.get("logits_processor") or ())]
    output: Any = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **(settings | more | {"past_key_values": cache, "logits_processor": own}),
    )
    new: list[int] = output.sequences[0, ids.shape[1] :].tolist()
    if output.past_key_values is not cache or cache.get_seq_length() < ids.shape[1] + len(new) - 1:
        raise _threw_away(model)
    return new


def passes(ids: Tensor, model: PreTrainedModel, size: int) -> tuple[Tensor, ...]:
    """``ids`` [1, n] in passes of ``size`` tokens. Where a longer text is rotated in another way (LongRoPE), the first
    pass is long enough for that, so that all of the text is rotated alike."""
    limit = switches_at(model)
    if limit is None or not size <= limit < ids.shape[1]:
        return torch.split(ids, size, dim=1)
    first, rest = ids[:, : limit + 1], ids[:, limit + 1 :]
    return (first, *torch.split(rest, size, dim=1)) if rest.shape[1] else (first,)


class _StepChecks(LogitsProcessor):
    """Looks at the logits of every step, and whether the cache holds what they were computed from."""

    def __init__(self, model: PreTrainedModel, cache: Any, told: Callable[[], None]) -> None:
        self.model, self.cache, self.told = model, cache, told

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.cache.get_seq_length() != input_ids.shape[1]:
            raise _threw_away(self.model)
        check_finite(scores, input_ids)
        self.told()
        return scores


class LogitsError(Exception):
    """Logits behind ``ids`` [1, n] are no numbers."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids = ids


def check_finite(logits: Tensor, ids: Tensor) -> None:
    """Raises LogitsError if logits [..., n] behind ``ids`` [1, n] hold NaN or infinity, or rule every token out.

    Single tokens may be ruled out by minus infinity.
    """
    if not finite(logits):
        raise LogitsError(ids)


def finite(logits: Tensor) -> bool:
    """Whether the largest of logits [..., n] is a number."""
    return bool(logits.amax(dim=-1).isfinite().all())


def _threw_away(model: PreTrainedModel) -> UnsupportedModelError:
    limit = switches_at(model)
    where, advice = "", "run the model with a cache of its own, or use another model."
    if limit:
        where = f" when the text passed its original_max_position_embeddings of {limit:,} tokens"
        advice = "keep document, question and answer below such a limit, or use another model."
    return UnsupportedModelError(
        f"{type(model).__name__} did not answer from the cache it was given but threw it away{where}, so there is no "
        f"answer of this method; {advice}"
    )


@contextmanager
def where_not_finite(model: PreTrainedModel) -> Iterator[list[str]]:
    """Runs of ``model`` inside note the first of its layers whose output is not finite."""
    found: list[str] = []
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    modules = model.get_decoder().modules()
    stacks = [module for module in modules if isinstance(module, torch.nn.ModuleList) and len(module) == count]

    def look(index: int, before: bool, given: Any) -> None:
        given = given[0] if isinstance(given, tuple) and given else given
        if not found and isinstance(given, Tensor) and given.is_floating_point() and not bool(given.isfinite().all()):
            found.append("what goes into layer 0 (the embeddings)" if before else f"layer {index}")

    handles = []
    for index, layer in enumerate(stacks[0] if stacks else []):
        if index == 0:
            handles.append(layer.register_forward_pre_hook(lambda _, args: look(0, True, args)))
        handles.append(layer.register_forward_hook(lambda _, args, out, i=index: look(i, False, out)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
