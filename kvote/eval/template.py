"""How document and question are put to a model: in its chat template if it has one."""

from dataclasses import dataclass
from typing import Any

from kvote.eval.sample import Question
from kvote.prompt import layout_of


@dataclass(frozen=True)
class Template:
    """Text before the document, between it and the question, before the answer, and between an answer and the next
    question of a conversation."""

    before: str
    between: str
    after: str
    next: str
    chat: bool

    def opening(self, document: str) -> str:
        """All that can be read before the question is known."""
        return f"{self.before}{document}"

    def asking(self, question: Question) -> str:
        """What follows the document, up to where the model answers."""
        gap = "" if self.chat or not question.lead else " "
        return f"{self.between}{question.text}{self.after}{gap}{question.lead}"


def template_of(tokenizer: Any, *, raw: bool = False, plain: bool = False) -> Template:
    """The tokenizer's chat template around a document and a question in one message of the user; without one, or with
    ``raw``, 'Question' and 'Answer' are written before them. ``plain``: nothing but a space between."""
    if plain:
        return Template("", " ", "", " ", chat=False)
    if raw or not getattr(tokenizer, "chat_template", None):
        return Template("", "\n\nQuestion: ", "\nAnswer:", "\n\nQuestion: ", chat=False)
    layout = layout_of(tokenizer)
    return Template(layout.before, layout.between, layout.after, layout.closing, chat=True)
