"""kvote manages the KV cache of a language model: which tokens are kept, how they are stored, which a query reads."""

from kvote import methods
from kvote.cache import Cache
from kvote.document import Answer, Document
from kvote.errors import (
    CropError,
    InactiveCacheError,
    InputError,
    KvoteError,
    MethodError,
    UnsupportedModelError,
)
from kvote.method import Method
from kvote.report import LayerReport, Report

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Cache",
    "CropError",
    "Document",
    "InactiveCacheError",
    "InputError",
    "KvoteError",
    "LayerReport",
    "Method",
    "MethodError",
    "Report",
    "UnsupportedModelError",
    "methods",
]
