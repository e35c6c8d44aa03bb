"""Library: a store of prefixes, shared by all prompts that begin alike."""

import threading
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvote.answering import Responder
from kvote.cache import Cache
from kvote.errors import CropError, InputError, InterruptedPassError
from kvote.keep.budget import budget
from kvote.library.cuts import grain, reusable
from kvote.library.folder import Folder
from kvote.library.prefix import Prefix, shared, worth
from kvote.library.scope import Reading, scope_of
from kvote.library.statistics import Statistics
from kvote.method import Method
from kvote.numbers import is_whole
from kvote.repeat import read_again
from kvote.store.family import counted_once

TOKENS_PER_PASS = 4096
# A file is fetched where this part of its tokens serves, as 1 / n.
_AT_LEAST = 16


class Library:
    """Prompts that have been read, for the next ones that begin alike.

    ``cache`` gives a cache that has read a prompt: from the longest prefix that is known, whose pages it shares until
    one of both writes to them, and for the rest from the model. It holds what it would hold if all had been read, or
    nothing is reused: methods that keep all tokens and choose for each query by itself share any prefix, tokenselect
    whole chunks of one, and methods that drop or encode tokens whole prompts only.

    ``memory``: bytes that prefixes may take, such as ``"2GiB"``; what is worth least goes first (``prefix.worth``), to
    ``folder``, if there is one, where files may take ``disk`` bytes. ``close``, or the end of ``with``, writes what is
    still in memory. Threads may share a library, and processes its folder. What is in a folder tells what was read: it
    is made with mode 0700, and files are of mode 0600.

    Raises InputError for sizes that make no sense, and a folder that cannot be written.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        memory: int | str = "2GiB",
        disk: int | str = "16GiB",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._memory, most = bytes_of("memory", memory), bytes_of("disk", disk)
        self._folder = None if folder is None else Folder(folder, most)
        self._clock = clock
        self._held: list[Prefix] = []
        self._counted = Statistics()
        self._lock = threading.RLock()

    def cache(
        self,
        model: PreTrainedModel,
        method: Method | str,
        ids: Tensor,
        *,
        question_follows: bool = True,
        tokens_per_pass: int = TOKENS_PER_PASS,
        tokenizer: PreTrainedTokenizerBase | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Cache, int]:
        """A cache of its own that has read ``ids`` [1, n], and how many of them were not read again.

        ``question_follows``: as ``Cache.expect`` has it. ``tokenizer``: for methods that read a prompt again.
        ``progress`` is called with the number of tokens that have come, after each pass. ``generate()`` takes a prompt
        that is at least a token longer than what its cache holds.

        Raises InputError for other ids, NotFiniteError, and what ``Cache`` raises.
        """
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise InputError("A library takes the ids of one prompt, [1, n] with at least one token.")
        if ids.is_floating_point() or not is_whole(tokens_per_pass) or tokens_per_pass < 1:
            raise InputError("A library takes whole numbers as ids and as tokens_per_pass, the latter at least 1.")
        fresh = Cache(model, method)
        reading = Reading(tokens_per_pass, bool(question_follows), tokenizer)
        scope = scope_of(model, fresh.method, reading)
        begin = time.perf_counter()
        cache, reused, spared = (fresh, 0, 0.0) if scope is None else self._find(scope, fresh, ids, reading)
        if progress is not None and reused:
            progress(reused)
        if reused < ids.shape[1]:
            _read(cache, ids, reused, reading, progress)
        seconds = spared + time.perf_counter() - begin
        with self._lock:
            self._count_prompt(ids, reused, spared)
            gone = []
            if scope is not None and reused < ids.shape[1]:
                gone = self._remember(scope, cache, ids, seconds)
        self._spill(gone)
        return cache, reused

    def lend(self, scope: str, fresh: Cache, ids: Tensor, reading: Reading) -> tuple[Cache, int, float]:
        """For a caller that reads prompts itself and wants the logits behind them: a cache that has read the beginning
        of ``ids`` [1, n], not all of it, how many tokens that is, and the seconds it spares. ``fresh``: the cache if
        nothing serves. ``scope``: what prompts must have in common to share.
        """
        cache, reused, spared = self._find(scope, fresh, ids, reading, short=1)
        with self._lock:
            self._count_prompt(ids, reused, spared)
        return cache, reused, spared

    def keep(self, scope: str, cache: Cache, ids: Tensor, seconds: float) -> None:
        """Holds what a ``cache`` has read of ``ids`` [1, n], all of it, in so many ``seconds``."""
        with self._lock:
            gone = self._remember(scope, cache, ids, seconds)
        self._spill(gone)

    def read(self, document: Any) -> Cache:
        """A cache that has read a ``kvote.Document``."""
        return self.cache(
            document.model,
            document.cache.method,
            document.token_ids,
            tokens_per_pass=document._tokens_per_pass,
            tokenizer=document.tokenizer,
            progress=document._progress,
        )[0]

    @property
    def statistics(self) -> Statistics:
        files, size = (0, 0) if self._folder is None else self._folder.size()
        with self._lock:
            known = replace(self._counted, held=len(self._held), nbytes=self._nbytes())
        return replace(known, on_disk=files, disk_nbytes=size)

    def flush(self) -> None:
        """Writes what is in memory into the folder, where other processes and later ones find it."""
        with self._lock:
            held = list(self._held)
        self._spill(held)

    def close(self) -> None:
        """Writes as ``flush``, and forgets what is in memory."""
        self.flush()
        with self._lock:
            self._held.clear()

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spill(self, prefixes: list[Prefix]) -> None:
        """Writes prefixes that are in no file. What cannot be written is read again some time, with a warning now."""
        if self._folder is None:
            return
        for prefix in prefixes:
            if prefix.kept:
                continue
            try:
                prefix.kept = self._folder.keep(prefix)
            except InputError as error:
                warnings.warn(f"A prefix of {len(prefix.ids):,} tokens is not kept: {error}", stacklevel=3)
                continue
            with self._lock:
                self._count(spilled=int(prefix.kept))

    def _count_prompt(self, ids: Tensor, reused: int, spared: float) -> None:
        hits, tokens = int(reused > 0), ids.shape[1]
        self._count(prompts=1, hits=hits, tokens=tokens, tokens_reused=reused, seconds_saved=spared)

    def _count(self, **more: float) -> None:
        told = {name: getattr(self._counted, name) + count for name, count in more.items()}
        self._counted = replace(self._counted, **told)

    def _nbytes(self) -> int:
        with counted_once():
            return sum(prefix.cache.nbytes() for prefix in self._held)

    def _find(
        self, scope: str, fresh: Cache, ids: Tensor, reading: Reading, short: int = 0
    ) -> tuple[Cache, int, float]:
        """A cache with the longest prefix that can be reused, its tokens, and the seconds that this spares. ``short``:
        how many tokens of the prompt are to be left at least."""
        row, step = _row(ids), grain(fresh.method, fresh.model)
        tail = 0 if reading.question_follows else fresh.method.read.tail
        model, best = fresh.model, (fresh, 0, 0.0)
        with self._lock:
            own = [prefix for prefix in self._held if prefix.scope == scope and prefix.model() is model]
            counts = [_count(prefix.ids, row, step, tail, short) for prefix in own]
            for count, prefix in sorted(zip(counts, own, strict=True), key=lambda pair: -pair[0]):
                if count and (cut := _cut(prefix.cache, count)) is not None:
                    prefix.used = self._clock()
                    best = cut, count, prefix.seconds * count / len(prefix.ids)
                    break
        if self._folder is None or best[1] == len(row):
            return best
        filed = [(_count(each.ids, row, step, tail, short), each) for each in self._folder.prefixes(scope)]
        for count, each in sorted(filed, key=lambda pair: -pair[0]):
            # The whole file is read, whatever it serves.
            if count <= best[1] or count * _AT_LEAST < len(each.ids):
                continue
            cache = self._folder.fetch(each, model, fresh.method)
            if cache is None:
                continue
            cut = _cut(cache, count)
            if cut is not None:
                best = cut, count, each.seconds * count / len(each.ids)
                new = Prefix(scope, each.ids, cache, weakref.ref(model), each.seconds, self._clock(), kept=True)
                with self._lock:
                    self._count(fetched=1)
                    gone = self._hold(new, step, fresh.method.read.tail)
                self._spill(gone)
            break
        return best

    def _remember(self, scope: str, cache: Cache, ids: Tensor, seconds: float) -> list[Prefix]:
        """Holds a prefix. What had to go for it is the caller's to spill."""
        new = Prefix(scope, _row(ids), cache.fork(), weakref.ref(cache.model), seconds, self._clock())
        return self._hold(new, grain(cache.method, cache.model), cache.method.read.tail)

    def _hold(self, new: Prefix, step: int | None, tail: int) -> list[Prefix]:
        # A longer prompt has all of a shorter one, if that may be cut anywhere.
        self._held = [
            held
            for held in self._held
            if held.scope != new.scope
            or held.model() is not new.model()
            or not torch.equal(held.ids, new.ids[: len(held.ids)])
            or (len(held.ids) < len(new.ids) and (step != 1 or tail > 0))
        ]
        self._held.append(new)
        return self._make_room()

    def _make_room(self) -> list[Prefix]:
        """Lets go of models that are gone, and of what is worth least, which is returned."""
        self._held, gone = [held for held in self._held if held.model() is not None], []
        while self._held and self._nbytes() > self._memory:
            now = self._clock()
            last = min(self._held, key=lambda held: worth(held.seconds, held.cache.nbytes(), now - held.used))
            self._held.remove(last)
            gone.append(last)
            self._count(dropped=1)
        return gone


def bytes_of(name: str, value: int | str) -> int:
    """Bytes of a size such as 4096 or "2GiB". Raises InputError for anything else."""
    if is_whole(value) and int(value) >= 0:
        return int(value)
    try:
        return int(budget(value).amount) if isinstance(value, str) else int("")
    except ValueError:
        raise InputError(f'{name} is a size in bytes, such as 4096 or "2GiB"; got {value!r}.') from None


def _read(cache: Cache, ids: Tensor, seen: int, reading: Reading, progress: Callable[[int], None] | None) -> None:
    """Reads the rest of a prompt, of which ``seen`` tokens are known, in passes that end where they always do."""
    size, model = reading.tokens_per_pass, cache.model
    cache.expect(ids.shape[1] - seen, question_follows=reading.question_follows)
    responder: Any = Responder(model, reading.tokenizer, size)
    edge = -(-seen // size) * size
    for part in (ids[:, seen:edge], ids[:, edge:]):
        if part.shape[1]:
            responder.feed(cache, part.to(model.device), progress)
    read_again(model, cache, ids.to(model.device), tokenizer=reading.tokenizer)


def _row(ids: Tensor) -> Tensor:
    return ids[0].detach().cpu().to(torch.int64).clone()


def _count(held: Tensor, row: Tensor, step: int | None, tail: int, short: int) -> int:
    """How many tokens of the prompt ``row``, but for the last ``short``, a prefix may serve."""
    same = shared(held, row)
    if same == len(held) == len(row) and not short:
        return same
    return 0 if step is None else reusable(same, (len(held), len(row) - max(0, short - tail)), tail, step)


def _cut(held: Cache, count: int) -> Cache | None:
    """A fork that ends behind ``count`` tokens; None where a layer cannot go back."""
    cache = held.fork()
    try:
        if cache.get_seq_length() > count:
            cache.crop_to(count)
    except (CropError, InterruptedPassError):
        return None
    return cache
