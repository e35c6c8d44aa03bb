"""InfiniteBench (Zhang et al. 2024, arXiv 2402.13718): a file per task, an object per line with context, input, answer,
options."""

from pathlib import Path

from kvote.errors import InputError
from kvote.eval.files.lines import Record, records
from kvote.eval.files.longbench2 import choice
from kvote.eval.sample import Question, Sample
from kvote.files import named

_SHORTLY = "Answer the question from the text, in as few words as possible. Question: {}"
_SPOKEN = "Which character is meant by $$MASK$$ in the script? Answer with the name alone."
# By the file's name: how it asks, how it is scored, and tokens of an answer.
_FILES = {
    "passkey": ("{}", "first_number", 12),
    "number_string": ("{}", "first_number", 24),
    "kv_retrieval": ("{}", "any", 50),
    "longbook_sum_eng": ("Summarise the book.", "rouge", 1200),
    "longbook_qa_eng": (_SHORTLY, "f1", 40),
    "longbook_qa_chn": ("请根据文本简短回答这个问题\n{}", "f1_of_characters", 40),
    "longdialogue_qa_eng": (_SPOKEN, "any", 40),
    "math_find": ("{}", "first_number", 8),
    "code_run": ("{} Answer with the number that is returned, and nothing else.", "last_number", 8),
}
_CHOICES = {
    "longbook_choice_eng": "{}",
    "code_debug": "One function in the code was made wrong on purpose. Which one?",
}


def read(path: Path, data: bytes) -> tuple[Sample, ...]:
    """All samples. Raises InputError for what is malformed, and for a file whose name is none of the benchmark's."""
    if path.stem not in _FILES and path.stem not in _CHOICES:
        known = ", ".join([*_FILES, *_CHOICES])
        raise InputError(f"{named(path)} is named as none of the files that are read: {known}.")
    return tuple(_sample(path.stem, record) for record in records(path, data))


def _sample(name: str, record: Record) -> Sample:
    asked, answers = record.text("input").strip(), record.texts("answer")
    if name in _CHOICES:
        options = record.texts("options")
        if len(options) != 4 or answers[0] not in options:
            raise record.wrong("has no four options of which the answer is one")
        question = choice(_CHOICES[name].format(asked), options, "ABCD"[options.index(answers[0])])
    else:
        form, score, room = _FILES[name]
        if score == "first_number" and not _is_number(answers[0]):
            raise record.wrong(f"has the answer {answers[0]!r}, which is no number")
        question = Question(form.format(asked), answers, score, room=room)
    return Sample(record.text("context"), (question,))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
