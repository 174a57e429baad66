"""Long work of which only a page's newest request counts: told step by step, ended by a newer one."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Lock
from typing import TypeVar
from weakref import WeakValueDictionary

Step = TypeVar("Step")
Result = TypeVar("Result")
_PATIENCE = 5.0  # seconds for what a page is told to reach it; a page that was closed takes nothing any more


class Superseded(Exception):
    """Something newer was asked for meanwhile, or the page was closed."""


class Newest:
    """Runs one thing at a time for each page; whatever is newer ends what is older."""

    def __init__(self):
        self._wanted: dict[str, object] = {}  # session: a token of its newest request
        # session: held from a step's leaving until the page has it; there as long as something runs
        self._telling: WeakValueDictionary[str, Lock] = WeakValueDictionary()

    def forget(self, session: str) -> None:
        """End what a page has asked for."""
        self._wanted.pop(session, None)

    def run(
        self,
        session: str,
        work: Callable[[Callable[[float, int], None]], Result],
        told: Callable[[float, int], Step],
    ) -> Generator[Step, None, Result]:
        """Work in a thread, and meanwhile yield what `told` makes of every (done, count) of it; returns its result.

        Args:
            session: of the page.
            work: called with a function that it calls in turn with how much is done, and of how much.
            told: what to yield of that.

        Raises:
            Superseded: the result is no longer wanted.
        """
        mine, steps, telling = object(), SimpleQueue(), self._telling.setdefault(session, Lock())
        self._wanted[session] = mine

        def go_on() -> None:
            if self._wanted.get(session) is not mine:
                raise Superseded

        def progress(done: float, count: int) -> None:
            go_on()
            steps.put((done, count))

        def wanted() -> Result:
            result = work(progress)
            go_on()
            return result

        try:
            with ThreadPoolExecutor(1) as pool:
                job = pool.submit(wanted)
                job.add_done_callback(lambda _: steps.put(None))
                while step := steps.get():
                    with _held(telling):
                        if self._wanted.get(session) is mine:  # or what is older would cover what is newer
                            yield told(*step)
            result = job.result()
            with _held(telling):  # a step of what is older, on its way since before, comes first
                return result
        finally:
            if self._wanted.get(session) is mine:
                self.forget(session)


@contextmanager
def _held(lock: Lock) -> Iterator[None]:
    """The lock, or after `_PATIENCE` none."""
    held = lock.acquire(timeout=_PATIENCE)
    try:
        yield
    finally:
        if held:
            lock.release()
