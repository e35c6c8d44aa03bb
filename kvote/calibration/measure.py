"""Runs texts through a model and measures what a method wants to know."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvote.cache import Cache
from kvote.calibration import channels, patterns, rotated
from kvote.calibration.file import Calibration
from kvote.calibration.fingerprint import Fingerprint
from kvote.errors import InputError, UnsupportedModelError
from kvote.method import Method

# Blocks of the published calibration: 256 of 512 tokens.
BLOCK, BLOCKS = 512, 256
# Fewer tokens say next to nothing: of the first quarter of the channels in an order of the embedded model, 64 tokens of
# its language find 74%, one token 56%, chance a quarter.
LEAST = 64


def measure_channels(
    model: Any, blocks: Sequence[Tensor], progress: Callable[[int], None] = lambda tokens: None
) -> Calibration:
    """The order of key channels by mean |q_i * k_i| of each token's own query and key, per layer and key head.

    ``blocks``: token ids [rows, columns], each a text of its own, without padding; ``progress`` is told the tokens
    of each when it is done. Raises InputError for fewer than ``LEAST`` tokens in all, UnsupportedModelError where
    layers differ in shape.
    """
    return _measured(model, blocks, channels.KIND, channels.ChannelProducts(), progress)


def measure_rotated(
    model: Any,
    blocks: Sequence[Tensor],
    progress: Callable[[int], None] = lambda tokens: None,
    heads: int = rotated.HEADS,
) -> Calibration:
    """The order of key channels, ``heads`` key heads rotated together, by the sum of keys without positions. Parameters
    and errors as of ``measure_channels``."""
    return _measured(model, blocks, rotated.KIND, rotated.RotatedSums(heads), progress)


def _measured(
    model: Any,
    blocks: Sequence[Tensor],
    kind: str,
    reader: channels.ChannelProducts | rotated.RotatedSums,
    progress: Callable[[int], None],
) -> Calibration:
    tokens = sum(block.numel() for block in blocks)
    check_enough(tokens)
    method = Method(spec="calibrate", read=reader)
    with torch.inference_mode():
        for block in blocks:
            model(input_ids=block.to(model.device), past_key_values=Cache(model, method), logits_to_keep=1)
            progress(block.numel())
    calibration = Calibration(kind, Fingerprint.of(model), reader.data(tokens))
    shape = (calibration.model.kv_heads, calibration.model.head_dim)
    for layer, sums in reader.sums.items():
        if tuple(sums.shape) != shape:
            raise UnsupportedModelError(
                f"Layer {layer} has {sums.shape[0]} key heads of {sums.shape[1]} channels, and the config says "
                f"{shape[0]} of {shape[1]}; models whose layers differ cannot be calibrated."
            )
        if not bool(sums.isfinite().all()):
            raise InputError(f"Layer {layer} gave numbers that are not finite; load the model in a wider precision.")
    return calibration


def measure_patterns(model: Any, ids: Tensor) -> Calibration:
    """The pattern of every query head in prompts, by one text, token ids [1, n].

    Raises InputError for a text of which no pattern would leave anything out.
    """
    tokens = ids.shape[1]
    tried = tuple(patterns.candidates(tokens))
    if any(pattern.covers(tokens, patterns.BLOCK) for pattern in tried):
        raise InputError(f"Patterns leave nothing out of {tokens:,} tokens; give a text of at least {patterns.LEAST}.")
    search = patterns.PatternSearch(tried)
    with torch.inference_mode():
        cache = Cache(model, Method("calibrate", read=search))
        model(input_ids=ids.to(model.device), past_key_values=cache, logits_to_keep=1)
    return Calibration(patterns.KIND, Fingerprint.of(model), search.data(tokens))


def check_enough(tokens: int) -> None:
    """Raises InputError for fewer tokens of text than say anything about a model."""
    if tokens < LEAST:
        raise InputError(
            f"A calibration needs at least {LEAST} tokens of text; there {'is' if tokens == 1 else 'are'} {tokens}."
        )


def blocks_of(ids: Tensor, size: int = BLOCK) -> list[Tensor]:
    """Token ids [n] cut into texts [1, size], the last one as long as it is."""
    return [ids[None, at : at + size] for at in range(0, len(ids), size)]
