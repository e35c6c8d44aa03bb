"""Times on a GPU: device events around a captured graph, everything evicted from the second-level cache before."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

# Read before each call; larger than the second-level cache of any GPU there is. Were it written, the call would share
# the bandwidth with what the cache still has to write.
_EVICTED = 512 << 20
_WARM = 3


class Clock:
    """``rounds`` timed calls each. Interpreted, calls are made and not timed: there is no time to be had of them."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.timed = device.type == "cuda"
        self.waste = torch.zeros(_EVICTED // 4 if self.timed else 0, dtype=torch.int32, device=device)
        # One for all: memory that was used on a stream serves no other.
        self.beside = torch.cuda.Stream(device) if self.timed else None

    def ms(self, call: Callable[[], Any]) -> dict[str, float] | None:
        """Milliseconds of a call that waits for nobody: median, least and most."""
        if not self.timed:
            call()
            return None
        assert self.beside is not None
        self.beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.beside):
            for _ in range(_WARM):
                call()
        torch.cuda.current_stream().wait_stream(self.beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(self.rounds)]
        for begin, end in events:
            self.waste.amax()
            begin.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        spent = [begin.elapsed_time(end) for begin, end in events]
        # Memory is not given back while a graph is captured, so the next one must not need this one's.
        del graph
        torch.cuda.empty_cache()
        return {"ms": median(spent), "least_ms": min(spent), "most_ms": max(spent)}

    def fastest(self, calls: dict[str, Callable[[], Any]]) -> tuple[str, dict[str, float] | None]:
        """The fastest of several ways to the same answer."""
        spent = {name: self.ms(call) for name, call in calls.items()}
        name = min(spent, key=lambda name: (spent[name] or {"ms": 0.0})["ms"])
        return name, spent[name]


def ceilings(clock: Clock, small: bool) -> dict[str, float | None]:
    """Bytes per second that a copy reads and writes, and operations per second of a large product in bfloat16."""
    count, side = (1 << 12, 64) if small else (1 << 30, 8192)
    source = torch.ones(count, dtype=torch.int16, device=clock.device)
    target = torch.empty_like(source)
    copied = clock.ms(lambda: target.copy_(source))
    left, right = (torch.randn(side, side, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    multiplied = clock.ms(lambda: left @ right)
    return {
        "copy_bytes_per_s": copied and 2 * source.nbytes / copied["ms"] * 1000,
        "bf16_operations_per_s": multiplied and 2 * side**3 / multiplied["ms"] * 1000,
    }
