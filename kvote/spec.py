"""Specs: methods as text, such as ``tokenselect(top_k=512)`` or ``a | b(x=1)``, and methods by name."""

import ast
import difflib
import inspect
from typing import Any

import kvote.methods  # noqa: F401  (each file there registers its method)
from kvote import plugins
from kvote.errors import KvoteError, MethodError
from kvote.method import METHODS, Method, Published


def parse(spec: str) -> Method:
    """Builds the method that a spec such as ``"tokenselect(top_k=512)"`` or ``"a | b(x=1)"`` describes.

    Only names of methods, literal keyword arguments and ``|`` are understood; nothing is evaluated. Raises
    MethodError for anything else, and InputError for a file that a method cannot be built from.
    """
    try:
        return _build(ast.parse(spec.strip(), mode="eval").body, spec)
    except KvoteError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise MethodError(f"{spec!r} is not a method; write for example tokenselect(top_k=512).") from None


def _build(node: ast.expr, spec: str) -> Method:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _build(left, spec) | _build(right, spec)
        case ast.Name(id=name):
            return _call(name, {})
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords) if all(k.arg for k in keywords):
            try:
                parameters = {str(k.arg): ast.literal_eval(k.value) for k in keywords}
            except (ValueError, TypeError):
                raise MethodError(f"Parameters of {name} must be plain numbers or strings, in {spec!r}.") from None
            if len(parameters) < len(keywords):
                raise MethodError(f"{name} is given a parameter twice, in {spec!r}.")
            return _call(name, parameters)
    raise MethodError(f"{spec!r} is not a method; write for example tokenselect(top_k=512), with named parameters.")


def find(name: str) -> Published:
    """The method of that name, kvote's or another package's. Raises MethodError if there is none, or it is broken."""
    if name not in METHODS and not plugins.load(name):
        known = sorted({*METHODS, *plugins.names()})
        near = difflib.get_close_matches(name, known, 3)
        others = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
        raise MethodError(f"There is no method {name!r}; {others}")
    return METHODS[name]


def _call(name: str, parameters: dict[str, Any]) -> Method:
    build = find(name).build
    known = inspect.signature(build).parameters
    for parameter in parameters:
        if parameter not in known:
            raise MethodError(f"{name} has no parameter {parameter!r}; it has {', '.join(known) or 'none'}.")
    try:
        return build(**parameters)
    except TypeError as error:
        raise MethodError(f"{name}: a parameter has the wrong type ({error}).") from None
