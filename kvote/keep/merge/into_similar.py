"""Some of what goes is merged into the tokens that stay and that it resembles."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError
from kvote.keep.evict import Cut
from kvote.keep.keeper import Held
from kvote.keep.merge.merging import Tokens, assign, merged
from kvote.keep.score.overall_or_recent import Importance
from kvote.needs import Needs
from kvote.numbers import check_flags, is_number
from kvote.rope import Rope
from kvote.store.segment import Scaling
from kvote.tokens import Queries


@dataclass(frozen=True)
class IntoSimilar:
    """The ``share`` times as many tokens as were chosen by their score, the next best, go into the most similar one
    that stays, if it is at least ``threshold`` alike; for a score whose memory can ``inherit``.
    ``remove_positions``: keys are compared and merged without their rotation."""

    share: float
    threshold: float
    remove_positions: bool
    adds_up: bool = False

    def __post_init__(self) -> None:
        if not is_number(self.share) or self.share < 0:
            raise MethodError(f"merge must be a finite number of at least 0; got {self.share!r}.")
        if not is_number(self.threshold) or self.threshold <= 0:
            raise MethodError(f"threshold must be a finite number above 0; got {self.threshold!r}.")
        check_flags(self, "remove_positions")

    @property
    def needs(self) -> Needs:
        return Needs(rotation=self.remove_positions)

    def new_memory(self) -> None:
        return None

    def slotless_attention(self, queries: Queries, rows: list[int], scaling: Scaling, memory: Importance) -> None:
        return None

    def merged(self, held: Held, memory: Importance, cut: Cut) -> tuple[Tensor, Tensor] | None:
        more = min(int(self.share * cut.chosen), held.length - cut.slots.shape[1])
        rest = cut.worth.scatter(1, cut.slots, float("-inf"))
        others = kernels.top_k(rest, more) if more else cut.slots[:, :0]
        content, worth = self.join(held, cut.worth, cut.slots, others)
        memory.inherit(held.row, worth)
        return content

    def join(
        self, held: Held, score: Tensor, kept: Tensor, others: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
        """The keys and values that the tokens kept hold from now on (None: as before), and their importance."""
        key, value = (x[0] for x in held.segment.decode([held.row], 0, held.length))
        score, kept, others = (x.expand(len(key), -1) for x in (score, kept, others))
        if not others.shape[1]:
            return None, score.gather(1, kept)
        rotation = held.rope if self.remove_positions else None
        at = held.segment.positions(held.row) if rotation is not None else [None] * len(key)
        # Head by head: in float32 and without their rotation, tokens take several times what they are held in.
        new = []
        for head in range(len(key)):
            part = slice(head, head + 1)
            tokens = Tokens(key[part], value[part], score[part])
            new.append(self._merged(tokens, kept[part], others[part], rotation, at[head]))
        worth = torch.cat([tokens.score for tokens, _ in new])
        if not any(grown for _, grown in new):
            return None, worth
        return (torch.cat([tokens.key for tokens, _ in new]), torch.cat([tokens.value for tokens, _ in new])), worth

    def _merged(
        self, tokens: Tokens, kept: Tensor, others: Tensor, rotation: Rope | None, at: Tensor | None
    ) -> tuple[Tokens, bool]:
        """The tokens ``kept`` [1, m] of a head after the merge, and whether anything was merged into them; ``at`` [n]:
        the positions of all, where their rotation is to be removed."""

        def unrotated(slots: Tensor) -> Tokens:
            """Tokens in float32, without their rotation where it is to be removed."""
            taken = tokens.take(slots).float()
            if rotation is None or at is None:
                return taken
            return replace(taken, key=rotation.apply(taken.key, rotation.back(rotation.once(at.long()[slots]))))

        centres, alike = unrotated(kept), unrotated(others)
        into = assign(centres, alike, self.threshold)
        old = tokens.take(kept)
        if not bool((into >= 0).any()):
            return replace(old, score=centres.score), False
        new = merged(centres, alike, into)
        key = new.key if rotation is None or at is None else rotation.apply(new.key, rotation.once(at.long()[kept]))
        same = (new.key == centres.key).all(dim=-1, keepdim=True)
        # Turned back and forth, a key would come out a little different.
        key = old.key.where(same, key.to(old.key.dtype))
        return Tokens(key, new.value.to(old.value.dtype), new.score), True
