"""The result of ``kvote ask``, as text and as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """One method. ``tokens_read`` is per decode step in the layer that reads most, ``right`` None where unknown."""

    name: str
    method: str
    answer: str
    right: bool | None
    prefill_seconds: float
    first_token_seconds: float
    ms_per_token: float | None
    tokens_read: int
    kv_bytes: int


@dataclass(frozen=True)
class Outcome:
    """One question to one document, and every method's run, in their order."""

    model: str
    dtype: str
    trained_tokens: int | None
    document: str
    tokens: int
    question: str
    expected: str | None
    runs: list[Run] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """With the answer of the first method, and whether it is right, beside the runs."""
        first, plain = self.runs[0], asdict(self)
        runs = plain.pop("runs")
        return {**plain, "answer": first.answer, "right": first.right, "runs": runs}
