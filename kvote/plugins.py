"""Methods of other packages, found by the entry point group ``kvote.methods``.

Nothing of them is imported before it is needed: a method is loaded when a spec names it, all of them when they are
listed. kvote's own methods never depend on what else is installed.
"""

import functools
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kvote.errors import KvoteError, MethodError
from kvote.method import METHODS, Method, Published

GROUP = "kvote.methods"


def names() -> list[str]:
    """The names of methods that other packages offer, whether they can be loaded or not."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load(name: str) -> bool:
    """Registers the method that a package offers under ``name``; False if none does.

    Raises MethodError, naming the package, if it cannot be loaded, is no method, or has a name that is taken.
    """
    offered = {_package(point): point for point in entry_points(group=GROUP) if point.name == name}
    if not offered:
        return False
    if len(offered) > 1:
        raise MethodError(f"The packages {' and '.join(sorted(offered))} both offer a method {name!r}; uninstall one.")
    ((package, point),) = offered.items()
    known = METHODS.get(name)
    if known is not None and known.package == package:
        return True
    # What a program has imported by itself is registered already, and its package not yet known.
    if known is not None and (known.package is not None or known.build.__module__.startswith("kvote.methods.")):
        raise MethodError(
            f"The package {package} offers a method {name!r}, and that name is taken by {known.package or 'kvote'}."
        )
    METHODS[name] = _registered(point, package)
    return True


def load_all() -> list[str]:
    """Registers whatever can be loaded, and says of everything else why it cannot: sentences that name the package."""
    return [problem for name in names() if (problem := _problem(name)) is not None]


def _problem(name: str) -> str | None:
    try:
        load(name)
    except MethodError as error:
        return str(error)
    return None


def _registered(point: EntryPoint, package: str) -> Published:
    before = dict(METHODS)
    try:
        build = point.load()
        made = METHODS.get(point.name)
        if made is None or made.build is not build:
            raise TypeError(f"{point.value} is not a function decorated with kvote.method.published")
    except (Exception, SystemExit) as error:
        # Their module may have registered methods before it failed.
        METHODS.clear()
        METHODS.update(before)
        raise MethodError(
            f"The method {point.name!r} of the package {package} cannot be loaded: {_said(error)}."
        ) from error
    return replace(made, build=_guarded(made, package), package=package)


def _guarded(made: Published, package: str) -> Any:
    """The function of a method with every failure turned into a MethodError."""

    @functools.wraps(made.build)
    def build(*args: Any, **kwargs: Any) -> Method:
        try:
            return made.build(*args, **kwargs)
        except KvoteError:
            raise
        except Exception as error:
            raise MethodError(f"{made.name} of the package {package} cannot be built: {_said(error)}.") from error

    return build


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".: ")
