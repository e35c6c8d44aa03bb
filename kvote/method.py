"""Method: the answers to kvote's three questions (keep, store, read), and how methods compose.

``a | b`` joins methods that answer different questions. Two answers to one question are refused.
"""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from kvote.errors import MethodError
from kvote.keep.policies import KeepAll, Keeper
from kvote.read.tokens import Everything, Reader


@dataclass(frozen=True)
class Method:
    """What stays (``keep``) and what a query reads (``read``); tokens are stored as the model made them.

    ``spec`` is what the user would write to get it. Every layer gets the same parts.
    """

    spec: str
    keep: Keeper = field(default_factory=KeepAll)
    read: Reader = field(default_factory=Everything)

    def __or__(self, other: "Method") -> "Method":
        for room, default in (("keep", KeepAll), ("read", Everything)):
            mine, theirs = getattr(self, room), getattr(other, room)
            if not isinstance(mine, default) and not isinstance(theirs, default):
                raise MethodError(
                    f"{self.spec} and {other.spec} both decide what to {room}; compose methods that answer "
                    "different questions."
                )
        keep = other.keep if isinstance(self.keep, KeepAll) else self.keep
        read = other.read if isinstance(self.read, Everything) else self.read
        return replace(self, spec=f"{self.spec} | {other.spec}", keep=keep, read=read)


@dataclass(frozen=True)
class Published:
    """One published system: how to build it, where it comes from and what it needs."""

    name: str
    rooms: str
    source: str
    needs: str
    build: Callable[..., Method]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.build) or "").split("\n")[0]


METHODS: dict[str, Published] = {}


def published(
    *, rooms: str, source: str, needs: str = "nothing"
) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Registers a function that builds a Method under the function's name."""

    def register(build: Callable[..., Method]) -> Callable[..., Method]:
        METHODS[build.__name__] = Published(build.__name__, rooms, source, needs, build)
        return build

    return register


def spec_of(name: str, **parameters: Any) -> str:
    """The spec string of a method call, e.g. ``tokenselect(top_k=512)``."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in parameters.items())})"


def parse(spec: str) -> Method:
    """Builds the method that a spec such as ``"tokenselect(top_k=512)"`` or ``"a | b(x=1)"`` describes.

    Only names of methods, literal keyword arguments and ``|`` are understood; nothing is evaluated. Raises
    MethodError for anything else.
    """
    try:
        return _build(ast.parse(spec.strip(), mode="eval").body, spec)
    except MethodError:
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


def _call(name: str, parameters: dict[str, Any]) -> Method:
    if name not in METHODS:
        raise MethodError(f"There is no method {name!r}; there are {', '.join(sorted(METHODS))}.")
    build = METHODS[name].build
    known = inspect.signature(build).parameters
    for parameter in parameters:
        if parameter not in known:
            raise MethodError(f"{name} has no parameter {parameter!r}; it has {', '.join(known) or 'none'}.")
    try:
        return build(**parameters)
    except TypeError as error:
        raise MethodError(f"{name}: a parameter has the wrong type ({error}).") from None
