"""The law of every kernel, in short torch with float32 accumulation. Fast kernels are tested against this file.

Shapes. ``b`` groups of lanes, ``h`` key/value heads, ``g`` query heads per key/value head (GQA), ``t`` query rows,
``n`` or ``m`` tokens, ``d`` channels. Query heads are ordered as transformers orders them: head = h_kv * g + i.
"""

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tokens given, and the log-sum-exp that lets partial answers be merged.

    ``query`` [b, h*g, t, d], ``key`` [b, h, m, d], ``value`` [b, h, m, dv]; ``mask`` [t, m] or [b, t, m], True where
    a row may see a token; ``bias`` [b, h, m], added to the logits (a token that stands for N others carries log N).
    Returns ``out`` [b, h*g, t, dv] in the query's dtype and ``lse`` [b, h*g, t] in float32. A row that sees nothing
    answers 0 with an lse of -inf.
    """
    b, heads, t, _ = query.shape
    h, m = key.shape[1], key.shape[2]
    grouped = query.float().reshape(b, h, heads // h, t, -1)
    logits = torch.einsum("bhgtd,bhmd->bhgtm", grouped, key.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.float()[:, :, None, None, :]
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask[None]
        logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1) if m else logits.new_full(logits.shape[:-1], float("-inf"))
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.einsum("bhgtm,bhmd->bhgtd", weights, value.float())
    return out.reshape(b, heads, t, -1).to(query.dtype), lse.reshape(b, heads, t)


def merge(answers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins attention answers over disjoint tokens: ``[(out [..., dv], lse [...]), ...]`` to one such pair.

    Exact: each answer is weighted by the share of the softmax mass that its tokens hold.
    """
    if len(answers) == 1:
        return answers[0]
    total = torch.logsumexp(torch.stack([lse for _, lse in answers]), dim=0)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    out = sum(torch.exp(lse - safe)[..., None] * part.float() for part, lse in answers)
    return torch.as_tensor(out).to(answers[0][0].dtype), total


def with_sink_logits(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention that a learned per-head sink logit takes part in (GPT-OSS): the sink takes mass and gives no value.

    ``out`` [b, heads, t, dv], ``lse`` [b, heads, t], ``sinks`` [heads].
    """
    share = torch.sigmoid(lse - sinks.float().reshape(1, -1, 1))
    return (out.float() * share[..., None]).to(out.dtype)


_SCORED_AT_ONCE = 1 << 16


def scores(query: Tensor, key: Tensor) -> Tensor:
    """Raw dot products of each query head with the keys of its own key/value head, in float32, not scaled.

    ``query`` [b, h*g, r, d] (r independent selecting queries), ``key`` [b, h, n, d]. Returns [b, r, h*g, n].
    """
    b, heads, r, d = query.shape
    h, n = key.shape[1], key.shape[2]
    rows = query.float().reshape(b, h, heads // h * r, d).transpose(-1, -2)
    # [n, d] x [d, rows] walks the keys once in memory order; in pieces, so that the float32 copy stays small.
    products = [torch.matmul(key[:, :, i : i + _SCORED_AT_ONCE].float(), rows) for i in range(0, n, _SCORED_AT_ONCE)]
    joined = torch.cat(products, dim=2) if n else rows.new_empty(b, h, 0, rows.shape[-1])
    return joined.reshape(b, h, n, heads // h, r).permute(0, 4, 1, 3, 2).reshape(b, r, heads, n)


def soft_votes(logits: Tensor) -> Tensor:
    """TokenSelect's vote (arXiv 2411.02886, section 3.3): softmax per head over candidates, summed over heads.

    ``logits`` [..., heads, n] to votes [..., n]; the votes of one selection sum to the number of heads.
    """
    return torch.softmax(logits, dim=-1).sum(dim=-2)


def votes_within(logits: Tensor, start: int, limits: list[int]) -> Tensor:
    """Soft votes [b, r, n] from ``logits`` [b, r, heads, n] of tokens from ``start`` on; query j votes on those before
    ``limits[j]``."""
    return soft_votes(forbid(logits, start, limits))


def sketched(x: Tensor, bits: int) -> Tensor:
    """What an 8- or 4-bit sketch keeps of ``x`` [..., d]: codes with one half-precision scale per row, in float32.

    The largest magnitude of a row gets the largest code; 8-bit codes are whole numbers up to 127, 4-bit codes the
    sixteen halves from -7.5 to 7.5.
    """
    rows = x.float()
    most, zero = (127.0, 128.0) if bits == 8 else (7.5, 7.5)
    scale = (rows.abs().amax(-1, keepdim=True) / most).half().float()
    codes = torch.where(scale > 0, rows / scale, 0.0).clamp(-most, most)
    return ((codes + zero + 0.5).floor() - zero) * scale


def centre(key: Tensor, page: int) -> Tensor:
    """What the keys [..., n, d] of a lane have in common, [..., 1, d]: the mean of the first ``page`` of them, or 0
    where there are fewer. It adds the same to every score of a query, which no softmax sees, so sketches go without it.
    A channel whose mean is no finite number has none."""
    if key.shape[-2] < page:
        return key.new_zeros(*key.shape[:-2], 1, key.shape[-1], dtype=torch.float32)
    return key[..., :page, :].double().mean(dim=-2, keepdim=True).float().nan_to_num(0.0, 0.0, 0.0)


def sketched_query(query: Tensor) -> Tensor:
    """A query [..., d] as it meets a sketch: whole numbers up to 127 times one float32 scale per row."""
    scale = query.float().abs().amax(-1, keepdim=True) / 127.0
    codes = torch.where(scale > 0, query.float() / scale, 0.0)
    return torch.trunc(codes + 0.5 * codes.sign()) * scale


def rescored(rough: Tensor, exact: Tensor, nominated: Tensor) -> Tensor:
    """Soft votes [..., m] of the nominated tokens, whose scores are exact while all others keep those of a sketch.

    ``rough`` [..., heads, n], ``exact`` [..., heads, m] for ``nominated`` [..., m].
    """
    places = nominated[..., None, :].expand(exact.shape)
    return soft_votes(rough.scatter(-1, places, exact)).gather(-1, nominated)


def forbid(values: Tensor, start: int, limits: list[int]) -> Tensor:
    """-inf where token ``start + i`` is at or beyond ``limits[j]``; ``values`` [b, r, n] or [b, r, heads, n]."""
    if all(limit >= start + values.shape[-1] for limit in limits):
        return values
    token = torch.arange(start, start + values.shape[-1], device=values.device)
    late = token >= torch.tensor(limits, device=values.device)[:, None]
    return values.masked_fill(late if values.dim() == 3 else late[:, None], float("-inf"))


# Float32 logits (16 MiB) and query rows that ``attention_mass`` holds at a time, so that no matrix of both ever exists.
_MASS_HELD = 1 << 22
_MASS_ROWS = 256


def attention_mass(
    query: Tensor,
    lse: Tensor,
    key: Tensor,
    start: int,
    limits: list[int],
    *,
    scale: float,
    softcap: float | None,
    window: int | None = None,
) -> Tensor:
    """Attention that each token received: its softmax weights, summed over the query rows of its key/value head.

    ``query`` [b, h*g, t, d] with the ``lse`` [b, h*g, t] of its rows, of which row i sees tokens before ``limits[i]``,
    and with ``window`` only the last of those; ``key`` [b, h, n, d] holds tokens from ``start`` on. Returns [b, h, n]
    in float32. A row that saw nothing (lse -inf) gives nothing.
    """
    b, heads, t, d = query.shape
    h, n = key.shape[1], key.shape[2]
    queries_per_kv = heads // h
    grouped = query.float().reshape(b, h, queries_per_kv, t, d) * scale
    totals = lse.float().masked_fill(lse == float("-inf"), float("inf")).reshape(b, h, queries_per_kv, t)
    ends = torch.tensor(limits, device=key.device) - start
    mass = torch.zeros(b, h, n, device=key.device)
    for row in range(0, t, _MASS_ROWS):
        part = grouped[:, :, :, row : row + _MASS_ROWS].flatten(2, 3)
        total = totals[:, :, :, row : row + _MASS_ROWS].flatten(2)[..., None]
        end = ends[row : row + _MASS_ROWS].repeat(queries_per_kv)[:, None]
        least, most, wide = int(end.min()), int(end.max()), max(16, _MASS_HELD // (b * h * part.shape[2]))
        for token in range(0 if window is None else max(0, least - window), min(n, most), wide):
            some = key[:, :, token : token + wide].float()
            logits = torch.matmul(part, some.transpose(-1, -2))
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if window is not None or token + wide > least:
                at = torch.arange(token, token + some.shape[2], device=key.device)
                unseen = at >= end if window is None else (at >= end) | (at < end - window)
                logits.masked_fill_(unseen, float("-inf"))
            mass[:, :, token : token + wide] += logits.sub_(total).exp_().sum(dim=2)
    return mass


def max_pool(votes: Tensor, size: int) -> Tensor:
    """Spreads each vote to its neighbours: a running maximum of ``size`` tokens, stride 1, over [..., n].

    Padding is (size - 1) // 2 as published, so an even size gives n - 1 outputs; the last one is repeated.
    """
    if size <= 1 or votes.shape[-1] == 0:
        return votes
    flat = votes.reshape(-1, 1, votes.shape[-1])
    pooled = torch.nn.functional.max_pool1d(flat, size, stride=1, padding=(size - 1) // 2)
    short = flat.shape[-1] - pooled.shape[-1]
    pooled = torch.cat([pooled, flat[..., -short:]], dim=-1) if short else pooled
    return pooled.reshape(votes.shape)


_BLOCK = 64


def top_k(votes: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest votes [..., n], ascending.

    Two levels, so that a long row is read once instead of being heap-sorted: whatever is among the k largest lies in
    one of the k blocks with the largest maxima.
    """
    n = votes.shape[-1]
    blocks = n // _BLOCK
    if blocks < 2 * k or n < 8192:
        return votes.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    head, rest = votes[..., : blocks * _BLOCK], votes[..., blocks * _BLOCK :]
    tiles = head.reshape(*votes.shape[:-1], blocks, _BLOCK)
    best = tiles.amax(dim=-1).topk(k, dim=-1, sorted=False).indices
    offsets = torch.arange(_BLOCK, device=votes.device)
    places = (best[..., None] * _BLOCK + offsets).flatten(-2)
    tail = torch.arange(blocks * _BLOCK, n, device=votes.device).expand(*votes.shape[:-1], -1)
    places = torch.cat([places, tail], dim=-1)
    values = torch.cat([tiles.gather(-2, best[..., None].expand(*best.shape, _BLOCK)).flatten(-2), rest], dim=-1)
    winners = values.topk(k, dim=-1, sorted=False).indices
    return places.gather(-1, winners).sort(dim=-1).values


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary rotation of the first ``2 * cos.shape[-1]`` channels of ``x`` [..., n, d] by ``cos``/``sin`` [..., n, r].

    Pairs are (i, i + r) or, interleaved, (2i, 2i + 1). Computed in float32, returned in the dtype of ``x``.
    """
    r = cos.shape[-1]
    head, rest = x[..., : 2 * r].float(), x[..., 2 * r :]
    first, second = (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :r], head[..., r:])
    a, b = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack([a, b], dim=-1).flatten(-2) if interleaved else torch.cat([a, b], dim=-1)
    rotated = rotated.to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated
