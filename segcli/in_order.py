"""Jobs run by several threads, their results in the order of the jobs.

A thread of its own takes the jobs from where they come, so that a source that waits for its writer
keeps back no result that is done, and an interrupt is heard at once.
"""

import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

_R = TypeVar("_R")
_T = TypeVar("_T")

# Enough that no worker waits for the head of the line, little enough that memory stays flat.
QUEUED_PER_WORKER = 2

# A source that has more to give ends within this; one that waits for its writer is left waiting.
_FAREWELL_S = 0.1


def in_groups(
    items: Iterable[_T], most: int, length: Callable[[], int]
) -> Generator[list[_T], None, None]:
    """Yields lists of what is there by then: one item at least, and no more than ``most``.

    So nothing waits for an item that is not there yet.

    Args:
        items: Taken by a thread of its own, no more than two groups ahead.
        most: Length of a list.
        length: Called before each list: it is to hold no more than so many.

    Raises:
        BaseException: What ``items`` raised, after what came before.
    """
    there: SimpleQueue[_T | _End] = SimpleQueue()
    places = threading.Semaphore(2 * most)
    stopped = threading.Event()

    def feed() -> None:
        end = _End()
        try:
            for item in items:
                places.acquire()
                if stopped.is_set():
                    return
                there.put(item)
        except BaseException as error:
            end = _End(error)
        there.put(end)

    threading.Thread(target=feed, name="segcli-group", daemon=True).start()
    try:
        end: _End | None = None
        while end is None:
            room = min(most, length())
            group: list[_T] = []
            while end is None and (not group or (len(group) < room and not there.empty())):
                item = there.get()
                if isinstance(item, _End):
                    end = item
                else:
                    group.append(item)
            if group:
                yield group
            for _ in group:
                places.release()
        if end.error is not None:
            raise end.error
    finally:
        stopped.set()
        places.release()


class _End(NamedTuple):
    """What follows the last item: why there are no more."""

    error: BaseException | None = None


def in_order(
    jobs: Iterable[Callable[[], _R]], *, workers: int, stopping: Callable[[], object]
) -> Generator[_R, None, None]:
    """Yields the result of every job, in the order of the jobs, each as soon as it is its turn.

    Args:
        jobs: Taken only as fast as they are worked on, by one thread.
        workers: Threads that run them.
        stopping: Called once when no more results are wanted, before running jobs are waited for:
            also where the caller closes the iterator or is interrupted.

    Raises:
        BaseException: What a job or ``jobs`` raised, in its turn.
    """
    results: SimpleQueue[Future[_R] | BaseException | None] = SimpleQueue()
    places = threading.Semaphore(workers * QUEUED_PER_WORKER)
    stopped = threading.Event()

    def feed() -> None:
        try:
            for job in jobs:
                places.acquire()
                if stopped.is_set():
                    return
                results.put(pool.submit(job))
            results.put(None)
        # Everything: without an end the other side would wait for ever.
        except BaseException as error:
            results.put(error)

    with ThreadPoolExecutor(workers, thread_name_prefix="segcli") as pool:
        # A daemon, as nothing can wake it from a read that never ends.
        feeder = threading.Thread(target=feed, name="segcli-feed", daemon=True)
        feeder.start()
        try:
            while (item := results.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                result = item.result()
                places.release()
                yield result
        finally:
            stopped.set()
            stopping()
            places.release()
            pool.shutdown(wait=True, cancel_futures=True)
            feeder.join(_FAREWELL_S)
