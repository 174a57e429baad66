"""How a slow explainer tells whoever waits for it how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_WATCHER: ContextVar[Callable[[float], None] | None] = ContextVar("watcher", default=None)


def report(share: float) -> None:
    """To be called by a slow explainer: the share of its work that is done, in [0, 1]."""
    if watcher := _WATCHER.get():
        watcher(share)


@contextmanager
def watched(watcher: Callable[[float], None] | None) -> Iterator[None]:
    """Within it, `watcher` is called with whatever `report` is told, unless that is less than before."""
    most = 0.0

    def forward(share: float) -> None:
        nonlocal most
        if share > most:
            most = share
            watcher(share)

    token = _WATCHER.set(watcher and forward)
    try:
        yield
    finally:
        _WATCHER.reset(token)
