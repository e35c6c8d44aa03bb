"""Functions at which a compiled model's graph breaks, so that kvote's code runs as it is."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Keeps ``function`` out of compiled graphs: attributes set on tensors, and locks, do not survive tracing. Where
    nothing is compiled it costs a question, which ``torch.compiler.disable`` alone does not."""
    apart = torch.compiler.disable(function)  # type: ignore[no-untyped-call]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (apart if torch.compiler.is_compiling() else function)(*args, **kwargs)

    plain: Any = run
    return plain
