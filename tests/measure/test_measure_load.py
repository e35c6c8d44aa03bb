import time
from dataclasses import replace

import pytest

from kvote.measure import load
from kvote.measure.load import Load, LoadMeter

IDLE = Load(wall=10.0, waited=0.1, average=0.2, threads=2, cores=2)


def test_an_idle_machine_is_not_busy():
    assert not IDLE.busy
    assert not replace(IDLE, average=None).busy


@pytest.mark.parametrize("change", [{"waited": 3.0}, {"average": 4.0, "waited": 0.5}], ids=str)
def test_a_machine_that_others_use_is_busy(change):
    assert replace(IDLE, **change).busy


def test_programs_that_have_ended_make_no_machine_busy():
    """Such as the same command a moment ago."""
    assert not replace(IDLE, average=2.0).busy


def test_of_many_cores_others_may_use_some():
    many = replace(IDLE, cores=64, threads=32, average=20.0, waited=0.5)
    assert not many.busy
    assert replace(many, average=60.0).busy


def test_time_in_which_the_thread_did_not_compute_was_waited():
    watch = LoadMeter()
    time.sleep(0.05)
    found = watch.load()
    assert 0.9 < found.waiting_share <= 1
    assert found.busy
    assert "of the time waiting for a processor" in str(found)


def test_a_thread_that_waits_makes_the_others_wait(monkeypatch):
    delays = iter([{"1": 1.0, "2": 5.0}, {"1": 1.0, "2": 5.0 + 1e-9, "3": 9e9}])
    monkeypatch.setattr(load, "_delays", lambda: next(delays))
    found = LoadMeter().load()
    assert found.waited == found.wall


def test_without_a_load_average_none_is_named(monkeypatch):
    monkeypatch.delattr(load.os, "getloadavg", raising=False)
    assert "load average" not in str(LoadMeter().load())
