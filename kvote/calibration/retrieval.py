"""Which key heads find what was said before: attention to earlier copies of a token (echo) and to what followed them
(induction), on random tokens that are repeated (RazorAttention, arXiv 2407.15891).
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvote.cache import Cache
from kvote.calibration.file import Calibration
from kvote.calibration.fingerprint import Fingerprint
from kvote.calibration.heads import RAZOR, as_data
from kvote.calibration.one_pass import OnePass
from kvote.errors import InputError
from kvote.keep.budget import Budget
from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.policies import KeeperDefaults
from kvote.method import Method
from kvote.needs import KeeperOffers

# The published search: a number of random tokens, repeated a number of times.
PERIOD, TIMES = 2500, 4
# A head that attends to everything alike has an induction of one in a period: 3% of the shortest.
SHORTEST = 32

# Attention weights that exist at a time (64 MiB), of one layer and a block of its queries.
_WEIGHTS_HELD = 1 << 24


def measure_razor(model: Any, period: int | None = None, avoid: Collection[int] = (), seed: int = 0) -> Calibration:
    """Induction and echo of every key head, from one pass over ``period`` random tokens said four times.

    ``period``: 2,500 as published, or fewer where the model was made for shorter texts. ``avoid``: ids besides those of
    the model's config that are not to be drawn (special tokens). Raises InputError for a period below 32 or a
    vocabulary that is too small.
    """
    ids = _repeated(model, _period(model) if period is None else period, avoid, seed)
    cache = Cache(model, Method("calibrate", keep=Retrieval((ids.shape[1] - 1) // TIMES)))
    with torch.inference_mode():
        model(input_ids=ids.to(model.device), past_key_values=cache, logits_to_keep=1)
    found = {layer.index: layer.record.memory for layer in cache.managed}
    layers = {layer: {"induction": f.induction.tolist(), "echo": f.echo.tolist()} for layer, f in found.items()}
    return Calibration(RAZOR, Fingerprint.of(model), {"tokens": ids.shape[1], "layers": as_data(layers)})


def _period(model: Any) -> int:
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(PERIOD, (longest - 1) // TIMES) if isinstance(longest, int) else PERIOD


def _repeated(model: Any, period: int, avoid: Collection[int], seed: int) -> Tensor:
    """Ids [1, 1 + 4 * period]: the token that begins texts, and random tokens, each once in a period, four times."""
    config = model.config.get_text_config(decoder=True)
    special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    ids = {each for found in special for each in (found if isinstance(found, list) else [found])} | set(avoid)
    usual = torch.tensor([i for i in range(config.vocab_size) if i not in ids])
    if not SHORTEST <= period <= len(usual):
        raise InputError(
            f"A period of random tokens must be from {SHORTEST} to {len(usual):,} long, a text of {TIMES} periods and "
            f"one token from {TIMES * SHORTEST + 1} to {TIMES * len(usual) + 1:,}; got a period of {period:,}."
        )
    drawn = torch.randperm(len(usual), generator=torch.Generator().manual_seed(seed))
    begin = config.bos_token_id if isinstance(config.bos_token_id, int) else int(usual[drawn[-1]])
    return torch.cat([torch.tensor([begin]), usual[drawn[:period]].repeat(TIMES)])[None]


@dataclass
class Found(OnePass):
    """``echo`` and ``induction`` of the key heads [h] of one layer."""

    echo: Tensor = field(default_factory=lambda: torch.zeros(0))
    induction: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def nbytes(self) -> int:
        return self.echo.nbytes + self.induction.nbytes


@dataclass(frozen=True)
class Retrieval(KeeperDefaults):
    """Keeps everything, and scores the heads of each layer on a text read in one pass: one token, and then ``period``
    tokens again and again."""

    period: int

    @property
    def offers(self) -> KeeperOffers:
        # Only those that may drop tokens are shown what was read.
        return KeeperOffers(drops=True)

    @property
    def budget(self) -> Budget | None:
        return None

    def new_memory(self) -> Found:
        return Found()

    def observes(self, prompt_left: int | None) -> bool:
        return True

    def observe(self, seen: Observation, memory: Found) -> None:
        query, lse, (key, _) = seen.queries.rotated, seen.lse, seen.segment.decode([0], 0, seen.count)
        memory.echo, memory.induction = scores(
            query[0], key[0], lse[0], self.period, seen.scaling.scale, seen.scaling.softcap
        )

    def survivors(self, held: Held, memory: Found) -> None:
        return None


def scores(
    query: Tensor, key: Tensor, lse: Tensor, period: int, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Echo and induction of the key heads, each float32 [h], from ``query`` [h*g, t, d], ``key`` [h, t, d] and the
    log-sum-exp ``lse`` [h*g, t] of each query's logits.

    Token 0 begins the text, and those behind it repeat with ``period``. Per query head, the attention of every token
    after the first period to all earlier copies of itself (echo), and to the tokens right behind those (induction),
    is added up and averaged over the tokens. A key head scores as its best query head.
    """
    heads, t, _ = query.shape
    queries_per_kv, n = heads // key.shape[0], t - 1
    echo, induction = torch.zeros(heads), torch.zeros(heads)
    keys = key.float().repeat_interleave(queries_per_kv, dim=0)
    rows = max(1, _WEIGHTS_HELD // (heads * t))
    for start in range(period, n, rows):
        at = torch.arange(start, min(start + rows, n), device=query.device)
        logits = query[:, at + 1].float() @ keys.transpose(1, 2) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        # Without the first token's column: what it takes is no token's.
        weights = (logits - lse[:, at + 1, None]).exp()[:, :, 1:]
        for back in range(period, int(at[-1]) + 1, period):
            there = at >= back
            row, copy = there.nonzero()[:, 0], at[there] - back
            echo += weights[:, row, copy].sum(dim=1).cpu()
            # A copy lies a period of at least two back, so that what follows it is not the query itself.
            induction += weights[:, row, copy + 1].sum(dim=1).cpu()
    count = n - period
    return echo.reshape(-1, queries_per_kv).amax(1) / count, induction.reshape(-1, queries_per_kv).amax(1) / count
