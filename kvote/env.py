"""The machine and the software that kvote runs on, and which kernels run here."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from kvote import __version__
from kvote.kernels.available import State, states

_SIMD = frozenset(
    "sse4_2 avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 "
    "amx_bf16 asimd asimddp asimdhp sve sve2 i8mm bf16".split()
)


@dataclass(frozen=True)
class Environment:
    """The facts of this machine and installation that kvote's behaviour depends on. Memory is in bytes, 0 where the
    system does not say."""

    versions: dict[str, str]
    platform: str
    cpu: str
    simd: list[str]
    threads: int
    memory_total: int
    memory_available: int
    backends: list[State]


def environment() -> Environment:
    """Looks at this machine; every backend that claims to run is tried."""
    cpu, flags = _cpu()
    total, available = memory()
    return Environment(
        versions={
            "kvote": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        platform=platform.platform(),
        cpu=cpu,
        simd=sorted(flags & _SIMD),
        threads=torch.get_num_threads(),
        memory_total=total,
        memory_available=available,
        backends=states(),
    )


def memory() -> tuple[int, int]:
    """Bytes of memory in all and available to new work; 0 where the system does not say."""
    fields = _fields("/proc/meminfo")
    if "MemTotal" in fields:
        total, available = (1024 * int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
        return total, available
    names = getattr(os, "sysconf_names", {})
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else 0
    return total, 0


def _cpu() -> tuple[str, set[str]]:
    fields = _fields("/proc/cpuinfo")
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags") or fields.get("Features") or ""
    return name, set(flags.split())


def _fields(path: str) -> dict[str, str]:
    """``name: value`` lines of a system file; the first of each name, nothing if there is no such file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))
    return {name.strip(): value.strip() for name, _, value in pairs}
