"""From an upload in Gradio's temporary folder to an `XRay`, leaving nothing on the disk."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from manet_core import XRay, XRayError, load_xray

from .startup import gr


class OwnUpload(gr.route_utils.GradioUploadFile):
    """An upload with a folder of its own.

    Gradio names the folder by a hash of the file's bytes: a class that drops the same picture at the same time would
    share one file, and the first reader deletes it. Chance goes into the hash, too.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.sha.update(secrets.token_bytes(32))


class Uploads:
    """Reads each upload once and deletes it at that moment.

    Args:
        folder: where Gradio stores uploads; nothing outside it is read or deleted.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()

    def read(self, upload: dict | None) -> XRay:
        """The X-ray of an upload ({"path": ..., ...}, as Gradio hands it over).

        Raises:
            XRayError: it is no readable X-ray, or no upload of this server.
        """
        path = self._path(upload)
        try:
            return load_xray(path)
        finally:
            _delete(path)

    @contextmanager
    def opened(self, upload: dict) -> Iterator[BinaryIO]:
        """An upload's bytes as a stream; the file is deleted from the folder at once.

        Raises:
            XRayError: it is no upload of this server, or it is gone.
        """
        path = self._path(upload)
        try:
            stream = path.open("rb")
        except OSError:
            raise XRayError("The file is no longer here; send it again.") from None
        with stream:
            if os.name != "nt":  # an open file can lose its name there, and keeps its bytes until it is closed
                _delete(path)
            yield stream
        _delete(path)

    def discard(self, upload: dict) -> None:
        """Delete an upload that will not be read."""
        with suppress(XRayError):
            _delete(self._path(upload))

    def _path(self, upload: dict | None) -> Path:
        try:
            path = Path(upload["path"]).resolve()
        except (KeyError, TypeError, ValueError, OSError):
            raise XRayError("There is no file in the request; send one image file.") from None
        if not path.is_relative_to(self.folder):
            raise XRayError("The path is not an upload of this server; send the file itself.")
        return path


def stored(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # deleted meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def sweep(folder: Path, age_s: float) -> None:
    """Delete what has lain in a folder for longer than `age_s`: uploads that nobody asked to be read, or cut short."""
    for path in sorted(folder.rglob("*"), reverse=True):
        with suppress(OSError):  # deleted meanwhile, or a folder that is not empty
            if path.is_dir():
                path.rmdir()
            elif time.time() - path.stat().st_mtime > age_s:
                path.unlink()


def _delete(path: Path) -> None:
    """Delete a file, and the folder of its own in which Gradio stored it."""
    path.unlink(missing_ok=True)
    try:
        path.parent.rmdir()
    except OSError:  # not empty, or gone already
        pass
