"""Attention through torch's fused CPU kernel, which also returns the log-sum-exp that merging needs."""

import torch
from torch import Tensor

from kvote.kernels.masks import additive

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# A mask is built only up to this many entries; beyond it rows are cut into blocks.
_MASK_ENTRIES = 1 << 22


def why_not(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> str | None:
    """The reason this kernel cannot answer, or None."""
    if query.device.type != "cpu":
        return f"tensors are on {query.device.type}"
    if softcap is not None:
        return "the model soft-caps its logits"
    if key.shape[-1] != value.shape[-1]:
        return "keys and values differ in head size"
    if key.shape[2] == 0:
        return "there is no token to read"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: None = None,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention like ``kernels.attend``, without a ``softcap``. Query heads of a key head are packed as rows, so keys
    are never repeated."""
    b, heads, t, d = query.shape
    if causal and window is not None:
        # Before the first row's window, no row sees anything.
        key, value = key[:, :, 1 - t - window :], value[:, :, 1 - t - window :]
    h, m = key.shape[1], key.shape[2]
    queries_per_kv = heads // h
    if causal and t == m and window is None and t > 1:
        key, value = (x.repeat_interleave(queries_per_kv, dim=1) for x in (key, value))
        out, lse = _flash(query, key, value, is_causal=True, scale=scale)
        return out, lse
    if causal and t > 1 and queries_per_kv * t * m > _MASK_ENTRIES:
        half = t // 2
        upper = attend(
            query[:, :, :half],
            key[:, :, : m - t + half],
            value[:, :, : m - t + half],
            scale=scale,
            causal=True,
            window=window,
        )
        lower = attend(query[:, :, half:], key, value, scale=scale, causal=True, window=window)
        return torch.cat([upper[0], lower[0]], dim=2), torch.cat([upper[1], lower[1]], dim=2)
    packed = query.reshape(b, h, queries_per_kv * t, d)
    mask = additive(t, m, window, queries_per_kv, query.dtype, query.device) if causal and t > 1 else None
    out, lse = _flash(packed, key, value, attn_mask=mask, scale=scale)
    return out.reshape(b, heads, t, d), lse.reshape(b, heads, t)
