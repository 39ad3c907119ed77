"""What the comparison of one process with several workers makes of the times of cells."""

from __future__ import annotations

import pytest

SCRIPT = "several_gpus"


def in_a_row(names, begin=0.0, first=0.0, **seconds):
    """Times of cells one after another; the first one takes `first` longer."""
    found = {}
    for number, name in enumerate(names):
        end = begin + seconds[name] + (first if number == 0 else 0.0)
        found[name], begin = (begin, end), end
    return found


TIMES = {"dense": 1.0, "a": 20.0, "b": 20.0, "c": 20.0, "d": 20.0, "e": 1.0}
ALONE = in_a_row(["dense", "a", "b", "c", "d", "e"], first=15.0, **TIMES)


def test_perfect_workers_are_two_times_as_fast_once_loaded(script):
    cells = in_a_row(["a", "b", "dense"], first=15.0, **TIMES) | in_a_row(["c", "d", "e"], first=15.0, **TIMES)
    assert script.once_loaded(ALONE, cells) == pytest.approx(2.0)
    assert script.span(ALONE) == 97
    assert script.span(cells) == 56


def test_one_worker_gains_nothing_wherever_the_first_cell_of_the_other_is(script):
    for order in (["a", "b", "c", "d", "e", "dense"], ["dense", "a", "b", "c", "d", "e"]):
        assert script.once_loaded(ALONE, in_a_row(order, first=15.0, **TIMES)) == pytest.approx(1.0)


def test_slower_cells_count(script):
    slow = {name: 1.25 * seconds for name, seconds in TIMES.items() if name != "dense"} | {"dense": 1.0}
    cells = in_a_row(["a", "b"], first=15.0, **slow) | in_a_row(["c", "d"], first=15.0, **slow)
    assert script.once_loaded(ALONE, cells) == pytest.approx(2 / 1.25)


def test_a_cell_under_way_counts_by_what_is_left_of_it(script):
    cells = {"a": (0.0, 40.0), "b": (0.0, 20.0), "c": (20.0, 60.0)}  # half of c is left at 40
    alone = {"x": (0.0, 1.0), "a": (1.0, 21.0), "b": (21.0, 41.0), "c": (41.0, 61.0)}
    assert script.once_loaded(alone, cells) == pytest.approx(10 / 20)


def test_nothing_may_be_left(script):
    assert script.once_loaded({"a": (0.0, 2.0)}, {"a": (5.0, 6.0)}) is None
