"""Attention of one layer in the geometry of a model, with random tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvote.heads import HeadGroups, in_head_groups
from kvote.layer import Layer, LayerStack, Step
from kvote.method import Method
from kvote.rope import Rope
from kvote.settling import compress_all, drop
from kvote.store.segment import Scaling

_BASE = 500_000.0
# Tokens stored at a time, so that nothing on the way is as large as what is stored.
_PASS = 8192
# Tokens that end a prompt: methods that decide by its last queries look at 32, or a few more.
_PROMPT_END = 64


@dataclass(frozen=True)
class Geometry:
    """Heads and sizes of one attention layer; the defaults are those of Llama-3.1-8B."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        return float(self.dim**-0.5)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.kv_heads * self.dim * self.dtype.itemsize

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Llama's rotary embedding: cosines and sines [..., n, dim / 2]."""
        inverse = 1.0 / _BASE ** (torch.arange(0, self.dim, 2).float() / self.dim)
        angles = positions[..., None].float() * inverse
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def tokens(self, count: int, batch: int = 1) -> tuple[Tensor, Tensor]:
        """Random keys and values [batch, kv_heads, count, dim] each."""
        key, value = (torch.randn(batch, self.kv_heads, count, self.dim, dtype=self.dtype) for _ in range(2))
        return key, value

    def query(self, batch: int = 1) -> Tensor:
        """A random query [batch, heads, 1, dim]."""
        return torch.randn(batch, self.heads, 1, self.dim, dtype=self.dtype)

    def filled(self, method: Method, key: Tensor, value: Tensor) -> Layer:
        """A layer of ``method`` that holds ``key`` and ``value`` [batch, kv_heads, n, dim]."""
        layer = Layer(0, method, Rope(self.rotary))
        self.fill(layer, key, value)
        return layer

    def fill(self, layer: Layer, key: Tensor, value: Tensor) -> None:
        """Puts tokens into an empty layer as if they had been prefilled, and drops those that its method drops.

        They are stored as they are: where a method keeps keys at position 0, these are such keys.
        """
        batch, _, n, _ = key.shape
        layer.expected = n
        segment = layer.start(self.step(0, batch))
        for start in range(0, n, _PASS):
            stop = min(n, start + _PASS)
            positions = torch.arange(start, stop).expand(batch, -1)
            segment.append(list(range(batch)), key[:, :, start:stop], value[:, :, start:stop], positions)
            layer.seen, layer.prompted = stop, True
            drop(layer)

    def prefilled(self, method: Method, key: Tensor, value: Tensor, layers: int = 1) -> list[Layer | HeadGroups]:
        """Neighbouring layers of ``method``, each with ``key`` and ``value`` [1, kv_heads, n, dim] as after a prompt:
        its end went through them as a real pass, so that they have dropped or encoded what they would."""
        stack = LayerStack[Layer]()
        rope = Rope(self.rotary)
        made = [
            in_head_groups(i, method, rope, layers, self.kv_heads) or Layer(i, method, rope, layers, stack)
            for i in range(layers)
        ]
        if key.shape[2] <= _PROMPT_END:
            raise ValueError(f"A prompt of {key.shape[2]} tokens has nothing before its last {_PROMPT_END}.")
        self.prompt(made, key, value)
        return made

    def prompt(self, layers: Sequence[Layer | HeadGroups], key: Tensor, value: Tensor) -> None:
        """Puts ``key`` and ``value`` [batch, kv_heads, n, dim], n at least 2, into empty layers as a prompt; its end
        is a real pass."""
        batch, _, tokens, _ = key.shape
        n = tokens - min(_PROMPT_END, tokens // 2)
        for layer in layers:
            self.begin(layer, key[:, :, :n], value[:, :, :n], tokens)
        positions = torch.arange(n, tokens).expand(batch, -1)
        query = torch.randn(batch, self.heads, tokens - n, self.dim, dtype=self.dtype)
        for layer in layers:
            tail_queries = min(tokens - n, layer.method.read.tail)
            layer.attend(
                Step(query, key[:, :, n:], value[:, :, n:], positions, None, tail_queries, Scaling(self.scale))
            )

    def begin(self, layer: Layer | HeadGroups, key: Tensor, value: Tensor, announced: int) -> None:
        """Puts the first tokens of an announced prompt into an empty layer; no query is asked."""
        rows = list(range(key.shape[0]))
        for part, heads in _parts(layer, self.kv_heads):
            first = self.step(0, len(rows))
            part.expected = announced
            segment = part.start(replace(first, key=first.key[:, heads], value=first.value[:, heads]))
            for start in range(0, key.shape[2], _PASS):
                stop = min(key.shape[2], start + _PASS)
                own = key[:, heads, start:stop], value[:, heads, start:stop]
                segment.append(rows, *own, torch.arange(start, stop).expand(len(rows), -1))
                part.seen, part.prompt_left, part.prompted = stop, announced - stop, True
                drop(part)
                compress_all(part)

    def step(self, position: int, batch: int = 1) -> Step:
        """A decode step of a random token at ``position``."""
        key, value = self.tokens(1, batch)
        positions = torch.full((batch, 1), position)
        scaling = Scaling(self.scale)
        return Step(self.query(batch), key, value, positions, None, 1, scaling, decode=True, prompt_left=None)

    def packed(self, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        """torch's sdpa, the strongest way to call it for one token: query heads of one key head as its rows."""
        rows = query.reshape(query.shape[0], self.kv_heads, self.heads // self.kv_heads, self.dim)
        sdpa, scale = torch.nn.functional.scaled_dot_product_attention, self.scale
        return lambda: sdpa(rows, key, value, scale=scale)

    def as_it_comes(self, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        """torch's sdpa as transformers calls it."""
        module = _Module(self.heads // self.kv_heads)
        return lambda: sdpa_attention_forward(module, query, key, value, None, scaling=self.scale)[0]


def _parts(layer: Layer | HeadGroups, kv_heads: int) -> list[tuple[Layer, list[int]]]:
    """The layers or groups of heads that hold the tokens of a layer, with their key heads."""
    if isinstance(layer, HeadGroups):
        return [(group.layer, list(group.heads)) for group in layer.head_groups]
    return [(layer, list(range(kv_heads)))]


class _Module(torch.nn.Module):
    """The attributes of an attention module that sdpa_attention_forward reads."""

    is_causal = True

    def __init__(self, queries_per_kv: int) -> None:
        super().__init__()
        self.num_key_value_groups = queries_per_kv
