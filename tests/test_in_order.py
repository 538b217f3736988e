import os
import threading
import time

import pytest

from segcli.in_order import QUEUED_PER_WORKER, in_groups, in_order

AHEAD = 3 * QUEUED_PER_WORKER + 1


def run(jobs, workers=3, stopping=lambda: None):
    return in_order(jobs, workers=workers, stopping=stopping)


def no_threads():
    return not [t for t in threading.enumerate() if t.name.startswith("segcli")]


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_jobs(workers):
    def job(i):
        # The earlier, the slower.
        time.sleep(0.02 if i < 4 else 0)
        return i

    assert list(run((lambda i=i: job(i) for i in range(30)), workers)) == list(range(30))
    assert no_threads()


def test_jobs_are_taken_only_as_they_are_worked_on():
    taken = 0

    def jobs():
        nonlocal taken
        for i in range(100):
            taken += 1
            yield lambda i=i: i

    results = run(jobs())
    assert taken == 0
    for done, _ in enumerate(results, 1):
        assert taken <= done + AHEAD
    assert done == 100


def test_a_result_does_not_wait_for_the_next_job():
    more = threading.Event()

    def jobs():
        yield lambda: "first"
        assert more.wait(20)
        yield lambda: "second"

    results = run(jobs())
    assert next(results) == "first"
    more.set()
    assert list(results) == ["second"]


def test_what_a_job_raises_comes_in_its_turn():
    def broken():
        raise ValueError("no")

    results = run(iter([lambda: 1, broken, lambda: 2]))
    assert next(results) == 1
    with pytest.raises(ValueError, match="no"):
        next(results)
    assert no_threads()


def test_what_the_source_of_jobs_raises_comes_after_its_jobs():
    def jobs():
        yield lambda: 1
        raise ValueError("no more")

    results = run(jobs())
    assert next(results) == 1
    with pytest.raises(ValueError, match="no more"):
        next(results)


def test_closing_stops_before_it_waits():
    release = threading.Event()
    started = threading.Barrier(3, timeout=20)

    def waits():
        started.wait()
        assert release.wait(20)

    results = run(iter([lambda: 0, waits, waits]), stopping=release.set)
    assert next(results) == 0
    started.wait()
    # Would never end if the running jobs were waited for first.
    results.close()
    assert no_threads()


def test_a_source_that_waits_for_ever_does_not_keep_back_an_interrupt(next_interrupted):
    reading, writing = os.pipe()
    with open(reading, "rb") as never, open(writing, "wb"):  # noqa: PTH123

        def jobs():
            yield lambda: 1
            never.read(1)

        results = run(jobs())
        assert next(results) == 1
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            next_interrupted(results)
        assert time.perf_counter() - start < 5


class Counted:
    """The first numbers, and how many of them have been taken in."""

    def __init__(self, count):
        self.count, self.given = count, 0

    def __iter__(self):
        for i in range(self.count):
            yield i
            self.given += 1


class TestGroups:
    def test_all_of_them_in_order(self):
        groups = list(in_groups(range(1000), 8, lambda: 8))
        assert [item for group in groups for item in group] == list(range(1000))
        assert max(map(len, groups)) <= 8

    def test_a_slow_reader_gets_full_groups(self, until):
        source = Counted(64)
        groups, done = [], 0
        for group in in_groups(source, 8, lambda: 8):
            groups.append(len(group))
            done += len(group)
            until(lambda: source.given >= min(done + 8, 64))  # noqa: B023
        # The first takes what there is by then.
        assert set(groups[1:-1]) == {8}

    def test_the_length_is_asked_for_before_each(self, until):
        source = Counted(13)
        wanted = iter([1, 3, 0, 20, 2])
        found = []
        for group in in_groups(source, 8, lambda: next(wanted)):
            until(lambda: source.given == 13)
            found.append(len(group))
        assert found == [1, 3, 1, 8]

    def test_nothing_waits_for_what_is_not_there(self):
        more = threading.Event()

        def slow():
            yield 1
            yield 2
            more.wait(60)
            yield 3

        groups = in_groups(slow(), 8, lambda: 8)
        found = next(groups)
        while len(found) < 2:
            found += next(groups)
        assert found == [1, 2]
        more.set()
        assert list(groups) == [[3]]

    def test_nothing(self):
        assert list(in_groups([], 8, lambda: 8)) == []

    def test_what_the_source_raises_comes_after_its_items(self):
        def failing():
            yield from range(3)
            raise ValueError("damaged")

        found = []
        groups = in_groups(failing(), 2, lambda: 2)
        with pytest.raises(ValueError, match="damaged"):
            found.extend(item for group in groups for item in group)
        assert found == [0, 1, 2]

    def test_the_source_is_not_read_far_ahead(self):
        taken = []

        def counted():
            for i in range(1000):
                taken.append(i)
                yield i

        groups = in_groups(counted(), 4, lambda: 4)
        next(groups)
        time.sleep(0.2)
        assert len(taken) <= 4 * 3 + 1
        groups.close()
        time.sleep(0.1)
        before = len(taken)
        time.sleep(0.1)
        assert len(taken) == before < 20
