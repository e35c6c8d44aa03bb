"""One class in every situation: identical, refused, wrong, crashed; a record that JSON can hold."""

from typing import Any

import torch
from transformers import PreTrainedModel

import kvote
from zoo import answers, definition
from zoo.build import build, full_layers

METHODS = {"dense": "dense", "tokenselect": "tokenselect(top_k=4096, sinks=4, window=64)"}


def trial(name: str) -> dict[str, Any]:
    """Everything that is tried with class ``name``."""
    model, error = answers.tried(lambda: build(name))
    if error is not None:
        return {"class": name, "built": False, "reason": said(error)}
    for seed in range(2, 6):
        if varies(model):
            break
        model = build(name, seed=seed)
    record: dict[str, Any] = {"class": name, "built": True, **about(model)}
    natives = {
        situation: answers.tried(lambda s=situation: answers.answer(model, s))
        for situation in answers.situations(model)
    }
    plain, error = natives["plain"]
    if error is not None:
        return {**record, "generates": False, "reason": said(error)}
    again = answers.answer(model, "plain")
    if not torch.equal(plain.logits, again.logits):
        return {**record, "generates": False, "reason": "gives other logits when it is asked again"}
    by_hand, _ = answers.tried(lambda: answers.answer(model, "plain", answers.explicit(model)))
    record |= {"generates": True, "varied": answers.varied(plain)}
    record["unsupported"] = {s: said(error) for s, (_, error) in natives.items() if error is not None}
    record["methods"] = {
        method: {s: outcome(model, spec, s, native) for s, (native, error) in natives.items() if error is None}
        for method, spec in METHODS.items()
    }
    record["streamingllm"] = defined(name, model)
    record["after"] = after(model, plain, by_hand)
    return record


def varies(model: PreTrainedModel) -> bool:
    """Whether greedy tokens vary, so that a wrong one can show; so too if the model answers nothing at all."""
    plain, error = answers.tried(lambda: answers.answer(model, "plain"))
    return error is not None or answers.varied(plain) > 3


def about(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    return {"layers": list(types) if types else getattr(config, "num_hidden_layers", None)}


def outcome(model: PreTrainedModel, spec: str, situation: str, native: answers.Answer) -> dict[str, str]:
    """One method in one situation."""
    other, error = answers.tried(lambda: answers.answer(model, situation, kvote.Cache(model, spec)))
    return judged(error) if error is not None else compared(answers.difference(native, other))


def defined(name: str, model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """StreamingLLM against its definition, in a one-layer model per kind of full-attention layer.

    Where ``model``, which has all kinds of layers, is refused, so is the class.
    """
    _, error = answers.tried(lambda: kvote.Cache(model, definition.SPEC))
    if isinstance(error, kvote.KvoteError):
        return {"all layers": judged(error)}
    found: dict[str, dict[str, str]] = {}
    for layer in full_layers(name)[:2]:
        found[f"layer {layer}"] = _defined(name, layer)
    return found or {"no layer": {"outcome": "not tried", "said": "no layer attends to everything"}}


def _defined(name: str, layer: int) -> dict[str, str]:
    model, error = answers.tried(lambda: build(name, layers=[layer]))
    if error is None:
        _, error = answers.tried(lambda: answers.answer(model, "plain"))
    if error is None:
        steps, error = answers.tried(lambda: definition.expected(model))
    if error is not None:
        return {"outcome": "not tried", "said": said(error)}
    different, error = answers.tried(lambda: definition.compare(model, kvote.Cache(model, definition.SPEC), steps))
    return judged(error) if error is not None else compared(different)


def after(model: PreTrainedModel, plain: answers.Answer, by_hand: answers.Answer | None) -> dict[str, str]:
    """Whether the default cache answers after kvote's as it did before, given by hand too."""
    for before, cache in ((plain, None), (by_hand, answers.explicit)):
        if before is None:
            continue
        now, error = answers.tried(lambda make=cache: answers.answer(model, "plain", make and make(model)))
        if error is not None:
            return {"outcome": "crashed", "said": said(error)}
        if not torch.equal(before.logits, now.logits):
            return {"outcome": "wrong", "said": answers.difference(before, now) or "other logits, within rounding"}
    return {"outcome": "identical"}


def verdict(found: dict[str, dict[str, str]]) -> str:
    """One word for a class and method: the worst of its situations; "partly" if only some are refused."""
    seen = {each["outcome"] for each in found.values()} - {"undecided"} or {"identical"}
    for worst in ("wrong", "crashed"):
        if worst in seen:
            return worst
    if seen <= {"refused", "not tried"}:
        return "refused" if "refused" in seen else "not tried"
    return "partly" if "refused" in seen else "identical"


def compared(difference: str | None) -> dict[str, str]:
    if difference is None:
        return {"outcome": "identical"}
    if difference.startswith(("a tie", "cannot tell")):
        return {"outcome": "undecided", "said": difference}
    return {"outcome": "wrong", "said": difference}


def judged(error: Exception) -> dict[str, str]:
    """An error of kvote's own is a refusal, any other a crash."""
    refused = isinstance(error, kvote.KvoteError)
    return {"outcome": "refused" if refused else "crashed", "said": str(error) if refused else said(error)}


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
