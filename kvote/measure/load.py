"""Whether other programs took the processors while something was measured: times of a busy machine are no figures."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

# Share of the time that may be lost before a machine is called busy; less where others were seen, who may have been us:
# the average goes on telling of programs that have ended.
_LOST, _LOST_TO_OTHERS = 0.1, 0.03
# Share of the cores that other programs may want beyond those there are; at least one core.
_CROWD = 0.25


@dataclass(frozen=True)
class Load:
    """``wall`` seconds of a measurement, ``waited`` of them for a processor. ``average``: processes that wanted to run
    in the minute before, None where the system does not say; ``threads`` of ours came to them, on ``cores``."""

    wall: float
    waited: float
    average: float | None
    threads: int
    cores: int

    @property
    def waiting_share(self) -> float:
        return self.waited / self.wall if self.wall > 0 else 0.0

    @property
    def busy(self) -> bool:
        crowd = max(1.0, _CROWD * self.cores)
        crowded = self.average is not None and self.average + self.threads > self.cores + crowd
        return self.waiting_share > (_LOST_TO_OTHERS if crowded else _LOST)

    def __str__(self) -> str:
        average = "" if self.average is None else f", load average {self.average:.1f} before"
        return f"{self.waiting_share:.0%} of the time waiting for a processor{average}, {self.cores} cores"


class LoadMeter:
    """Begins to watch when made, in the thread that measures."""

    def __init__(self) -> None:
        self.average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.begin, self.spent, self.delays = time.perf_counter(), time.thread_time(), _delays()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.begin

    def load(self) -> Load:
        """The load of the machine since the beginning, as a thread sees it that was to compute all the while."""
        wall, own = self.seconds, time.thread_time() - self.spent
        # The thread may turn in circles for another one that waits.
        others = max((delay - self.delays.get(name, 0.0) for name, delay in _delays().items()), default=0.0)
        waited = min(wall, max(0.0, wall - own, others))
        return Load(wall, waited, self.average, torch.get_num_threads(), cores())


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _delays() -> dict[str, float]:
    """Seconds that each thread of this process was ready to run and did not; nothing where the system keeps no such
    figures."""
    held = {path.parent.name: _delay(path) for path in Path("/proc/self/task").glob("*/schedstat")}
    return {name: delay for name, delay in held.items() if delay is not None}


def _delay(path: Path) -> float | None:
    try:
        return int(path.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
