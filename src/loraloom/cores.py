"""Work on several cores: a piece of work each. Threads inside of one operation wait for each other, and longest where
another process has a core."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 4  # pieces in memory at once, whatever the number of cores


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on this thread alone, so that what comes out does not hang on the number of cores either."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` in the order of the items, each computed on one core.

    As many are computed at once as torch has threads, and 4 at most. Until the iterator ends torch computes on one
    thread in the caller too.
    """
    cores, gradients = min(_MOST, torch.get_num_threads()), torch.is_grad_enabled()

    def alone(item: Item) -> Result:
        with torch.set_grad_enabled(gradients):  # which a thread does not take from the one that made it
            return function(item)

    with one_thread():
        if cores == 1:
            yield from map(function, items)
            return
        pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(alone, item))
                if len(waiting) > cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
