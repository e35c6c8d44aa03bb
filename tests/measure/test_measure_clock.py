from kvote.measure.clock import Call, Timing, alternating, timed


def test_calls_alternate_and_each_is_prepared_and_undone():
    told: list[str] = []
    calls = {name: Call(lambda name=name: told.append(name), lambda: told.append("undo")) for name in "ab"}
    times = alternating(calls, 2, seconds=0, before=lambda: told.append("before"))
    assert told == ["before", "a", "undo", "before", "b", "undo"] * 2
    assert times.keys() == {"a", "b"}
    assert all(0 <= time.shortest <= time.seconds <= time.longest for time in times.values())


def test_a_call_is_timed_at_least_once_and_at_most_so_often():
    ran: list[int] = []
    timed(Call(lambda: ran.append(1)), seconds=0)
    assert len(ran) == 1
    timed(Call(lambda: ran.append(1)), seconds=1e9, most=7)
    assert len(ran) == 8


def test_a_timing_is_the_median_of_its_rounds():
    assert Timing.of([3.0, 1.0, 2.0]) == Timing(2.0, 1.0, 3.0)
