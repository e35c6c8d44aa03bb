"""Answers in OpenAI's shapes, whole and as server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvote.serve.errors import ApiError
from kvote.serve.job import Piece
from kvote.serve.sampling import Chosen
from kvote.serve.service import Answer, Running


def event(data: Any, name: str | None = None) -> str:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


def _base(kind: str, prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


# Chat completions.


async def chat(running: Running, model: str, tokenizer: PreTrainedTokenizerBase, tools: bool) -> dict[str, Any]:
    """A chat completion, whole."""
    answers = await running.answers()
    choices = []
    for index, answer in enumerate(answers):
        message, calls = _message(tokenizer, answer, tools)
        choices.append(
            {
                "index": index,
                "message": message,
                "finish_reason": "tool_calls" if calls else answer.reason,
                "logprobs": _chat_logprobs(answer.pieces, tokenizer),
            }
        )
    return {**_base("chat.completion", "chatcmpl", model), "choices": choices, "usage": running.usage}


async def chat_events(
    running: Running, model: str, tokenizer: PreTrainedTokenizerBase, with_usage: bool, choices: int
) -> AsyncIterator[str]:
    """The same as it comes."""
    base = _base("chat.completion.chunk", "chatcmpl", model)

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return event({**base, "choices": [choice]})

    for index in range(choices):
        yield chunk(index, {"role": "assistant", "content": ""})
    try:
        async for piece in running.pieces():
            logprobs = _chat_logprobs([piece], tokenizer)
            if piece.text or logprobs:
                yield chunk(piece.choice, {"content": piece.text}, None, logprobs)
            if piece.reason is not None:
                yield chunk(piece.choice, {}, piece.reason)
    except ApiError as error:
        yield event(error.body)
        return
    if with_usage:
        yield event({**base, "choices": [], "usage": running.usage})
    yield event("[DONE]")


def _message(tokenizer: PreTrainedTokenizerBase, answer: Answer, tools: bool) -> tuple[dict[str, Any], bool]:
    """The assistant's message, and whether it calls tools, by the response schema that comes with the tokenizer."""
    plain = {"role": "assistant", "content": answer.text, "refusal": None}
    if not tools or getattr(tokenizer, "response_schema", None) is None:
        return plain, False
    try:
        parsed = tokenizer.parse_response([piece.chosen.token for piece in answer.pieces if piece.chosen])
    except Exception:
        return plain, False
    calls = parsed.get("tool_calls") if isinstance(parsed, dict) else None
    if not calls:
        return plain, False
    told = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        told.append(
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {
                    "name": function.get("name", ""),
                    "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
                },
            }
        )
    return {**plain, "content": parsed.get("content"), "tool_calls": told}, True


def _chat_logprobs(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    chosen = [piece.chosen for piece in pieces if piece.chosen is not None and piece.chosen.logprob is not None]
    if not chosen:
        return None
    return {"content": [_token(one, tokenizer) for one in chosen], "refusal": None}


def _token(chosen: Chosen, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    def one(token: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.decode([token])
        # JSON has no infinity.
        return {"token": text, "logprob": max(float(logprob or 0), -9999.0), "bytes": list(text.encode())}

    return {**one(chosen.token, chosen.logprob), "top_logprobs": [one(*pair) for pair in chosen.top]}


# Text completions.


async def completion(running: Running, model: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A text completion, whole."""
    answers = await running.answers()
    choices = [
        {
            "index": index,
            "text": answer.text,
            "finish_reason": answer.reason,
            "logprobs": _completion_logprobs(answer.pieces, tokenizer),
        }
        for index, answer in enumerate(answers)
    ]
    return {**_base("text_completion", "cmpl", model), "choices": choices, "usage": running.usage}


async def completion_events(
    running: Running, model: str, tokenizer: PreTrainedTokenizerBase, with_usage: bool
) -> AsyncIterator[str]:
    """The same as it comes."""
    base = _base("text_completion", "cmpl", model)
    try:
        async for piece in running.pieces():
            choice = {
                "index": piece.choice,
                "text": piece.text,
                "finish_reason": piece.reason,
                "logprobs": _completion_logprobs([piece], tokenizer),
            }
            yield event({**base, "choices": [choice]})
    except ApiError as error:
        yield event(error.body)
        return
    if with_usage:
        yield event({**base, "choices": [], "usage": running.usage})
    yield event("[DONE]")


def _completion_logprobs(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    chosen = [piece.chosen for piece in pieces if piece.chosen is not None and piece.chosen.logprob is not None]
    if not chosen:
        return None
    told = [_token(one, tokenizer) for one in chosen]
    offsets, at = [], 0
    for one in told:
        offsets.append(at)
        at += len(one["token"])
    return {
        "tokens": [one["token"] for one in told],
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [{top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in told],
        "text_offset": offsets,
    }


# Responses.


def _response(base: dict[str, Any], item: str, text: str, status: str, running: Running) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    output = [{"type": "message", "id": item, "status": status, "role": "assistant", "content": [part]}]
    usage = running.usage
    done = status != "in_progress"
    return {
        **base,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": output if done else [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
            "kv": usage["kv"],
        }
        if done
        else None,
    }


def _response_base(model: str) -> tuple[dict[str, Any], str]:
    made = {"id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": int(time.time()), "model": model}
    return made, f"msg_{secrets.token_hex(12)}"


async def response(running: Running, model: str) -> dict[str, Any]:
    """A response, whole."""
    base, item = _response_base(model)
    answer = (await running.answers())[0]
    status = "incomplete" if answer.reason == "length" else "completed"
    return _response(base, item, answer.text, status, running)


async def response_events(running: Running, model: str) -> AsyncIterator[str]:
    """The same as it comes."""
    base, item = _response_base(model)
    number = 0

    def one(kind: str, **facts: Any) -> str:
        nonlocal number
        number += 1
        return event({"type": kind, "sequence_number": number - 1, **facts}, kind)

    place = {"item_id": item, "output_index": 0, "content_index": 0}
    begun = _response(base, item, "", "in_progress", running)
    message = {"type": "message", "id": item, "role": "assistant", "status": "in_progress", "content": []}
    empty = {"type": "output_text", "text": "", "annotations": []}
    yield one("response.created", response=begun)
    yield one("response.in_progress", response=begun)
    yield one("response.output_item.added", output_index=0, item=message)
    yield one("response.content_part.added", **place, part=empty)
    text, status = "", "completed"
    try:
        async for piece in running.pieces():
            text += piece.text
            status = "incomplete" if piece.reason == "length" else status
            if piece.text:
                yield one("response.output_text.delta", **place, delta=piece.text, logprobs=[])
    except ApiError as error:
        yield one("error", **error.body["error"])
        return
    whole = _response(base, item, text, status, running)
    part = whole["output"][0]["content"][0]
    yield one("response.output_text.done", **place, text=text, logprobs=[])
    yield one("response.content_part.done", **place, part=part)
    yield one("response.output_item.done", output_index=0, item=whole["output"][0])
    yield one(f"response.{status}", response=whole)
