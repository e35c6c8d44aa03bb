"""What a part of a method needs of the others and of the model, and what it offers them: data, which ``composition``
compares when a method is built and layers ask when they start."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvote.index.column import Index


class Keys(Enum):
    """In which form a part takes keys."""

    ANY = "any"
    # As the model made them.
    ROTATED = "rotated"
    # At position 0, to be rotated when they are read.
    UNROTATED = "unrotated"

    def __or__(self, other: "Keys") -> "Keys":
        """What serves both, where anything does."""
        return Keys.UNROTATED if Keys.UNROTATED in (self, other) else other if self is Keys.ANY else self


@dataclass(frozen=True)
class Cuts:
    """Where a prefix may be cut so that what comes before is held and read alike whatever follows: at multiples of
    ``every`` tokens; None: nowhere."""

    every: int | None

    def __and__(self, other: "Cuts") -> "Cuts":
        """Where both may be cut."""
        if self.every is None or other.every is None:
            return WHOLE
        return Cuts(math.lcm(self.every, other.every))


ANYWHERE, WHOLE = Cuts(1), Cuts(None)


@dataclass(frozen=True)
class Needs:
    """What a keeper, a store or a reader (or a score or a merge, for its keeper) needs.

    Of what is held: ``keys``; ``lists``: single tokens can be read; ``indexes``: columns derived from keys, which are
    held beside them. ``equal_heads``, ``equal_layers``: all key heads of a layer, or all layers, hold the same tokens;
    ``layers_alike``: layers do in groups of so many neighbours, counted from the first; ``whole_layers``: the key heads
    of a layer are held together. ``uneven_heads``: key heads may hold different numbers of tokens. ``lasting``: no
    token is dropped while generating. ``repeat_chunk``: a prompt is read again once it has ended, so many tokens at a
    time (``kvote.repeat``), and stays as the model made it until then; 0: it is not.

    Of the model: ``rotation``: the part takes it out of keys itself. ``extra_inputs``: what of a pass it is shown
    besides queries, keys and values (``kvote.extra_inputs``).

    ``prompts``: the part, a reader, must read prompts itself, of which it remembers something.
    """

    keys: Keys = Keys.ANY
    lists: bool = False
    indexes: "tuple[Index, ...]" = ()
    equal_heads: bool = False
    equal_layers: bool = False
    whole_layers: bool = False
    uneven_heads: bool = False
    lasting: bool = False
    repeat_chunk: int = 0
    rotation: bool = False
    extra_inputs: frozenset[str] = frozenset()
    layers_alike: int = 1
    prompts: bool = False

    @property
    def other_layers(self) -> bool:
        """Whether the part takes over what another layer has decided."""
        return self.equal_layers or self.layers_alike > 1

    def __or__(self, other: "Needs") -> "Needs":
        """What both need together."""
        return Needs(
            self.keys | other.keys,
            self.lists or other.lists,
            self.indexes + other.indexes,
            self.equal_heads or other.equal_heads,
            self.equal_layers or other.equal_layers,
            self.whole_layers or other.whole_layers,
            self.uneven_heads or other.uneven_heads,
            self.lasting or other.lasting,
            max(self.repeat_chunk, other.repeat_chunk),
            self.rotation or other.rotation,
            self.extra_inputs | other.extra_inputs,
            math.lcm(self.layers_alike, other.layers_alike),
            self.prompts or other.prompts,
        )


@dataclass(frozen=True)
class KeeperOffers:
    """What becomes of tokens. ``drops``: some are let go of; ``drops_generated``: while generating, too; ``waits``: not
    before the end of an announced prompt. ``equal_heads``, ``equal_layers``: key heads of a layer, or layers, hold the
    same tokens; ``layers_alike``: layers do in groups of so many; ``whole_layers``: no key heads are kept apart by
    keepers of their own. ``adds_up``: what was observed cannot be taken back, so a rollback must have been announced
    even where nothing was dropped. ``cascades``: what is observed in a layer changes what others may hold."""

    drops: bool = True
    drops_generated: bool = True
    waits: bool = False
    equal_heads: bool = True
    equal_layers: bool = False
    whole_layers: bool = True
    adds_up: bool = False
    cascades: bool = False
    layers_alike: int = 1
    cuts: Cuts = WHOLE


@dataclass(frozen=True)
class StoreOffers:
    """How tokens can be read. ``lists``: by lists of slots. ``as_made``: all are held as the model made them, so that
    indexes can be kept beside them. ``uneven_heads``: key heads may hold different numbers of them. ``retains``: those
    that are dropped stay, encoded. ``shares_layers``: layers hold them together, so ``Store.after_layer`` is called."""

    lists: bool = True
    as_made: bool = False
    uneven_heads: bool = False
    retains: bool = False
    shares_layers: bool = False
    cuts: Cuts = WHOLE


@dataclass(frozen=True)
class ReaderOffers:
    """``uneven_heads``: it reads right where key heads hold different numbers of tokens. ``cuts``: where in a prompt,
    in front of its ``tail``, what is read does not depend on what follows. ``adds_up``: it remembers sums over passes,
    so its memory is an ``AddsUp``, and no token may move. ``alone``: rows of a batch may read different numbers of
    tokens, so it is given generated tokens row by row. ``apart``: prompts are read by a reader of their own, row
    by row."""

    uneven_heads: bool = False
    adds_up: bool = False
    alone: bool = False
    apart: bool = False
    cuts: Cuts = WHOLE


NOTHING = Needs()
