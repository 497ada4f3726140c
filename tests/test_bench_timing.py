"""Timing on a clock that the calls themselves move: turns, medians, quartiles, what is not counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bitwright.bench import timing


class Clock:
    """perf_counter of a world in which only `spend` takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes these seconds one time after the other, the last for ever."""
        left = list(seconds)

        def spend() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return spend


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_variants_take_turns_after_one_warm_up(clock: Clock) -> None:
    timing.interleaved({"a": [clock.call("a1", 1), clock.call("a2", 1)], "b": [clock.call("b", 1)]}, 2, "cpu")
    assert clock.log == ["a1", "a2", "b", *2 * ["a1", "a2", "b"]]


def test_a_time_is_the_median_of_one_call(clock: Clock) -> None:
    # The first is the warm-up: a hundred seconds of compilation are not counted.
    slow = clock.call("slow", 100.0, 7.0, 3.0, 5.0, 1.0, 9.0)
    found = timing.interleaved({"slow": [slow], "two": [clock.call("x", 2.0), clock.call("y", 4.0)]}, 5, "cpu")
    assert found["slow"] == timing.Timing(5.0, 3.0, 7.0, rounds=5, calls=1)
    assert found["two"].seconds == 3.0 and found["two"].calls == 2


def test_one_round_is_enough_and_none_is_nothing(clock: Clock) -> None:
    assert timing.interleaved({"a": [clock.call("a", 2.0)]}, 1, "cpu")["a"] == timing.Timing(2.0, 2.0, 2.0, 1, 1)
    assert timing.interleaved({}, 3, "cpu") == {}


def test_a_round_made_ready_is_taken_as_it_is(clock: Clock) -> None:
    made = timing.ready([clock.call("a", 1.0)], "cpu")
    assert clock.log == ["a"]
    timing.interleaved({"a": made}, 1)
    assert clock.log == ["a", "a"]


def test_a_round_keeps_what_its_first_and_last_call_gave() -> None:
    counts = iter(range(100))
    made = timing.ready([lambda: next(counts)] * 3, "cpu")
    made.run()
    assert made.outputs == [3, 5]
    assert timing.ready([lambda: 7], "cpu").outputs == [7, 7]


def test_what_a_call_raises_reaches_the_caller() -> None:
    def broken() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        timing.ready([broken], "cpu")


def test_copies_fill_more_than_the_cache() -> None:
    assert timing.copies(100e6, 250_000_000) == 3
    assert timing.copies(1e9, 250_000_000) == 1


def test_short_rounds_are_made_long() -> None:
    """Calls over and over in their order, a dozen at least, unless that takes more operations than a long round."""
    gpu, calls = torch.device("cuda"), [lambda: 0, lambda: 1, lambda: 2, lambda: 3, lambda: 4]
    for count, flops, times in (
        (1, 1e6, 12), (5, 1e6, 3), (4, 1e6, 3), (5, 1e9, 3), (1, 1e11, 10), (2, 1e11, 5), (5, 1e11, 2), (1, 1e13, 1),
        (5, 1e13, 1),
    ):  # fmt: skip
        made = timing.enough(calls[:count], flops, gpu)
        assert [call() for call in made] == list(range(count)) * times, (count, flops)
        assert timing.enough(calls[:count], flops, torch.device("cpu")) == calls[:count], "nothing has to be started"
    many = calls * 5
    assert timing.enough(many, 1.0, gpu) == many and timing.enough(many, 1.0, gpu) is not many


def test_the_floor_is_the_longer_of_two_ways() -> None:
    ceilings = timing.Ceilings(1e3, 500, 1e6, torch.bfloat16)
    assert ceilings.floor(2000, 1e6) == 2.0
    assert ceilings.floor(500, 3e6) == 3.0
    assert timing.Ceilings(1e3, 2e3, 1e6, torch.bfloat16).floor(2000, 0) == 1.0  # reading alone was faster


def test_ceilings_of_this_machine_are_finite() -> None:
    found = timing.measure_ceilings("cpu", torch.float32, repeats=2)
    assert 1e8 < found.copy_bytes_per_second < 1e13 and 1e8 < found.read_bytes_per_second < 1e13
    assert 1e8 < found.flops_per_second < 1e14
