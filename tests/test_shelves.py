"""The shelves of pages: who gets what back, for how long, and how much is kept."""

from datetime import datetime

import numpy as np
import pytest
from starlette.requests import Request

from manet_core import Analysis
from manet_core.lungs import Lungs
from ui.networks import Film
from ui.shelves import KEPT, Picture, Shelved, Shelves


def _film(key: str, size: int = 100) -> Shelved:
    """A film whose arrays and values are of about `size` bytes together."""
    mask = np.zeros((2, 2), bool)
    analysis = Analysis(np.zeros(size // 8, np.float32), Lungs(mask.astype(np.float32), mask, None), {}, [])
    film = Film(analysis, {}, (2, 2), "", "", datetime.now(), key)
    return Shelved(Picture(f'{{"key": "{key}"}}', bytes(size // 2)), film)


def _keys(shelf) -> list[str]:
    return [shelved.film.key for shelved in shelf.read()]


def test_a_reloaded_page_gets_its_films_and_no_other_does():
    shelves = Shelves()
    token, shelf = shelves.open("", "first")
    assert len(token) >= 43 and shelves.of("first") is shelf
    shelves.put(shelf, "a", _film("a"))
    shelves.left("first")
    again, same = shelves.open(token, "second")
    assert again == token and same is shelf and _keys(same) == ["a"] and shelves.of("second") is shelf
    for wrong in ("", "x" * 43, token[:-1], token.swapcase()):
        other, empty = shelves.open(wrong, "third")
        assert other not in (token, wrong) and not empty.films
    assert not shelves.of("a session that was never opened").films


def test_a_token_is_of_one_login():
    shelves = Shelves()
    token, shelf = shelves.open("", "first", "ann")
    shelves.put(shelf, "a", _film("a"))
    for user in ("bob", None):
        assert not shelves.open(token, "second", user)[1].films
        assert not shelves.of("first", user).films
    assert shelves.open(token, "second", "ann")[1] is shelf


@pytest.mark.parametrize("left", [True, False])
def test_films_expire(left):
    shelves = Shelves(away_s=0 if left else 60, idle_s=60 if left else 0)
    token, shelf = shelves.open("", "first")
    shelves.put(shelf, "a", _film("a"))
    if left:
        assert shelves.levels("a") is not None
        shelves.left("first")
    assert shelves.levels("a") is None and shelves.size() == 0 and not shelf.films
    assert not shelves.open(token, "second")[1].films


def test_a_page_that_was_reloaded_before_it_was_left_stays():
    """Whichever the server hears of first."""
    shelves = Shelves(away_s=0)
    token, shelf = shelves.open("", "first")
    shelves.put(shelf, "a", _film("a"))
    assert shelves.open(token, "second")[1] is shelf
    shelves.left("first")
    assert _keys(shelves.of("second")) == ["a"]


def test_a_page_keeps_its_last_films_and_the_newest_as_it_was_read():
    shelves = Shelves()
    _, shelf = shelves.open("", "first")
    for number in range(KEPT + 3):
        shelved = _film(str(number))
        shelved.x = np.zeros(5)
        shelves.put(shelf, str(number), shelved)
    assert _keys(shelf) == [str(number) for number in range(3, KEPT + 3)]
    assert [shelved.x is not None for shelved in shelf.read()] == [False] * (KEPT - 1) + [True]


def test_memory_is_bounded_and_the_page_used_least_recently_pays():
    shelves = Shelves(most_bytes=50_000)
    (_, first), (_, second) = (shelves.open("", name) for name in ("first", "second"))
    for number in range(4):
        shelves.put(first, f"a{number}", _film(f"a{number}", 10_000))
    shelves.of("second")
    for number in range(4):
        shelves.put(second, f"b{number}", _film(f"b{number}", 10_000))
        assert shelves.size() <= 50_000
    assert _keys(second) == ["b0", "b1", "b2", "b3"] and _keys(first) == []
    assert shelves.levels("a0") is None and shelves.levels("b0") is not None
    shelves.put(second, "huge", _film("huge", 60_000))
    assert shelves.size() == 0


def test_pages_without_a_film_are_forgotten_first():
    shelves = Shelves(most_pages=5)
    token, shelf = shelves.open("", "first")
    shelves.put(shelf, "a", _film("a"))
    for number in range(50):
        shelves.open("", str(number))
    assert shelves.open(token, "again")[1] is shelf and len(shelves._pages) == 5


def test_values_are_told_to_who_has_their_key():
    shelves = Shelves()
    _, shelf = shelves.open("", "first")
    shelves.put(shelf, "key", Shelved(Picture("{}", b"values")))

    def fetch(key: bytes):
        async def receive():
            return {"type": "http.request", "body": key, "more_body": False}

        answering = shelves.answer(Request({"type": "http", "method": "POST", "headers": []}, receive))
        with pytest.raises(StopIteration) as end:  # it waits for nothing
            answering.send(None)
        return end.value.value

    answer = fetch(b"key")
    assert answer.body == b"values" and answer.headers["cache-control"] == "no-store"
    assert fetch(b"another").status_code == fetch(b"").status_code == fetch(b"\xff").status_code == 404
    assert shelf.read() == []  # it has no reading yet
