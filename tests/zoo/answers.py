"""What a model answers in a situation, and whether two answers are the same."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

TOKENS, NEW = 40, 8

# Largest difference of two logits, as a part of the largest logit, that counts as rounding of float32: some ten times
# what is seen of all classes (7e-6).
ROUNDING = 1e-4

# Situation -> what generate() is asked besides a prompt. Prompts are made by `prompt`.
SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "left-padded": {},
    "right-padded": {},
    "beams": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked": {"prefill_chunk_size": 13},
}
# Only of models whose positions have three axes: a text with the positions of an image in it, and decode steps.
IMAGE = "an image's positions"


@dataclass(frozen=True)
class Answer:
    """Tokens [rows, n] and the logits that they were chosen by, [rows, n, vocabulary] (scores [rows] of beams)."""

    tokens: Tensor
    logits: Tensor


def prompt(situation: str) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, int64 [rows, TOKENS]."""
    rows = 2 if "padded" in situation else 1
    ids = torch.randint(5, 90, (rows, TOKENS), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if situation == "prompt lookup":
        # Drafts come from what the text repeats.
        ids[:, TOKENS // 2 :] = ids[:, : TOKENS // 2]
    if situation == "left-padded":
        mask[1, :7] = 0
    if situation == "right-padded":
        mask[1, -7:] = 0
    return ids * mask, mask


def situations(model: PreTrainedModel) -> list[str]:
    """The situations that ``model`` is tried in."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return [*SITUATIONS, *([IMAGE] if "mrope_section" in str(rope) else [])]


def answer(model: PreTrainedModel, situation: str, cache: Any = None) -> Answer:
    """What greedy decoding says; ``cache`` is what generate() is given, None for its own choice."""
    if situation == IMAGE:
        return _with_an_image(model, explicit(model) if cache is None else cache)
    ids, mask = prompt(situation)
    asked = SITUATIONS[situation]
    settings: dict[str, Any] = {
        "use_cache": True,
        "do_sample": False,
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": "num_beams" in asked,
    }
    if cache is not None:
        settings["past_key_values"] = cache
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, **settings, **asked)
    logits = out.sequences_scores if "num_beams" in asked else torch.stack(list(out.logits), dim=1)
    return Answer(out.sequences[:, -NEW:], logits.float())


def _with_an_image(model: PreTrainedModel, cache: Any) -> Answer:
    """Ten tokens of text, an image of 3 by 4, text again; positions are [axes, 1, tokens]."""
    ids, _ = prompt("plain")
    image = torch.tensor([[10] * 12, [10 + i // 4 for i in range(12)], [10 + i % 4 for i in range(12)]])
    before, after = torch.arange(10).expand(3, -1), torch.arange(14, 14 + TOKENS + NEW).expand(3, -1)
    positions = torch.cat([before, image, after], dim=1)[:, None]
    tokens, logits = [], []
    piece, start = ids, 0
    for _ in range(NEW):
        places = positions[:, :, start : start + piece.shape[1]]
        with torch.no_grad():
            out = model(input_ids=piece, position_ids=places, past_key_values=cache, use_cache=True)
        start += piece.shape[1]
        piece = out.logits[:, -1:].argmax(-1)
        tokens.append(piece)
        logits.append(out.logits[:, -1].float())
    return Answer(torch.cat(tokens, dim=1), torch.stack(logits, dim=1))


def difference(native: Answer, other: Answer) -> str | None:
    """What differs beyond rounding, in words; None if nothing does, "a tie: ..." if a near-tie fell the other way."""
    if native.logits.shape != other.logits.shape:
        return f"logits of shape {tuple(other.logits.shape)} instead of {tuple(native.logits.shape)}"
    if not torch.isfinite(native.logits).all():
        return "the native logits are not finite"
    if not torch.isfinite(other.logits).all():
        return "logits are not finite"
    if native.tokens.shape != other.tokens.shape:
        return f"{tuple(other.tokens.shape)} tokens instead of {tuple(native.tokens.shape)}"
    unit = largest(native.logits)
    same = bool((native.tokens == other.tokens).all())
    if native.logits.dim() == 1:
        off = float((native.logits - other.logits).abs().max()) / unit
        return None if same and off <= ROUNDING else f"other beams, scores off by {off:.1e}"
    upto = torch.ones(native.logits.shape[:2], dtype=torch.bool)
    if native.tokens.shape == upto.shape:
        # Behind the first token that differs, the two texts are not the same.
        agree = (native.tokens == other.tokens).long().cumprod(1)
        upto = torch.cat([torch.ones_like(agree[:, :1]), agree[:, :-1]], dim=1).bool()
    off = float((native.logits - other.logits).abs().amax(-1)[upto].max()) / unit
    if off > ROUNDING:
        return f"logits off by {off:.1e} of the largest"
    if same:
        return None
    return f"a tie: logits off by {off:.1e} only, but another token was a trifle larger"


def largest(logits: Tensor) -> float:
    """The size of the largest logit, other than those that rule a token out."""
    return float(logits[logits.abs() < 1e30].abs().max()) or 1.0


def varied(native: Answer) -> int:
    """How many different tokens an answer has."""
    return int(native.tokens[0].unique().numel())


def explicit(model: PreTrainedModel) -> DynamicCache:
    """The default cache, made by hand."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def tried(run: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What ``run`` returns, or the exception that it ends in."""
    try:
        return run(), None
    except Exception as error:
        return None, error
