"""HELMET (Yen et al. 2024, arXiv 2410.02694): the tasks whose files come with it and whose score is the share of right
strings: questions over passages (RAG), recall of JSON values, and RULER's needles."""

from pathlib import Path

from kvote.eval.files.lines import Record, records
from kvote.eval.sample import Question, Sample

_SHORTLY = "Answer the question from the documents, in as few words as possible. Question: {}"


def read(path: Path, data: bytes) -> tuple[Sample, ...]:
    """All samples. Raises InputError for what is malformed, and for a file of another task (ranking, citations)."""
    return tuple(_sample(record) for record in records(path, data))


def _sample(record: Record) -> Sample:
    held = record.held
    if "ctxs" in held and "answers" in held:
        question = Question(_SHORTLY.format(record.text("question")), record.texts("answers"), "any", "Answer:", 20)
        return Sample(_passages(record), (question,))
    if "num_kvs" in held:
        asked = f"Give the value that the JSON object above has for this key. Key: {record.text('question')}"
        question = Question(asked, record.texts("answer"), "any", "The value is:", 100)
        return Sample(record.text("context"), (question,))
    if "type_needle_v" in held:
        kind, query = record.text("type_needle_v"), record.text("query")
        asked = f"What are all the special magic {kind} for {query} mentioned in the text?"
        lead = f"The special magic {kind} for {query} mentioned in the text are"
        answers = record.texts("answer" if "answer" in held else "outputs")
        return Sample(record.text("context"), (Question(asked, answers, "all", lead, 50 + 16 * len(answers)),))
    raise record.wrong("is of none of HELMET's tasks that are read: passages (ctxs), num_kvs, or type_needle_v")


def _passages(record: Record) -> str:
    passages = record.held["ctxs"]
    if not isinstance(passages, list) or not passages or not all(isinstance(one, dict) for one in passages):
        raise record.wrong("has no list of passages under 'ctxs'")
    told = [Record(one, record.where) for one in passages]
    return "\n\n".join(f"Document (Title: {one.text('title')}): {one.text('text')}" for one in told)
