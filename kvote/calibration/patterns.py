"""Which pattern of attention each query head has in prompts: of those tried, the one whose answers differ from dense
attention's in the fewest numbers (MInference, arXiv 2407.02490).

``data``: {"tokens": how many were read, "layers": {"layer": [["a_shape", 100, 800], ... by query head], ...}}.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvote.calibration.file import Calibration, is_layer, shown
from kvote.errors import InputError
from kvote.read.patterns import SIZES, Estimate, Pattern
from kvote.read.reader import ReaderDefaults, Reading, everything
from kvote.tokens import Span

KIND = "patterns"
# As published: the patterns tried, the columns and diagonals that are always read, the last queries that judge, the
# block, and how far an answer may be from dense attention's.
CANDIDATES = (
    *(Pattern("vertical_slash", sizes) for sizes in ((30, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096))),
    Pattern("a_shape", (100, 800)),
    Pattern("block_sparse", (100,)),
)
FIRST, NEAREST, LAST, BLOCK, APART = 30, 100, 64, 64, 5e-3
# Texts so long have the published sizes; of shorter ones, all would be read.
LONG = 10_000
# In a text with fewer tokens some patterns would leave nothing out.
LEAST = 256
# Tokens that are read unless told otherwise; a head's answers are computed anew for each pattern.
TOKENS = 8192
_MOST = 10**9


def patterns_of(calibration: Calibration) -> dict[int, tuple[Pattern, ...]]:
    """By layer, the pattern of each query head. Raises InputError unless they make sense."""
    name, model, layers = calibration.name, calibration.model, calibration.data.get("layers")
    if calibration.kind != KIND or not isinstance(layers, dict) or not layers:
        raise InputError(f"{name} holds no layers with patterns of heads.")
    found = {}
    for layer, heads in layers.items():
        if not is_layer(layer, model.layers) or not isinstance(heads, list) or len(heads) != model.heads:
            raise InputError(f"{name}: layer {shown(layer)} is not one of the model's, or lacks query heads.")
        if not all(map(_is_pattern, heads)):
            raise InputError(f"{name}: a head of layer {layer} has a pattern or sizes that make no sense.")
        found[int(layer)] = tuple(Pattern(kind, tuple(sizes)) for kind, *sizes in heads)
    return found


def _is_pattern(held: Any) -> bool:
    if not isinstance(held, list) or not held or not isinstance(held[0], str) or held[0] not in SIZES:
        return False
    return len(held) == 1 + len(SIZES[held[0]]) and all(type(size) is int and 0 < size <= _MOST for size in held[1:])


def candidates(tokens: int) -> list[Pattern]:
    """The patterns tried on a text of so many tokens: smaller in shorter texts, and each once."""
    share = min(1.0, tokens / LONG)
    least = {"vertical": FIRST, "slash": NEAREST, "blocks": 2}

    def scaled(pattern: Pattern) -> Pattern:
        names = SIZES[pattern.kind]
        sizes = (max(least.get(name, 1), round(size * share)) for name, size in zip(names, pattern.sizes, strict=True))
        return Pattern(pattern.kind, tuple(sizes))

    return list(dict.fromkeys(map(scaled, CANDIDATES)))


@dataclass(frozen=True)
class PatternSearch(ReaderDefaults):
    """Reads everything, and finds how far the heads of each layer would be from that with each of the ``tried``.

    ``apart``: by layer, int64 [patterns, heads], in how many numbers the answers differ.
    """

    tried: tuple[Pattern, ...]
    apart: dict[int, Tensor] = field(default_factory=dict)

    def read(self, reading: Reading) -> Iterator[Span]:
        estimate = Estimate(reading, reading.count, LAST, FIRST, NEAREST, BLOCK)
        heads = reading.queries.rotated.shape[1]
        apart = torch.zeros(len(self.tried), heads, dtype=torch.int64)
        value = reading.segment.decode(reading.rows, 0, reading.count)[1].float()
        groups = heads // value.shape[1]
        for head in range(heads):
            query, key, held = (
                reading.queries.rotated[0, head],
                estimate.key[0, head // groups],
                value[0, head // groups],
            )
            for row in range(0, reading.count, BLOCK):
                stop = min(row + BLOCK, reading.count)
                logits = reading.scaled(query[row:stop].float() @ key[:stop].float().T)
                late = torch.arange(stop, device=logits.device) > torch.arange(row, stop, device=logits.device)[:, None]
                logits = logits.masked_fill(late, float("-inf"))
                dense = logits.softmax(-1) @ held[:stop]
                for i, pattern in enumerate(self.tried):
                    unseen = ~estimate.worth(pattern, [head], row, row, stop)[0, 0].isposinf() if row else late[0, :0]
                    part = logits.clone()
                    part[:, :row].masked_fill_(unseen, float("-inf"))
                    apart[i, head] += ((part.softmax(-1) @ held[:stop] - dense).abs() > APART).sum().cpu()
        self.apart[reading.layer] = apart
        yield everything(reading)

    def data(self, tokens: int) -> dict[str, object]:
        """The facts of a calibration file; of patterns that are equally good, the first."""
        best = {str(layer): apart.argmin(0).tolist() for layer, apart in sorted(self.apart.items())}
        layers = {layer: [[self.tried[i].kind, *self.tried[i].sizes] for i in heads] for layer, heads in best.items()}
        return {"tokens": tokens, "layers": layers}
