"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): a JSON list of questions with four choices."""

from pathlib import Path

from kvote.eval.files.lines import Record, records
from kvote.eval.sample import Question, Sample

_LETTERS = "ABCD"


def read(path: Path, data: bytes) -> tuple[Sample, ...]:
    """All samples, of a list or of lines. Raises InputError for what is malformed."""
    return tuple(_sample(record) for record in records(path, data))


def _sample(record: Record) -> Sample:
    choices = tuple(record.text(f"choice_{letter}").strip() for letter in _LETTERS)
    answer = record.text("answer")
    if answer not in tuple(_LETTERS):
        raise record.wrong(f"has the answer {answer!r}, which is no letter from A to D")
    return Sample(record.text("context").strip(), (choice(record.text("question").strip(), choices, answer),))


def choice(asked: str, choices: tuple[str, ...], letter: str) -> Question:
    """A question with choices under letters, of which ``letter`` is right."""
    listed = "\n".join(f"({one}) {text}" for one, text in zip(_LETTERS, choices, strict=False))
    return Question(
        f"{asked}\n{listed}\nAnswer with the letter of the right choice.",
        (letter,),
        "letter",
        "The right choice is (",
        8,
    )
