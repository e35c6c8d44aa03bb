"""Lines of an attention matrix: the fewest columns and diagonals that cover a share of what sampled queries give."""

from dataclasses import dataclass

import torch
from torch import Tensor

# From so many lines on, a round takes more than one: an eighth of those taken so far.
_ROUND = 8


@dataclass(frozen=True)
class Lines:
    """By head, bool [g, n]: which ``columns`` (tokens), and which ``slashes`` (distances back), are read. ``worth``
    [g, n]: what the sample gives each token."""

    columns: Tensor
    slashes: Tensor
    worth: Tensor

    def seen(self, start: int, stop: int) -> Tensor:
        """Which tokens before slot ``start`` lie on a line of some of the queries ``start`` to ``stop``: bool
        [g, start]."""
        back = start - torch.arange(start, device=self.slashes.device)
        count = torch.nn.functional.pad(self.slashes.cumsum(1), (1, 0))
        most = count.shape[1] - 1
        on = count[:, (back + stop - start).clamp(max=most)] - count[:, back.clamp(max=most)]
        return self.columns[:, :start] | (on > 0)

    def read(self, start: int, stop: int) -> Tensor:
        """The tokens [g, m] before slot ``start`` that the queries ``start`` to ``stop`` read, ascending: what they
        see, and where other heads see more, those besides that are worth most."""
        seen = self.seen(start, stop)
        count = int(seen.sum(1).max()) if start else 0
        order = self.worth[:, :start].masked_fill(seen, float("inf"))
        return order.topk(count, dim=1).indices.sort(dim=1).values


def lines(weights: Tensor, at: Tensor, share: float) -> Lines:
    """The lines of each head that cover at least ``share`` of the ``weights`` [g, s, n] of queries at the slots ``at``
    [s], greedily: always the line that covers the most of what is not covered yet. The queries' own tokens are always
    read."""
    g, s, n = weights.shape
    # The last column takes what lies on no token.
    left = torch.cat([weights, weights.new_zeros(g, s, 1)], dim=2)
    gains = weights.new_zeros(g, 2 * n + 1)
    gains[:, :n] = weights.sum(1)
    worth = gains[:, :n].clone()
    back = (at[:, None] - torch.arange(n, device=at.device)).clamp(min=0)
    gains[:, n : 2 * n].scatter_add_(1, back.flatten().expand(g, -1), weights.flatten(1))
    chosen = torch.zeros(g, 2 * n, dtype=torch.bool, device=weights.device)
    total = weights.sum((1, 2))
    best, open_ = torch.full((g, 1), n, device=at.device), torch.ones(g, dtype=torch.bool, device=at.device)
    while bool(open_.any()):
        chosen.scatter_(1, best, chosen.gather(1, best) | open_[:, None])
        # Columns of one round never meet, nor do diagonals; a column and a diagonal may.
        for diagonal in (False, True):
            mine = (best >= n).eq(diagonal) & open_[:, None]
            token = at - (best[..., None] - n) if diagonal else best[..., None].expand(-1, -1, s)
            token = torch.where(mine[..., None] & (token >= 0) & (token <= at), token, n)
            _cover(left, gains, token.transpose(1, 2), at)
        covered = total - left[..., :n].sum((1, 2))
        open_ &= (covered < share * total) & ~chosen.all(1)
        count = max(1, int(chosen.sum(1).max()) // _ROUND)
        best = gains[:, : 2 * n].masked_fill(chosen, -1).topk(min(count, 2 * n), dim=1).indices
    return Lines(chosen[:, :n], chosen[:, n:], worth)


def _cover(left: Tensor, gains: Tensor, token: Tensor, at: Tensor) -> None:
    """Takes the weights of ``token`` [g, s, k] from what is ``left`` and from the lines that they lie on; n: none."""
    n = left.shape[2] - 1
    value = left.gather(2, token)
    left.scatter_(2, token, 0.0)
    back = torch.where(token < n, at[:, None] - token, n)
    gains.scatter_add_(1, token.masked_fill(token == n, 2 * n).flatten(1), -value.flatten(1))
    gains.scatter_add_(1, (back + n).flatten(1), -value.flatten(1))
