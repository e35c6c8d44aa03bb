"""A layer whose key heads are kept in different ways: one ``Layer`` per group of heads, with its own tokens."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvote.errors import UnsupportedModelError
from kvote.keep.keeper import HeadAssignment
from kvote.layer import Layer, Step
from kvote.method import Method
from kvote.passes import Passes
from kvote.read.reader import Everything
from kvote.rope import Rope
from kvote.store.uncompressed import Uncompressed


@dataclass
class HeadGroup:
    """A ``layer`` of its own for ``heads``, key heads of the model's layer in ascending order."""

    heads: tuple[int, ...]
    layer: Layer

    def step(self, step: Step) -> Step:
        """The part of a step for these heads."""
        kv_heads = list(self.heads)
        heads = self.query_heads(step.query.shape[1] // step.key.shape[1])
        sinks = None if step.sink_logits is None else step.sink_logits.reshape(-1)[heads]
        key, value = step.key[:, kv_heads], step.value[:, kv_heads]
        return replace(step, query=step.query[:, heads], key=key, value=value, sink_logits=sinks)

    def query_heads(self, each: int) -> list[int]:
        """The query heads of these key heads, ``each`` per key head."""
        return [head * each + i for head in self.heads for i in range(each)]


@dataclass
class HeadGroups:
    """Offers what ``Layer`` does, and hands it on to the groups."""

    index: int
    method: Method
    head_groups: list[HeadGroup] = field(default_factory=list)

    @property
    def parts(self) -> list[Layer]:
        return [head_group.layer for head_group in self.head_groups]

    @property
    def seen(self) -> int:
        return self.head_groups[0].layer.seen

    @property
    def sequences(self) -> int:
        return self.head_groups[0].layer.sequences

    @property
    def record_past(self) -> bool:
        return self.head_groups[0].layer.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        for layer in self.parts:
            layer.record_past = value

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.parts)

    def attend(self, step: Step) -> Tensor:
        """Does what ``Layer.attend`` does."""
        return self.parts[0].passes.whole(self.parts, self.run, step)

    def run(self, step: Step) -> Tensor:
        """Does what ``Layer.run`` does. Raises UnsupportedModelError if the layer has other key heads than the model's
        config tells."""
        kv_heads = sum(len(head_group.heads) for head_group in self.head_groups)
        if step.key.shape[1] != kv_heads:
            raise UnsupportedModelError(
                f"Layer {self.index} has {step.key.shape[1]} key heads and not the {kv_heads} of the model's config "
                f"that {self.method.spec} goes by."
            )
        b, heads, t, _ = step.query.shape
        out = step.value.new_empty(b, t, heads, step.value.shape[3])
        for head_group in self.head_groups:
            out[:, :, head_group.query_heads(heads // step.key.shape[1])] = head_group.layer.run(head_group.step(step))
        return out

    def expect(self, tokens: int) -> None:
        for layer in self.parts:
            layer.expect(tokens)

    def crop(self, columns: int, prompt_left: int | None = None) -> None:
        for layer in self.parts:
            layer.crop(columns, prompt_left)

    def select(self, index: list[int]) -> None:
        for layer in self.parts:
            layer.select(index)

    def reset(self) -> None:
        for layer in self.parts:
            layer.reset()

    def positions(self, row: int) -> list[Tensor]:
        """Original positions of the tokens held, one int32 tensor per key head of the layer."""
        held: dict[int, Tensor] = {}
        for head_group in self.head_groups:
            segment = head_group.layer.segment
            none = torch.empty(0, dtype=torch.int32)
            each = [none] * len(head_group.heads) if segment is None else segment.positions(row)
            held |= dict(zip(head_group.heads, each, strict=True))
        return [held[head] for head in sorted(held)]


def in_head_groups(
    index: int, method: Method, rope: Rope | None, layers: int, kv_heads: int, passes: Passes | None = None
) -> HeadGroups | None:
    """The layer as groups of heads that ``method`` keeps differently; None where it keeps all in one way. ``passes``:
    those of its cache."""
    passes = Passes() if passes is None else passes
    split = method.keep.split(index, kv_heads)
    if split is None:
        return None
    head_groups, drops = [], method.keep.offers.drops
    for assignment in split:
        if assignment.heads:
            own = _of(assignment, method)
            layer = Layer(index, own, rope, assignment.budget_shares or layers, others_drop=drops, passes=passes)
            head_groups.append(HeadGroup(assignment.heads, layer))
    return HeadGroups(index, method, head_groups)


def _of(assignment: HeadAssignment, method: Method) -> Method:
    """The method of some heads: the layer's, with the keeper of its share."""
    if assignment.dense:
        return replace(method, keep=assignment.keeper, store=Uncompressed(), read=Everything())
    return replace(method, keep=assignment.keeper)
