"""Prompt: what stands around a document, a question and an answer, from the model's chat template or from nowhere."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvote.errors import InputError

# Stand for texts while a template is rendered; letters alone, so that no template trims or escapes them.
_FIRST, _SECOND, _ANSWER, _NEXT = (f"kvotemarks{name}here" for name in ("document", "question", "answer", "next"))
_GAP = "\n\n"
# Words of a text with which a tokenizer is tried.
_TRIED = 8


@dataclass(frozen=True)
class Layout:
    """Texts of a template: ``before`` the first one that a user gives, ``between`` a document and the question about
    it, ``after`` a question, up to where the answer begins, and ``closing``, from an answer to the next question.
    ``templated``: whether there is a template; without one all of them are empty."""

    before: str = ""
    between: str = ""
    after: str = ""
    closing: str = ""
    templated: bool = False


def layout_of(tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, raw: bool = False) -> Layout:
    """The layout of ``tokenizer``'s chat template with ``system`` as its system message; the empty one if it has none,
    or with ``raw``.

    Raises InputError for a system message without a place, and for a template that cannot be taken apart.
    """
    if system is not None and not isinstance(system, str):
        raise InputError(f"A system message is a text; got a {type(system).__name__}.")
    if raw or not getattr(tokenizer, "chat_template", None):
        if system is not None:
            why = "raw=True goes without the chat template" if raw else "this tokenizer has no chat template"
            raise InputError(f"A system message has no place: {why}; leave it out, or write it into the document.")
        return Layout()
    opening = [] if system is None else [{"role": "system", "content": system}]
    asked = [*opening, {"role": "user", "content": _FIRST + _GAP + _SECOND}]
    before, between, after = _split(_rendered(tokenizer, asked), _FIRST, _SECOND)
    talk = [
        *opening,
        {"role": "user", "content": _FIRST},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]
    _, _, closing, _ = _split(_rendered(tokenizer, talk), _FIRST, _ANSWER, _NEXT)
    return Layout(before, between, after, closing, True)


def document_ids(tokenizer: PreTrainedTokenizerBase, layout: Layout, text: str) -> Tensor:
    """Tokens [1, n] of a prompt up to the end of the document or first message ``text``, with what a tokenizer puts
    in front of a text and without what it puts behind one. White space around it is left out in a template."""
    if layout.templated:
        return _ids(tokenizer(layout.before + text.strip(), return_tensors="pt", add_special_tokens=False))
    ids = _ids(tokenizer(text, return_tensors="pt"))
    return ids[:, : ids.shape[1] - _appended(tokenizer, text)]


def question_ids(tokenizer: PreTrainedTokenizerBase, layout: Layout, question: str, lead: str | None = None) -> Tensor:
    """Tokens [1, n] that follow a document to ask ``question``; ``lead`` stands in place of what is ``between``.

    Raises InputError for what is no text, and for an empty one.
    """
    if not isinstance(question, str):
        raise InputError(f"A question is a text; got a {type(question).__name__}.")
    if not question.strip():
        raise InputError("The question is empty; ask something.")
    lead = layout.between if lead is None else lead
    question = question.strip() if layout.templated else question
    ids = _ids(tokenizer(lead + question + layout.after, return_tensors="pt", add_special_tokens=False))
    if ids.shape[1] == 0:
        raise InputError("The question is empty; ask something.")
    return ids


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: those of the generation config, and the tokenizer's own."""
    found: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(found)


def _ids(encoded: Any) -> Tensor:
    # A tokenizer makes fractions of no tokens.
    ids: Tensor = encoded.input_ids
    return ids.to(torch.long)


def _appended(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """How many tokens the tokenizer puts behind a text, such as an end of sequence: nothing ends here."""
    for word in reversed(text.split()[-_TRIED:]):
        whole, inner = (_row(tokenizer(word, add_special_tokens=special)) for special in (True, False))
        n, most = len(inner), len(whole) - len(inner)
        found = [behind for behind in range(most + 1) if whole[most - behind : most - behind + n] == inner]
        # A word that is itself such a token tells nothing.
        if len(found) == 1:
            return found[0]
    return 0


def _row(encoded: Any) -> list[int]:
    ids = encoded.input_ids
    row: list[int] = ids[0].tolist() if isinstance(ids, Tensor) else list(ids)
    return row


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except ImportError as error:
        raise InputError("Chat templates need jinja2; install it, or go without the template (raw).") from error
    except Exception as error:
        # A template is a program of the model's author's, and says what it likes.
        said = " ".join(str(error).split()) or type(error).__name__
        with_system = " (a system message is among them)" if messages[0]["role"] == "system" else ""
        raise InputError(
            f"The chat template of this model does not take these messages{with_system}: {said}; go without a system "
            "message, or without the template (raw)."
        ) from error
    return str(text)


def _split(text: str, *marks: str) -> list[str]:
    """What stands around the marks, each of which must be there once, in this order."""
    parts, rest = [], text
    for mark in marks:
        part, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise InputError(
                "The chat template of this model does not keep a message as it is, so that no document can be put into "
                "it; go without the template (raw)."
            )
        parts.append(part)
    return [*parts, rest]
