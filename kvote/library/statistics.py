"""Counts of how often a library was of use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """``prompts`` asked for, and ``hits`` among them: those of which something had been read. ``tokens`` of all
    prompts, and ``tokens_reused``, those that were not read again. ``seconds_saved``: what reading those had taken.
    ``held`` prefixes in ``nbytes`` of memory, pages that several share counted once; ``on_disk`` in ``disk_nbytes``.
    ``fetched`` from disk, ``spilled`` to disk, and ``dropped`` from memory."""

    prompts: int = 0
    hits: int = 0
    tokens: int = 0
    tokens_reused: int = 0
    seconds_saved: float = 0.0
    held: int = 0
    nbytes: int = 0
    on_disk: int = 0
    disk_nbytes: int = 0
    fetched: int = 0
    spilled: int = 0
    dropped: int = 0
