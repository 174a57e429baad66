"""Work in threads, a few steps ahead of whoever takes the results, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Barrier
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")
AHEAD = 2  # more items are under way than there are threads, so that none waits for whoever takes the results


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, window: int | None = None
) -> Iterator[Result]:
    """function(item) of each item, in order; what it raises is raised in its turn.

    PyTorch uses one core in each thread, as the threads share the cores among them.

    Args:
        function: called in `threads` threads.
        items: taken one by one by the thread that takes the results, no more than `window` before it does.
        threads: how many items are worked on at a time.
        window: how many items have been taken whose results have not; None: `AHEAD` more than `threads`.
    """
    items, window = iter(items), window or threads + AHEAD
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1 if threads > 1 else cores,))
    waiting = deque()
    try:
        started = Barrier(threads + 1)
        for _ in range(threads):
            pool.submit(started.wait)
        started.wait()
        torch.set_num_threads(cores)  # which each of them has changed for all threads that start from now on
        waiting.extend(pool.submit(function, item) for item in islice(items, window))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown()
