"""kvote manages the KV cache of a language model: which tokens are kept, how they are stored, which a query reads.

Names are imported when they are first used, so that ``kvote --help`` does not wait for torch.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from kvote import methods, models
    from kvote.answering import Answer
    from kvote.cache import Cache
    from kvote.conversation import Conversation
    from kvote.document import Document
    from kvote.errors import (
        BusyCacheError,
        CropError,
        InactiveCacheError,
        InputError,
        InterruptedPassError,
        KvoteError,
        MethodError,
        NotFiniteError,
        OutOfMemoryError,
        StorageError,
        UnsupportedModelError,
    )
    from kvote.hf.facts import detach
    from kvote.library.library import Library
    from kvote.method import Method
    from kvote.prepacking import prefill
    from kvote.repeat import read_again
    from kvote.report import LayerReport, Report
    from kvote.rows import Rows
    from kvote.stream import Stream

__version__ = "0.1.0"

_HOME = {
    "Answer": "answering",
    "BusyCacheError": "errors",
    "Cache": "cache",
    "Conversation": "conversation",
    "CropError": "errors",
    "Document": "document",
    "InactiveCacheError": "errors",
    "InputError": "errors",
    "InterruptedPassError": "errors",
    "KvoteError": "errors",
    "LayerReport": "report",
    "Library": "library.library",
    "Method": "method",
    "MethodError": "errors",
    "NotFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "Report": "report",
    "Rows": "rows",
    "StorageError": "errors",
    "Stream": "stream",
    "UnsupportedModelError": "errors",
    "detach": "hf.facts",
    "prefill": "prepacking",
    "read_again": "repeat",
}
# Modules that are part of the interface.
_MODULES = ("methods", "models")

__all__ = [
    "Answer",
    "BusyCacheError",
    "Cache",
    "Conversation",
    "CropError",
    "Document",
    "InactiveCacheError",
    "InputError",
    "InterruptedPassError",
    "KvoteError",
    "LayerReport",
    "Library",
    "Method",
    "MethodError",
    "NotFiniteError",
    "OutOfMemoryError",
    "Report",
    "Rows",
    "StorageError",
    "Stream",
    "UnsupportedModelError",
    "detach",
    "methods",
    "models",
    "prefill",
    "read_again",
]


def __getattr__(name: str) -> typing.Any:
    if name in _MODULES:
        return importlib.import_module(f"kvote.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'kvote' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvote.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
