"""From messages to tokens."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvote.prompt import Layout, document_ids
from kvote.serve.errors import ApiError
from kvote.serve.schema import Message, Tool

# Stands for what follows a document in its message.
_MARK = "\u2063kvote\u2063"


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
    """A conversation as the model's template writes it, up to where the answer begins. Raises ApiError if it cannot."""
    if not tokenizer.chat_template:
        if tools:
            raise ApiError(400, "This model has no chat template, so it cannot be told of tools.", param="tools")
        return "\n\n".join(message.text for message in messages)
    told: list[dict[str, Any]] = []
    for message in messages:
        one: dict[str, Any] = {"role": _role(message.role), "content": message.text}
        if message.tool_calls:
            one["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        if message.tool_call_id:
            one["tool_call_id"] = message.tool_call_id
        told.append(one)
    try:
        text = tokenizer.apply_chat_template(
            told,
            tools=[tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
            add_generation_prompt=True,
            tokenize=False,
        )
    except Exception as error:
        raise ApiError(400, f"The model's chat template refuses these messages: {error}", param="messages") from error
    return str(text)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, begins: bool, known: int) -> list[int]:
    """Tokens of ``text``; with ``begins``, after what a tokenizer puts in front of a text. Raises ApiError for a text
    that the model cannot read."""
    try:
        ids: list[int] = (
            document_ids(tokenizer, Layout(), text)[0].tolist()
            if begins
            else tokenizer(text, add_special_tokens=False).input_ids
        )
    except Exception as error:
        raise ApiError(400, f"The tokenizer cannot read this text: {error}") from error
    if any(token >= known for token in ids):
        raise ApiError(400, f"The text has a token that the model does not know; it knows {known:,}.")
    return ids


def document_text(tokenizer: PreTrainedTokenizerBase, document: str, system: str | None) -> str:
    """The part of a document's prompt that is read before anyone asks: the template up to where a question stands
    behind it."""
    messages = [Message(role="user", content=f"{document}\n\n{_MARK}")]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    return chat_text(tokenizer, messages, None).split(_MARK)[0]


def behind_document(
    tokenizer: PreTrainedTokenizerBase, document: str, system: str | None, read: str, messages: Sequence[Message]
) -> str:
    """What follows a document of which ``read`` has been read, if ``messages`` are about it. Raises ApiError for
    messages that do not go on where that ends."""
    told = [message.model_copy() for message in messages]
    if told[0].role in ("system", "developer"):
        if told[0].text != (system or ""):
            raise ApiError(
                400,
                "The system message stands before the document; give it as `system` where the document is made.",
                param="messages",
            )
        told.pop(0)
    if not told or told[0].role != "user":
        raise ApiError(400, "The first message about a document must be the user's.", param="messages")
    told[0].content = f"{document}\n\n{told[0].text}"
    if system is not None:
        told.insert(0, Message(role="system", content=system))
    text = chat_text(tokenizer, told, None)
    if not text.startswith(read):
        raise ApiError(400, "The model's chat template changes the document in this conversation.", param="messages")
    return text[len(read) :]


def _role(role: str) -> str:
    return "system" if role == "developer" else role
