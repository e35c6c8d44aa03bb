"""Which key heads need to see far: a gate per head, trained with the model as it is (DuoAttention, arXiv 2410.10819).

The model reads every text twice. The first time as always: what each head answers, and the hidden states in the end,
are what is to be reached. The second time a head answers (1 - gate) * what it would with nothing but sinks and a
window, + gate * what it answered the first time. Gates shrink as far as the hidden states stay the same.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache as TransformersCache

from kvote.calibration.file import Calibration
from kvote.calibration.fingerprint import Fingerprint
from kvote.calibration.heads import DUO, as_data
from kvote.errors import InputError, UnsupportedModelError
from kvote.hf.cache_layer import CacheLayer
from kvote.hf.facts import facts_of
from kvote.hf.model import native_layers
from kvote.hf.switch import attach, is_attached, switch_back
from kvote.layer import Step
from kvote.method import Method
from kvote.phase import AnnouncedPrompt

# As published: steps, learning rate, and the weight of the gates beside the distance of the hidden states.
STEPS, RATE, PENALTY = 2000, 0.02, 0.05
SINKS, WINDOW = 128, 256
# Rows of a mask that are made at a time: their distances take four times as many bytes as they do.
_MASK_ROWS = 256


@dataclass(frozen=True)
class Example:
    """A text, ``ids`` [1, n], and which of its tokens count in the loss: ``labels`` [n], bool."""

    ids: Tensor
    labels: Tensor


@dataclass
class Gate:
    """Stands in for a ``Layer`` while gates are trained: nothing is held, and heads answer as their gate says.

    ``gate`` [h]: how far each key head is open. ``mask`` [t, t]: what streaming heads see. ``taught``
    [b, t, heads, dv]: what the layer answered when it saw everything; None until it has.
    """

    gate: Tensor
    mask: Tensor | None = None
    taught: Tensor | None = None
    method: Method = field(default_factory=Method)
    seen: int = 0
    record_past: bool = False

    def attend(self, step: Step) -> Tensor:
        """[b, t, heads, dv]; differentiable."""
        if self.taught is None:
            self.taught = _attend(step, None)
            return self.taught
        each = step.query.shape[1] // step.key.shape[1]
        gate = self.gate.to(step.query.dtype).repeat_interleave(each)[:, None]
        taught, self.taught = self.taught, None
        return (1 - gate) * _attend(step, self.mask) + gate * taught


def train_duo(
    model: Any,
    examples: Iterable[Example],
    steps: int = STEPS,
    sinks: int = SINKS,
    window: int = WINDOW,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Calibration:
    """Trains the gates on ``examples``, one each step; the model's weights stay as they are.

    ``sinks`` and ``window``: what streaming heads see in training. ``progress`` is told the steps done and the loss.
    Raises InputError where examples run out or none is longer than what streaming heads see, UnsupportedModelError for
    a model with learned sink logits or a soft cap.
    """
    attached = is_attached(model)
    facts = facts_of(model).layers
    if not attached:
        switch_back(model)
    ours = list(facts)
    gates = torch.ones(len(ours), facts[ours[0]].key_heads, device=model.device, requires_grad=True)
    optimizer = torch.optim.AdamW([gates], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    texts, longest, tokens = iter(examples), 0, 0
    mask = None
    with _frozen(model):
        for step in range(steps):
            example = next(texts, None)
            if example is None:
                raise InputError(f"{steps} steps need as many texts; there are {step}.")
            count = example.ids.shape[1]
            longest, tokens = max(longest, count), tokens + count
            # Texts tend to be equally long, and masks of long ones are large.
            if mask is None or len(mask) != count:
                mask = None
                mask = streaming_mask(count, sinks, window, model.device)
            with torch.no_grad():
                gates.clamp_(0, 1)
            loss = distance(model, gates, ours, example, mask) + PENALTY * gates.abs().mean()
            [gates.grad] = torch.autograd.grad(loss, gates)
            optimizer.step()
            schedule.step()
            progress(step + 1, float(loss.detach()))
    if longest <= sinks + window:
        raise InputError(
            f"No text is longer than the {sinks + window} tokens that streaming heads see; train with longer ones."
        )
    found = {layer: {"gate": row.tolist()} for layer, row in zip(ours, gates.detach().clamp(0, 1).cpu(), strict=True)}
    held = {"tokens": tokens, "steps": steps, "sinks": sinks, "window": window, "layers": as_data(found)}
    return Calibration(DUO, Fingerprint.of(model), held)


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: it rises over the first fifth of the steps and falls over the last, never below a
    tenth."""
    fifth = max(1, steps // 5)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def distance(model: Any, gates: Tensor, layers: list[int], example: Example, mask: Tensor) -> Tensor:
    """Mean squared difference, over the labelled tokens, of the final hidden states with the gates [layers, h] as they
    are to those with all of them open, where streaming heads see ``mask`` [t, t]. Differentiable in the gates."""
    ids = example.ids.to(model.device)
    own = [Gate(gate, mask) for gate in gates]
    with torch.no_grad():
        full = _hidden(model, ids, own, layers)
    mixed = _hidden(model, ids, own, layers)
    return (full - mixed)[0, example.labels.to(model.device)].float().square().mean()


def streaming_mask(tokens: int, sinks: int, window: int, device: torch.device) -> Tensor:
    """Bool [tokens, tokens]: a query sees the first ``sinks`` tokens and the last ``window``, itself among them."""
    mask = torch.empty(tokens, tokens, dtype=torch.bool, device=device)
    at = torch.arange(tokens, dtype=torch.int32, device=device)
    for start in range(0, tokens, _MASK_ROWS):
        back = at[start : start + _MASK_ROWS, None] - at
        mask[start : start + _MASK_ROWS] = (back >= 0) & ((at < sinks) | (back < window))
    return mask


def _hidden(model: Any, ids: Tensor, gates: list[Gate], layers: list[int]) -> Tensor:
    """Hidden states [1, n, channels] behind the final norm, with the gates in the places of the layers."""
    announced, previous = AnnouncedPrompt(), None
    caches = native_layers(model)
    for index, gate in zip(layers, gates, strict=True):
        stand_in: Any = gate
        caches[index] = previous = CacheLayer(stand_in, announced, previous)
    return model.get_decoder()(input_ids=ids, past_key_values=TransformersCache(layers=caches)).last_hidden_state


def _attend(step: Step, mask: Tensor | None) -> Tensor:
    """Attention [b, t, heads, dv] to what ``mask`` [t, t] shows, or to everything before."""
    if step.scaling.softcap is not None or step.sink_logits is not None:
        raise UnsupportedModelError("Gates cannot be trained for models with a soft cap or learned sink logits.")
    each = step.query.shape[1] // step.key.shape[1]
    key, value = (x.repeat_interleave(each, dim=1) for x in (step.key, step.value))
    out = scaled_dot_product_attention(
        step.query, key, value, attn_mask=mask, is_causal=mask is None, scale=step.scaling.scale
    )
    return out.transpose(1, 2)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """The model as it answers, its weights without gradients, and afterwards as it was."""
    training, grads = model.training, [weight.requires_grad for weight in model.parameters()]
    attached = is_attached(model)
    model.eval().requires_grad_(False)
    attach(model)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)
        for weight, grad in zip(model.parameters(), grads, strict=True):
            weight.requires_grad_(grad)
        if not attached:
            switch_back(model)
