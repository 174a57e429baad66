"""results.json and results.csv of a folder, which can be read at any moment while they grow."""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from .pipeline import Analysis
from .table import csv_head, csv_lines, rows

_EVERY_S = 1.0  # seconds between two savings of a short file
_SHARE = 0.02  # of the time is spent on saving at most, as each saving writes everything anew


class Results:
    """What is known of the files so far; `save` replaces the files in the folder whole.

    An entry is encoded once, when it is added. Ten thousand of them are about 30 MB, written anew in a twentieth of
    a second; as savings then come further apart, an archive costs the same for each film however many there are.
    """

    def __init__(self, folder: Path, classes: Iterable[str] | None = None):
        """Nothing is known yet, and the files say so.

        Args:
            folder: is there already.
            classes: columns of results.csv; None: it is not written.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.folder, self.failed = folder, 0
        self._entries: list[str] = []
        self._classes = None if classes is None else list(classes)
        self._lines = [] if self._classes is None else [csv_head(self._classes)]
        self.save()

    def add(self, file: str, analysis: Analysis, fault: str | None = None) -> None:
        """A file that was analysed, and the sentence why something else failed, such as its panel."""
        self.failed += fault is not None
        self._add({"file": file} | analysis.to_dict() | ({"fault": fault} if fault else {}), rows(file, analysis))

    def refuse(self, file: str, error: str) -> None:
        """A file that was not read, and the sentence why."""
        self.failed += 1
        self._add({"file": file, "error": error}, [{"file": file, "error": error}])

    def _add(self, entry: dict, found: list[dict]) -> None:
        self._entries.append(json.dumps(entry, indent=2))
        if self._classes is not None:
            self._lines.append(csv_lines(found, self._classes))
        if time.monotonic() > self._next:
            try:
                self.save()
            except PermissionError:  # on Windows, while somebody has the file open: the next saving tries again
                self._next = time.monotonic() + _EVERY_S

    def save(self) -> None:
        """Write all that is known.

        Raises:
            OSError: the folder cannot be written to, or the disk is full; the files are as they were.
        """
        started = time.monotonic()
        replace_file(self.folder / "results.json", (self.json() + "\n").encode())
        if self._classes is not None:
            # the name of a file may hold bytes that are no UTF-8
            replace_file(self.folder / "results.csv", "".join(self._lines).encode(errors="backslashreplace"))
        ended = time.monotonic()
        self._next = ended + max(_EVERY_S, (ended - started) / _SHARE)

    def json(self) -> str:
        """The text of results.json: a list with an entry for each file."""
        return "[\n" + ",\n".join(self._entries) + "\n]" if self._entries else "[]"


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or as it was, never in part.

    Raises:
        OSError: it cannot be written.
    """
    # A name that fits, however long that of the file, and that no other process takes
    part = path.with_name(f"unfinished.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
