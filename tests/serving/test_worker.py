"""One thread for all: together where they can be, in order, and none harmed by another."""

import queue
import threading
from concurrent.futures import CancelledError

import pytest

from unified_mm.serving.worker import Worker


class Held:
    """Work that waits for the test, and notes what it was asked together."""

    def __init__(self):
        self.asked, self.open = [], threading.Event()

    def __call__(self, items):
        self.open.wait(10)
        self.asked.append(list(items))
        if "bad" in items:
            raise ValueError("a bad item")
        return [item * 2 for item in items]


def test_what_waits_together_goes_together_and_each_gets_its_own():
    work = Held()
    with Worker() as worker:
        first = worker.submit(work, ["a"])
        while worker.waiting:  # until it is being done
            pass
        others = [worker.submit(work, items) for items in (["b", "c"], [], ["d"])]
        work.open.set()
        assert first.result(10) == ["aa"]
        assert [each.result(10) for each in others] == [["bb", "cc"], [], ["dd"]]
    assert work.asked == [["a"], ["b", "c", "d"]]


def test_other_work_and_too_many_items_go_apart_in_order():
    work, other = Held(), Held()
    with Worker(together=3) as worker:
        held = worker.submit(work, ["x"])
        while worker.waiting:
            pass
        other.open.set()
        asked = [(work, ["a", "b"]), (work, ["c", "d"]), (other, ["e"]), (work, ["f"] * 5)]
        futures = [worker.submit(*each) for each in asked]
        work.open.set()
        assert held.result(10) == ["xx"]
        assert [each.result(10) for each in futures] == [
            ["aa", "bb"],
            ["cc", "dd"],
            ["ee"],
            ["ff"] * 5,
        ]
    assert work.asked == [["x"], ["a", "b"], ["c", "d"], ["f"] * 5]


def test_a_bad_one_harms_no_other():
    work = Held()
    with Worker() as worker:
        worker.submit(work, ["x"])
        while worker.waiting:
            pass
        good, bad, after = (worker.submit(work, [each]) for each in ("a", "bad", "b"))
        work.open.set()
        assert good.result(10) == ["aa"] and after.result(10) == ["bb"]
        with pytest.raises(ValueError, match="a bad item"):
            bad.result(10)


def test_a_full_queue_refuses_and_the_end_cancels_what_waits():
    work = Held()
    with Worker(waiting=2) as worker:
        first = worker.submit(work, ["a"])
        while worker.waiting:
            pass
        waiting = [worker.submit(lambda items: items, [each]) for each in ("b", "c")]
        with pytest.raises(queue.Full):
            worker.submit(work, ["d"])
        waiting[1].cancel()
        work.open.set()
    assert first.result(0) == ["aa"] and waiting[0].result(0) == ["b"]
    with pytest.raises(CancelledError):
        waiting[1].result(0)
