import pytest

from kvote.kernels.cpu import library
from kvote.measure import Sweep, sweep


@pytest.mark.parametrize("missing", [None, "no compiler"])
def test_every_reading_is_a_sample(monkeypatch, missing):
    monkeypatch.setattr(sweep, "_BYTES", 1 << 16)
    if missing:
        monkeypatch.setattr(library, "_missing", missing)
    reading = Sweep()
    assert reading.bandwidth > 0
    reading()
    assert len(reading.samples) == 2
    assert min(reading.samples) <= reading.bandwidth <= max(reading.samples)


def test_little_memory_means_a_small_sweep(monkeypatch):
    monkeypatch.setattr(sweep, "memory", lambda: (2**30, 8000))
    assert Sweep().data.nbytes == 1000
