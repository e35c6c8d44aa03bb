"""What a cache is made for: a loaded model and a method."""

from typing import Any

import torch

from kvote.errors import InputError, MethodError
from kvote.method import Method
from kvote.spec import parse


def checked(model: Any, method: Any) -> Method:
    """The method itself. Raises InputError for what is no loaded model, and MethodError for what is no method."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        name = repr(model) if isinstance(model, str) else "'...'"
        raise InputError(
            f"A cache is made for a loaded model, such as AutoModelForCausalLM.from_pretrained({name}); got "
            f"{_short(model)}."
        )
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise InputError(
            "The model is in training with gradient checkpointing, where transformers takes its cache away; call "
            "model.eval() first."
        )
    method = parse(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        call = f"; call it: {method.__name__}()" if callable(method) and hasattr(method, "__name__") else ""
        raise MethodError(
            f"method is a spec such as 'tokenselect(top_k=512)', or what a function of kvote.methods returns{call}; "
            f"got {_short(method)}."
        )
    return method


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
