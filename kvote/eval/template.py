"""How document and question are put to a model: in its chat template if it has one."""

from dataclasses import dataclass
from typing import Any

from kvote.errors import InputError
from kvote.eval.sample import Question

_DOCUMENT, _QUESTION = "\u2402document\u2403", "\u2402question\u2403"
# A turn that follows another: what closes the first, and what opens the next.
_ANSWER = "\u2402answer\u2403"


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
        lead = question.lead if not self.chat or not question.lead else f"{question.lead}"
        gap = "" if self.chat or not lead else " "
        return f"{self.between}{question.text}{self.after}{gap}{lead}"


def template_of(tokenizer: Any, *, raw: bool = False, plain: bool = False) -> Template:
    """The tokenizer's chat template around a document and a question in one message of the user; without one, or with
    ``raw``, 'Question' and 'Answer' are written before them. ``plain``: nothing but a space between."""
    if plain:
        return Template("", " ", "", " ", chat=False)
    if raw or not getattr(tokenizer, "chat_template", None):
        return Template("", "\n\nQuestion: ", "\nAnswer:", "\n\nQuestion: ", chat=False)
    content = f"{_DOCUMENT}\n\n{_QUESTION}"
    talk = [{"role": "user", "content": content}]
    more = [*talk, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _QUESTION}]
    try:
        one = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        two = tokenizer.apply_chat_template(more, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise InputError(f"The chat template of this model fails ({error}); use --raw.") from error
    if one.count(_DOCUMENT) != 1 or one.count(_QUESTION) != 1 or _ANSWER not in two:
        raise InputError("The chat template of this model does not keep what the user says as it is; use --raw.")
    before, rest = one.split(_DOCUMENT)
    between, after = rest.split(_QUESTION)
    following = two.split(_ANSWER)[1].split(_QUESTION)[0]
    return Template(before, between, after, following, chat=True)
