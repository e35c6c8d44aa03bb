"""What ``kvote ask`` found out, as it is printed and as JSON."""

from dataclasses import dataclass


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
    """One question to one document, and every method's run; ``answer`` and ``right`` are those of the first."""

    model: str
    dtype: str
    trained_tokens: int | None
    document: str
    tokens: int
    question: str
    expected: str | None
    answer: str
    right: bool | None
    runs: list[Run]
