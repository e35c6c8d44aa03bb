"""State: what a stateful part hands out, tensors by name and facts as JSON, and how it is made from them again.

A ``Describer`` walks over a part: numbers, texts, lists and dictionaries are facts; tensors get the name of where they
stand; objects of kvote's own classes are described attribute by attribute if ``kvote.saving.classes`` lists their
class, and refused if not. A ``Maker`` fills a part that was made anew from the model and the method, and makes the
objects that hang on it. Whatever follows from model and method (rotations, kernels, tables) is no state.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from kvote.errors import InputError

# Attributes that have another name in files: files do not change with names in the code.
FILED = {
    "head_groups": "groups",
    "judged": "heard",
    "overall_mass": "everywhere",
    "prompt_left": "ahead",
    "recent_mass": "lately",
    "uncompressed": "raw",
    "right_padded": "holes",
    "scaling": "logits",
    "unrotated": "raw",
}
# Whole numbers in facts: counts, places and positions.
_LARGEST = 2**53
_PLAIN = (bool, str, type(None))
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


class Block(NamedTuple):
    """A tensor that is handed out: its form, and what makes it, when it is wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


Tensors = Mapping[str, Tensor]
# (an object, what describes values, where it stands) -> its facts
Describe = Callable[[Any, "Describer", str], dict[str, Any]]
# (the object, its facts, what makes values)
Fill = Callable[[Any, dict[str, Any], "Maker"], None]


@dataclasses.dataclass(frozen=True)
class Form:
    """How objects of one class are described. ``derived``: attributes that are no state. ``describe`` and ``fill``: for
    a class that has more to say than its attributes, instead of these. ``check``: raises ValueError, with a clause, for
    state that makes no sense."""

    derived: frozenset[str] = frozenset()
    describe: Describe | None = None
    fill: Fill | None = None
    check: Callable[[Any], None] | None = None


class UnknownStateError(InputError):
    """Something is held that kvote does not know how to hand out."""


class Describer:
    """Collects the ``tensors`` of what it describes. ``forms``: by class, with its name."""

    def __init__(self, forms: Mapping[type, tuple[str, Form]]) -> None:
        self.tensors: dict[str, Block] = {}
        self._forms = forms
        self._objects: dict[int, int] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        # Whatever was looked at stays alive, so that no other object gets its identity.
        self._alive: list[Any] = []

    def value(self, value: Any, path: str) -> Any:
        """The facts of anything. Raises InputError for what is no state."""
        if isinstance(value, _PLAIN) or (type(value) is int and abs(value) <= _LARGEST):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"number": repr(value)}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value, path)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if type(value) in self._forms:
            return self.object(value, path)
        if isinstance(value, dict):
            return {"dict": [[self.value(k, path), self.value(v, f"{path}.{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple | set):
            each = [self.value(inner, f"{path}.{i}") for i, inner in enumerate(value)]
            return each if type(value) is list else {"set" if isinstance(value, set) else "tuple": each}
        raise UnknownStateError(
            f"A {type(value).__name__} at {path} cannot be saved; a method of another package lists what it remembers "
            "with kvote.saving.classes.register."
        )

    def tensor(self, tensor: Tensor, path: str) -> str:
        """The name of a tensor, the same for the same one."""
        own = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and own in self._names:
            return self._names[own]
        self._names[own] = path
        self._alive.append(tensor)
        return self.block(path, Block(tuple(tensor.shape), tensor.dtype, lambda: tensor))

    def block(self, path: str, block: Block) -> str:
        self.tensors[path] = block
        return path

    def object(self, value: Any, path: str) -> dict[str, Any]:
        """An object of a listed class; one that was described before is named by its number."""
        if id(value) in self._objects:
            return {"same": self._objects[id(value)]}
        self._objects[id(value)] = len(self._objects)
        self._alive.append(value)
        name, form = self._forms[type(value)]
        facts = (
            self.attributes(value, form.derived, path) if form.describe is None else form.describe(value, self, path)
        )
        return {"object": name, "of": facts}

    def attributes(self, value: Any, derived: frozenset[str], path: str) -> dict[str, Any]:
        held = [(FILED.get(name, name), inner) for name, inner in vars(value).items() if name not in derived]
        return {name: self.value(inner, f"{path}.{name}") for name, inner in held}


class Maker:
    """Makes values from facts and ``tensors``, on ``device``."""

    def __init__(self, forms: Mapping[type, tuple[str, Form]], tensors: Tensors, device: torch.device) -> None:
        self.tensors, self.device = tensors, device
        self._forms = {name: (kind, form) for kind, (name, form) in forms.items()}
        self._objects: list[Any] = []

    def value(self, facts: Any, old: Any = None) -> Any:
        """The value that ``facts`` describe. ``old``: the value there now, which is filled if it is of the same class.

        Raises ValueError for facts that make no sense.
        """
        if isinstance(facts, _PLAIN) or (type(facts) is int and abs(facts) <= _LARGEST) or type(facts) is float:
            return facts
        if isinstance(facts, list):
            olds = old if isinstance(old, list) and len(old) == len(facts) else [None] * len(facts)
            return [self.value(inner, each) for inner, each in zip(facts, olds, strict=True)]
        match facts:
            case {"tensor": str(name)}:
                return self.tensor(name)
            case {"number": "inf" | "-inf" | "nan" as number}:
                return float(number)
            case {"dtype": str(name)} if name in _DTYPES:
                return _DTYPES[name]
            case {"range": [int(start), int(stop), int(step)]} if step:
                return range(start, stop, step)
            case {"dict": list(pairs)} if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                return {key(k): self.value(v) for k, v in pairs}
            case {"tuple": list(inner)}:
                return tuple(self.value(each) for each in inner)
            case {"set": list(inner)}:
                return {key(each) for each in inner}
            case {"same": int(number)} if 0 <= number < len(self._objects):
                return self._objects[number]
            case {"object": str(name), "of": dict(inner)}:
                return self.object(name, inner, old)
        raise ValueError("a fact is of no kind that there is")

    def tensor(self, name: Any) -> Tensor:
        if not isinstance(name, str) or name not in self.tensors:
            raise ValueError("a tensor is named that is not there")
        return self.tensors[name].to(self.device)

    def object(self, name: str, facts: dict[str, Any], old: Any) -> Any:
        if name not in self._forms:
            raise ValueError(f"there is no part called {name[:40]!r}")
        kind, form = self._forms[name]
        frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        fresh = type(old) is not kind or frozen
        if fresh and not dataclasses.is_dataclass(kind):
            raise ValueError(f"a {name} stands where this method has none")
        made = object.__new__(kind) if fresh else old
        self._objects.append(made)
        if form.fill is None:
            self.attributes(made, facts, form.derived, fresh)
        else:
            form.fill(made, facts, self)
        if form.check is not None:
            form.check(made)
        return made

    def attributes(self, made: Any, facts: dict[str, Any], derived: frozenset[str], fresh: bool) -> None:
        """Sets attributes: of an object made here all that its class has, of another one only such as it has."""
        known = {f.name for f in dataclasses.fields(made)} if fresh else set(vars(made))
        named = {FILED.get(name, name): name for name in known - derived}
        if facts.keys() - named.keys() or (fresh and named.keys() - facts.keys()):
            raise ValueError(f"a {type(made).__name__} has other attributes than {', '.join(sorted(facts))}"[:200])
        hints = _hints(type(made))
        for filed, inner in facts.items():
            name = named[filed]
            old = None if fresh else getattr(made, name)
            new = self.value(inner, old)
            if not _fits(new, hints.get(name, type(old) if type(old) in (bool, int) else Any)):
                raise ValueError(f"{name} of a {type(made).__name__} is a {type(new).__name__}")
            object.__setattr__(made, name, new)
        if fresh:
            for field in dataclasses.fields(made):
                if field.name in derived and field.default is not dataclasses.MISSING:
                    object.__setattr__(made, field.name, field.default)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike, also where they hold what is no number."""
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    return bool(torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (one, other))))


def key(facts: Any) -> int | str:
    """A dictionary key or member of a set: a whole number or a text. Raises ValueError for others."""
    if isinstance(facts, str) or type(facts) is int:
        return facts
    raise ValueError("a key is neither a number nor a text")


def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except (NameError, TypeError):
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a class declares, as far as that can be told."""
    inner = getattr(hint, "__args__", ())
    origin = getattr(hint, "__origin__", None)
    if origin in (list, set) and inner:
        return isinstance(value, origin) and all(_fits(each, inner[0]) for each in value)
    if origin is dict and inner:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if inner and (origin is None or "Union" in str(origin)):
        return any(_fits(value, each) for each in inner)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool, str, Tensor, range, torch.dtype):
        return type(value) is hint or (hint is Tensor and isinstance(value, Tensor))
    if hint is type(None):
        return value is None
    return True
