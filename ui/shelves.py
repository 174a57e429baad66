"""The last films of each page, in memory alone: what a page that is reloaded gets back without the networks' help.

A page is known by a random token that the server made and that the browser holds for its tab alone. Whoever has it gets
the films; with passwords, only if logged in by the same name.
"""

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, is_dataclass

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from manet_core import XRay

from .networks import Film

KEPT = 10  # films of a page
MOST_BYTES = 1 << 30  # of all films of all pages
MOST_PAGES = 256
AWAY_S = 600  # for which the films of a page wait that is closed
IDLE_S = 1800  # and those of a page that nobody uses


@dataclass(frozen=True)
class Picture:
    """A film as the viewer gets it.

    Attributes:
        text: what it is told of it, a JSON object.
        levels: its values, which it fetches.
    """

    text: str
    levels: bytes


@dataclass
class Shelved:
    """A film on a shelf.

    Attributes:
        picture: for the viewer.
        film: with its reading; None until the networks have answered.
        x: the film itself, where it is presented wrongly (see `manet_core.pose`) and no newer one came.
        unread: a student has still to read it.
        case: its number in the lecturer's list, if it is of that.
    """

    picture: Picture
    film: Film | None = None
    x: XRay | None = None
    unread: bool = False
    case: int | None = None


@dataclass
class Shelf:
    """What is kept of a page.

    Attributes:
        films: {key: film}, the newest last, no more than `KEPT`.
        shown: key of the film whose reading the page tells.
        quiz: whether films are read first.
        score: of “read first”: agreements with the networks, X-rays read.
        answers: {number of a case: the class that the student answered}.
        sizes: {key: bytes}, of `films`.
    """

    films: OrderedDict[str, Shelved] = field(default_factory=OrderedDict)
    shown: str = ""
    quiz: bool = False
    score: tuple[int, int] = (0, 0)
    answers: dict[int, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def read(self) -> list[Shelved]:
        """The films that have a reading."""
        return [shelved for shelved in list(self.films.values()) if shelved.film is not None]


@dataclass
class _Page:
    shelf: Shelf
    user: str | None
    sessions: set[str]  # Gradio's, of its windows that are open
    used: float
    left: float = 0.0  # when the last of them was closed


class Shelves:
    """The shelves of all pages.

    Where there is too much, the oldest film goes of the page that was used least recently.

    Args:
        most_bytes: of all films.
        most_pages: that are known.
        away_s: seconds for which films of a closed page wait.
        idle_s: seconds for which films of an open page wait that nobody uses.
    """

    def __init__(
        self, most_bytes: int = MOST_BYTES, most_pages: int = MOST_PAGES, away_s: float = AWAY_S, idle_s: float = IDLE_S
    ):
        self.most_bytes, self.most_pages, self.away_s, self.idle_s = most_bytes, most_pages, away_s, idle_s
        self._pages: dict[str, _Page] = {}  # by token
        self._lock = threading.RLock()

    def open(self, token: str, session: str, user: str | None = None) -> tuple[str, Shelf]:
        """The token and the shelf of a page that was just loaded: those of `token`, or new ones.

        Args:
            token: that the browser has of an earlier load; "" if none.
            session: Gradio's, of the page.
            user: who is logged in; None where nobody need be.
        """
        with self._lock:
            self.sweep()
            page = self._pages.get(token)
            if page is None or page.user != user:
                token = secrets.token_urlsafe(32)
                page = self._pages[token] = _Page(Shelf(), user, set(), 0.0)
            page.sessions.add(session)
            page.used = time.monotonic()
            while len(self._pages) > self.most_pages:
                del self._pages[min(self._pages, key=lambda t: (bool(self._pages[t].shelf.films), self._pages[t].used))]
            return token, page.shelf

    def of(self, session: str, user: str | None = None) -> Shelf:
        """The shelf of a page by Gradio's session."""
        with self._lock:
            self.sweep()
            for page in self._pages.values():
                if session in page.sessions and page.user == user:
                    page.used = time.monotonic()
                    return page.shelf
            return self.open("", session, user)[1]

    def left(self, session: str) -> None:
        """A page was closed."""
        with self._lock:
            for page in self._pages.values():
                if session in page.sessions:
                    page.sessions.discard(session)
                    page.left = time.monotonic()
            self.sweep()

    def put(self, shelf: Shelf, key: str, shelved: Shelved) -> None:
        """Add a film to a shelf, or what is now known of it."""
        with self._lock:
            if key not in shelf.films:
                for older in shelf.films.values():
                    older.x = None
            shelf.films[key] = shelved
            for older, of in shelf.films.items():
                shelf.sizes[older] = len(of.picture.levels) + _size(of.film) + _size(of.x)
            while len(shelf.films) > KEPT:
                _drop_oldest(shelf)
            while self.size() > self.most_bytes:
                filled = [page for page in self._pages.values() if page.shelf.films]
                if not filled:
                    break
                _drop_oldest(min(filled, key=lambda page: page.used).shelf)

    def size(self) -> int:
        """Bytes of all films."""
        with self._lock:
            return sum(sum(page.shelf.sizes.values()) for page in self._pages.values())

    def sweep(self) -> None:
        """Forget what has waited long enough."""
        now = time.monotonic()
        with self._lock:
            for token, page in list(self._pages.items()):
                away = not page.sessions and (now - page.left >= self.away_s or not page.shelf.films)
                if away or now - page.used >= self.idle_s:
                    page.shelf.films.clear()  # a page may still hold the shelf
                    page.shelf.sizes.clear()
                    del self._pages[token]

    def levels(self, key: str) -> bytes | None:
        """The values of the film of that key; None where no page has it."""
        with self._lock:
            self.sweep()
            found = (page.shelf.films.get(key) for page in self._pages.values())
            return next((shelved.picture.levels for shelved in found if shelved is not None), None)

    async def answer(self, request: Request) -> Response:
        """A page's request for a film's values, its body the film's key."""
        levels = self.levels((await request.body()).decode("ascii", "replace"))
        if levels is None:
            return Response("There is no such film.", 404)
        return Response(levels, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


def _drop_oldest(shelf: Shelf) -> None:
    key, _ = shelf.films.popitem(last=False)
    shelf.sizes.pop(key)


def _size(value: object) -> int:
    """Bytes of all arrays in a value."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return _size(vars(value)) if is_dataclass(value) else 0
