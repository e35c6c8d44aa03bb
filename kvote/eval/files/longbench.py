"""LongBench (Bai et al. 2023, arXiv 2308.14508): a JSON object per line with input, context, answers, dataset."""

from pathlib import Path

from kvote.eval.files.lines import Record, records
from kvote.eval.sample import Question, Sample

_SHORTLY = "Answer the question from the text, in as few words as possible, and say nothing else. Question: {}"
_CLASS = "Name the class of the last item, as the examples do.\n{}"
_PARAGRAPH = "From which paragraph is this summary? Answer as in 'Paragraph 1'.\n{}"
# How each data set asks, how it is scored, and tokens of an answer.
_SETS = {
    "narrativeqa": (_SHORTLY, "f1", 128),
    "qasper": (_SHORTLY + " Say 'unanswerable' if the text does not tell.", "f1", 128),
    "multifieldqa_en": (_SHORTLY, "f1", 64),
    "hotpotqa": (_SHORTLY, "f1", 32),
    "2wikimqa": (_SHORTLY, "f1", 32),
    "musique": (_SHORTLY, "f1", 32),
    "gov_report": ("Summarise the report on one page.", "rouge", 512),
    "qmsum": ("Answer from the transcript, in one sentence or more: {}", "rouge", 512),
    "multi_news": ("Summarise all the news on one page.", "rouge", 512),
    "trec": (_CLASS, "classes", 64),
    "triviaqa": ("Answer as the examples do.\n{}", "f1", 32),
    "samsum": ("Summarise the last dialogue as the examples do.\n{}", "rouge", 128),
    "lsht": (_CLASS, "classes", 64),
    "passage_count": ("How many paragraphs are left without duplicates? Answer with the number alone.", "numbers", 32),
    "passage_retrieval_en": (_PARAGRAPH, "numbers", 32),
    "passage_retrieval_zh": ("请回答这个摘要出自哪一段\n{}", "numbers", 32),
    "lcc": ("Write the next line of the code, and nothing else.", "code", 64),
    "repobench-p": ("Write the next line of this code, and nothing else:\n{}", "code", 64),
}
# Scored by words, which Chinese does not separate.
_UNSEGMENTED = ("multifieldqa_zh", "dureader", "vcsum")
# Only the first line of an answer counts.
_ONE_LINE = ("trec", "triviaqa", "samsum", "lsht")


def read(path: Path, data: bytes) -> tuple[Sample, ...]:
    """All samples. Raises InputError for what is malformed, and for sets whose scores need a segmenter of Chinese."""
    return tuple(_sample(record) for record in records(path, data))


def _sample(record: Record) -> Sample:
    name = record.text("dataset").removesuffix("_e")
    if name in _UNSEGMENTED:
        raise record.wrong(f"is of {name}, whose score needs a segmenter of Chinese that kvote does not have")
    if name not in _SETS:
        raise record.wrong(f"is of an unknown data set {name!r}")
    form, score, room = _SETS[name]
    classes = record.texts("all_classes") if score == "classes" else ()
    asked = form.format(record.text("input").strip())
    question = Question(asked, record.texts("answers"), score, room=room, classes=classes, one_line=name in _ONE_LINE)
    return Sample(record.text("context"), (question,))
