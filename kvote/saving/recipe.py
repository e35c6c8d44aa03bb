"""How a file names the method that its cache follows: the spec, and the calibrations that it was built from. Paths are
never followed: where a spec names a file, the calibration itself is stored."""

import ast
import functools
import inspect
import json
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from kvote.calibration.file import Calibration, restored
from kvote.calibration.file import facts as facts_of
from kvote.errors import KvoteError, MethodError
from kvote.method import Method
from kvote.spec import find
from kvote.store.offloaded import Offloaded

_LONGEST = 10_000


def describe(method: Method) -> dict[str, Any]:
    """The method as facts, among them how it is built, unless it is not one that kvote can build from facts."""
    build_from = spec = spec_of(method)
    for calibration in method.calibrations:
        build_from = build_from.replace(repr(calibration), "None", 1)
    facts = {
        "spec": spec,
        "build": build_from,
        "calibrations": [facts_of(calibration) for calibration in method.calibrations],
    }
    try:
        made = build(json.loads(json.dumps(facts)), [calibration.name for calibration in method.calibrations])
    except (KvoteError, ValueError, TypeError):
        return {"spec": spec}
    same = (made.keep, made.store, made.read) == (method.keep, method.store, method.read)
    return facts if same else {"spec": spec}


def spec_of(method: Method) -> str:
    """The spec of a method without paths: a calibration is named as one that was given without a file, a folder not at
    all."""
    spec = method.spec
    for calibration in method.calibrations:
        spec = spec.replace(repr(calibration.name), repr(calibration), 1)
    if isinstance(method.store, Offloaded):
        told = f"folder={method.store.folder!r}"
        spec = spec.replace(f"{told}, ", "").replace(told, "").replace("offload()", "offload")
    return spec


def same(one: Method, other: Method) -> bool:
    """Whether two methods do the same, wherever their calibrations came from and their files lie."""
    if one.calibrations or other.calibrations:
        mine, theirs = ([facts_of(calibration) for calibration in m.calibrations] for m in (one, other))
        return spec_of(one) == spec_of(other) and mine == theirs
    return replace(one, spec=spec_of(one)) == replace(other, spec=spec_of(other))


def build(facts: Any, names: Sequence[str] = ()) -> Method:
    """The method again. ``names``: how errors call its calibrations. Raises MethodError for what is none, and for a
    method that is not kvote's own."""
    match facts:
        case {"spec": str(spec), "build": str(build_from), "calibrations": list(held)} if len(build_from) <= _LONGEST:
            pass
        case {"spec": str(spec)}:
            raise MethodError(f"The file does not say how {spec[:100]!r} is built; give method=.")
        case _:
            raise MethodError("The file names no method; give method=.")
    called = [*names, *["the saved calibration"] * len(held)]
    given = [restored(each, name) for each, name in zip(held, called, strict=False)]
    try:
        parts = _parts(ast.parse(build_from.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MethodError("The file names no method; give method=.") from error
    made = [_call(name, parameters, given) for name, parameters in parts]
    if given:
        raise MethodError("The file holds a calibration that its method does not use.")
    return replace(functools.reduce(operator.or_, made), spec=spec)


def _parts(node: ast.expr) -> list[tuple[str, dict[str, Any]]]:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _parts(left) + _parts(right)
        case ast.Name(id=name):
            return [(name, {})]
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return [(name, {str(k.arg): ast.literal_eval(k.value) for k in keywords})]
    raise ValueError("no method")


def _call(name: str, parameters: dict[str, Any], calibrations: list[Calibration]) -> Method:
    published = find(name)
    if not published.build.__module__.startswith("kvote.methods."):
        raise MethodError(f"{name} is a method of another package; give method=.")
    if "folder" in parameters:
        raise MethodError(f"The file names a folder for {name}, and no path from a file is followed; give method=.")
    for parameter, held in inspect.signature(published.build).parameters.items():
        if Calibration in get_args(held.annotation) and parameter in parameters:
            if not calibrations:
                raise MethodError(f"The file does not hold the calibration that {name} needs.")
            parameters[parameter] = calibrations.pop(0)
    try:
        return published.build(**parameters)
    except TypeError as error:
        raise MethodError(f"{name}: the file gives a parameter that it does not take ({error}).") from None
