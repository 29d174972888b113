"""Work that threads do ahead of whoever takes its results: in order, and never far ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from finetune import signals

Job = TypeVar("Job")
Done = TypeVar("Done")


def ahead(work: Callable[[Job], Done], jobs: Iterable[Job], workers: int) -> Iterator[Done]:
    """`work` of each job, in their order; in `workers` threads, at most two jobs a thread begun and not yet taken.

    What a job raises is raised at its place. Between two jobs it heeds a signal that asks to stop.
    """
    waiting: deque[Future[Done]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for job in jobs:
            signals.heed()
            waiting.append(pool.submit(work, job))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
