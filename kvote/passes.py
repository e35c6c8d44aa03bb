"""Passes: all layers of a cache go through a forward pass, or none; and one thread at a time uses a cache."""

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

from torch import Tensor

from kvote.errors import BusyCacheError, InputError, InterruptedPassError
from kvote.keep.observation import Observation

P = ParamSpec("P")
R = TypeVar("R")

_handing_over = threading.Lock()


class Checkpoint(NamedTuple):
    """The state of a layer before a pass; ``held`` is the segment's own checkpoint, None where there was no segment
    yet."""

    held: Any
    memory: Any
    waiting: list[Observation]
    activity: dict[str, Any]
    columns: Tensor | None
    numbers: tuple[int, int, int, bool, bool]
    changes: int


class Part(Protocol):
    """A part of a cache that a pass changes: a layer, or the heads of one that are kept apart."""

    def checkpoint(self) -> Checkpoint:
        """Makes the checkpoint that ``restore`` needs. Cheap: a decode step makes one for every layer."""
        ...

    def restore(self, checkpoint: Checkpoint) -> bool:
        """Goes back to ``checkpoint``; False if something was dropped or encoded since, so that it cannot."""
        ...


@dataclass
class Passes:
    """Shared by the layers of a cache. ``corrupt``: a change was interrupted and could not be taken back, so what the
    layers hold is worth nothing any more. ``thread`` used the cache last. ``held``: bytes of all layers when they were
    last counted, ``peak`` the most they ever were. ``repeats``: slots, by sequence, of the tokens that the pass at work
    reads again."""

    corrupt: bool = False
    # Whether the model has native layers whose states an interrupted pass leaves changed.
    has_native_states: bool = False
    thread: int = 0
    # The batch of several caches that this one has joined, as a weak reference.
    joined: Any = None
    # Held while a layer changes, where caches share pages; None: this one has its own.
    lock: Any = None
    held: int = 0
    peak: int = 0
    repeats: Sequence[range] | None = None
    # The layer that a pass through layers with such states has reached, and what it has updated in the first one.
    reached: int | None = None
    updated: set[str] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        """Copies stand alone."""
        return {**vars(self), "joined": None, "lock": None}

    @property
    def batch(self) -> Any:
        """The batch of several caches that this one has joined, None where there is none."""
        return None if self.joined is None else self.joined()

    def begin_anew(self) -> None:
        """Nothing is held any more."""
        self.peak = self.held
        self.reached = None
        self.updated.clear()

    def reach(self, layer: int, state: str, first: int, last: int) -> bool:
        """Notes that ``state`` of ``layer`` is updated; False if that begins a pass and the one before ended early."""
        if layer == first and (self.reached != first or state in self.updated):
            if self.reached not in (None, last):
                return False
            self.updated.clear()
        if layer == first:
            self.updated.add(state)
        self.reached = layer
        return True

    def hold(self, more: int) -> None:
        """Counts ``more`` bytes."""
        self.held += more
        self.peak = max(self.peak, self.held)

    def check(self) -> None:
        """Raises InterruptedPassError if the layers hold nothing that can be relied on."""
        if self.corrupt:
            raise InterruptedPassError(
                "This cache was interrupted while something changed that cannot be taken back (tokens were dropped, "
                "encoded or moved, or native layers overwrote their states); "
                "call cache.reset() and feed the text again."
            )

    def whole(self, parts: Sequence[Part], run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls ``run`` and returns its result. Whatever interrupts it, all of ``parts`` are as they were before, or
        ``corrupt`` is set.

        Raises InterruptedPassError as ``check``.
        """
        if self.lock is not None:
            with self.lock:
                return self._whole(parts, run, *args, **kwargs)
        return self._whole(parts, run, *args, **kwargs)

    def _whole(self, parts: Sequence[Part], run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        self.check()
        # Set first and taken back last, so that an interruption of what follows counts as well.
        self.corrupt = True
        checkpoints = [part.checkpoint() for part in parts]
        try:
            result = run(*args, **kwargs)
        except BaseException:
            restored = [part.restore(checkpoint) for part, checkpoint in zip(parts, checkpoints, strict=True)]
            self.corrupt = self.has_native_states or not all(restored)
            raise
        self.corrupt = False
        return result

    def claim(self, cache: object) -> None:
        """Notes that this thread uses ``cache`` now. Raises BusyCacheError if another one is in the middle of it, or of
        the batch that it has joined."""
        thread = threading.get_ident()
        if thread == self.thread:
            return
        with _handing_over:
            if self.thread and any(_is_inside(self.thread, each) for each in (cache, self.batch) if each is not None):
                raise BusyCacheError(
                    "Another thread is generating with this cache; give every thread a cache of its own, or wait "
                    "until that one has returned."
                )
            self.thread = thread


def whole_of_all(parts: Sequence[tuple[Passes, Sequence[Part]]], run: Callable[[], R]) -> R:
    """Does what ``Passes.whole`` does for several caches: all are as they were before, or those that could not be taken
    back are ``corrupt``."""
    # In one order for all threads.
    locks = {id(passes.lock): passes.lock for passes, _ in parts if passes.lock is not None}
    with ExitStack() as held:
        for _, lock in sorted(locks.items()):
            held.enter_context(lock)
        return _whole_of_all(parts, run)


def _whole_of_all(parts: Sequence[tuple[Passes, Sequence[Part]]], run: Callable[[], R]) -> R:
    for passes, _ in parts:
        passes.check()
    checkpoints = [[part.checkpoint() for part in own] for _, own in parts]
    try:
        for passes, _ in parts:
            passes.corrupt = True
        result = run()
    except BaseException:
        for (passes, own), before in zip(parts, checkpoints, strict=True):
            restored = [part.restore(checkpoint) for part, checkpoint in zip(own, before, strict=True)]
            passes.corrupt = passes.has_native_states or not all(restored)
        raise
    for passes, _ in parts:
        passes.corrupt = False
    return result


def _is_inside(thread: int, cache: object) -> bool:
    """Whether a call into transformers that another thread has not returned from was given ``cache``.

    A thread that used it and has returned from that may hand it on, whether it has ended or not.
    """
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("transformers"):
            for value in frame.f_locals.values():
                if value is cache or (isinstance(value, dict) and any(inner is cache for inner in value.values())):
                    return True
        frame = frame.f_back
    return False


def not_read_again(spec: str) -> InputError:
    """The refusal of a pass behind a prompt that should have been read again first."""
    return InputError(
        f"{spec} drops tokens of a prompt once that was read again, which it was not; call "
        "kvote.read_again(model, cache, ids) behind the prompt (cache.expect announces one in several passes), or use "
        "kvote.Document."
    )
