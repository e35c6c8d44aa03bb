"""Method: the answers to kvote's three questions (keep, store, read), and how methods compose.

``a | b`` joins methods that answer different questions. Two answers to one question are refused.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ParamSpec

from kvote.calibration.file import Calibration
from kvote.composition import conflict
from kvote.errors import MethodError
from kvote.keep.keeper import Keeper
from kvote.keep.policies import KeepAll
from kvote.needs import Cuts, Keys, Needs
from kvote.read.in_prompts import joined
from kvote.read.reader import Everything, Reader
from kvote.store.segment import Store
from kvote.store.uncompressed import Uncompressed

Parameters = ParamSpec("Parameters")
# The part of each room that leaves the decision to whatever a method is composed with.
_NO_OPINION = {"keep": KeepAll, "store": Uncompressed, "read": Everything}
_OWN = Path(__file__).parent / "methods"


@dataclass(frozen=True)
class Method:
    """The three answers: what stays (``keep``), in which form (``store``), and what a query reads (``read``).

    ``spec`` is what the user would write to get it, ``calibrations`` are those it was built from. Raises MethodError
    for parts that make no sense together.
    """

    spec: str = "custom"
    keep: Keeper = field(default_factory=KeepAll)
    store: Store = field(default_factory=Uncompressed)
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
            both = not isinstance(mine, default) and not isinstance(theirs, default)
            parts[room] = theirs if isinstance(mine, default) else mine
            if both and room == "read":
                # One of prompts and one of generated tokens.
                parts[room], both = joined(mine, theirs), joined(mine, theirs) is None
            if both:
                raise MethodError(
                    f"{self.spec} and {other.spec} both decide what to {room}; compose methods that answer "
                    "different questions."
                )
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
        taken = METHODS[name].build.__module__ if name in METHODS else build.__module__
        # kvote's own are files of their names, whether they have been imported yet or not.
        if name.isidentifier() and (_OWN / f"{name}.py").exists():
            taken = f"kvote.methods.{name}"
        if taken != build.__module__:
            raise MethodError(f"{build.__module__} cannot publish a method {name!r}: {taken} has one of that name.")

        @functools.wraps(build)
        def with_spec(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Method:
            given = signature.bind(*args, **kwargs).arguments
            told = [f"{key}={value!r}" for key, value in given.items() if value != signature.parameters[key].default]
            return replace(build(*args, **kwargs), spec=f"{name}({', '.join(told)})" if told else name)

        METHODS[name] = Published(name, rooms, source, needs, with_spec)
        return with_spec

    return register
