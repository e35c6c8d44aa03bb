"""Method: the answers to kvote's three questions (keep, store, read), and how methods compose.

``a | b`` joins methods that answer different questions. Two answers to one question are refused.
"""

import ast
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ParamSpec

from kvote.calibration.file import Calibration
from kvote.composition import conflict
from kvote.errors import KvoteError, MethodError
from kvote.keep.keeper import Keeper
from kvote.keep.policies import KeepAll
from kvote.needs import Cuts, Keys, Needs
from kvote.read.tokens import Everything, Reader
from kvote.store.raw import Raw
from kvote.store.segment import Store

Parameters = ParamSpec("Parameters")
# The part of each room that leaves the decision to whatever a method is composed with.
_NO_OPINION = {"keep": KeepAll, "store": Raw, "read": Everything}


@dataclass(frozen=True)
class Method:
    """What stays (``keep``), in which form (``store``), and what a query reads (``read``).

    ``spec`` is what the user would write to get it, ``calibrations`` are those it was built from. Raises MethodError
    for parts that make no sense together.
    """

    spec: str = "custom"
    keep: Keeper = field(default_factory=KeepAll)
    store: Store = field(default_factory=Raw)
    read: Reader = field(default_factory=Everything)
    calibrations: tuple[Calibration, ...] = ()

    def __post_init__(self) -> None:
        reason = conflict(self.keep, self.store, self.read)
        if reason is not None:
            raise MethodError(f"{self.spec}: {reason}.")

    @cached_property
    def needs(self) -> Needs:
        """What its parts need together."""
        return self.keep.needs | self.store.needs | self.read.needs

    @cached_property
    def cuts(self) -> Cuts:
        """Where a prefix may be cut without changing what follows."""
        return self.keep.offers.cuts & self.store.offers.cuts & self.read.offers.cuts

    @cached_property
    def unrotated(self) -> bool:
        """Whether keys are held at position 0 and rotated when they are read."""
        return self.needs.keys is Keys.UNROTATED

    @cached_property
    def spans_layers(self) -> bool:
        """Whether what happens in one layer changes what others hold."""
        return self.keep.offers.cascades or self.store.offers.shares_layers

    @property
    def needs_rope(self) -> bool:
        """Whether the model's rotation has to be known."""
        return self.unrotated or self.needs.rotation

    def __or__(self, other: "Method") -> "Method":
        parts: dict[str, Any] = {}
        for room, default in _NO_OPINION.items():
            mine, theirs = getattr(self, room), getattr(other, room)
            if not isinstance(mine, default) and not isinstance(theirs, default):
                raise MethodError(
                    f"{self.spec} and {other.spec} both decide what to {room}; compose methods that answer "
                    "different questions."
                )
            parts[room] = theirs if isinstance(mine, default) else mine
        return Method(f"{self.spec} | {other.spec}", **parts, calibrations=self.calibrations + other.calibrations)


@dataclass(frozen=True)
class Published:
    """One published system: how to build it, where it comes from and what it needs. ``package`` is None for kvote's."""

    name: str
    rooms: str
    source: str
    needs: str
    build: Callable[..., Method]
    package: str | None = None

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.build) or "").split("\n")[0]


METHODS: dict[str, Published] = {}


def published(
    *, rooms: str, source: str, needs: str = "nothing"
) -> Callable[[Callable[Parameters, Method]], Callable[Parameters, Method]]:
    """Registers a function that builds a Method under the function's name, and writes the method's spec.

    Raises MethodError if a function of another module has that name.
    """

    def register(build: Callable[Parameters, Method]) -> Callable[Parameters, Method]:
        name, signature = build.__name__, inspect.signature(build)
        if not build.__module__.startswith("kvote.methods."):
            importlib.import_module("kvote.methods")  # kvote's own come first
        taken = METHODS.get(name)
        if taken is not None and taken.build.__module__ != build.__module__:
            raise MethodError(
                f"{build.__module__} cannot publish a method {name!r}: {taken.build.__module__} has one of that name."
            )

        @functools.wraps(build)
        def with_spec(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Method:
            given = signature.bind(*args, **kwargs).arguments
            told = [f"{key}={value!r}" for key, value in given.items() if value != signature.parameters[key].default]
            return replace(build(*args, **kwargs), spec=f"{name}({', '.join(told)})" if told else name)

        METHODS[name] = Published(name, rooms, source, needs, with_spec)
        return with_spec

    return register


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
    importlib.import_module("kvote.methods")  # every file there registers its method
    plugins = importlib.import_module("kvote.plugins")
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
