"""Where an archive's X-rays lie: folders, patterns, zip archives, lists, and whatever fsspec has an address for."""

import glob
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from .files.dicom import looks_like_dicom
from .files.raster import MAX_BYTES
from .files.xray import XRay, XRayError, load_xray

# What zipfile raises of an archive that is damaged, has a password or is packed in a way that it does not know
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # NotImplementedError is a RuntimeError
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom")


class SourceError(ValueError):
    """A source that cannot be listed; its text is one sentence that says which and why."""


class FetchError(XRayError):
    """An X-ray that its store did not give this time, and may give another time."""


def is_picture(path: Path) -> bool:
    """Whether a file is to be read if its folder is: it is called as a picture is, or it begins as DICOM does."""
    if path.suffix.lower() in SUFFIXES:
        return True
    if path.name == "DICOMDIR" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return looks_like_dicom(file.read(132))
    except OSError:
        return False


def pictures_in(
    folder: str | Path,
    recursive: bool = True,
    leave_out: str | Path | None = None,
    onerror: Callable[[OSError], None] | None = None,
) -> Iterator[Path]:
    """The pictures in a folder by name, then those of the folders within it; none that are hidden.

    Args:
        folder: searched for files that `is_picture`.
        recursive: whether the folders within it are searched, too.
        leave_out: a folder within it that is not; None: all are.
        onerror: called for a folder that cannot be read, which is left out otherwise.
    """
    for root, folders, names in os.walk(folder, onerror=onerror):
        within = [name for name in sorted(folders) if not name.startswith(".")] if recursive else []
        folders[:] = [name for name in within if leave_out is None or not _same(Path(root, name), leave_out)]
        paths = (Path(root, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if is_picture(path))


def _same(one: str | Path, other: str | Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def film_names(sources: Iterable[str]) -> list[str]:
    """The name of every X-ray in the sources, each once, in their order: an absolute path, or an address.

    Args:
        sources: files; folders, of which all pictures are taken, those of the folders within too; patterns such as
            "films/*.dcm"; zip archives, whose members are called "zip://MEMBER::ARCHIVE"; "@FILE", a text file with
            a source a line; and addresses of fsspec, of a file or a folder, such as "s3://bucket/films".

    Raises:
        SourceError: there is no such source, it cannot be listed, or there is no picture in it.
    """
    return list(dict.fromkeys(name for source in sources for name in _names(source)))


def _names(source: str) -> Iterator[str]:
    if source.startswith("@"):
        try:
            lines = Path(source[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise SourceError(f"The list {source[1:]} cannot be read; give a text file with a source a line.") from None
        for line in lines:
            if line.strip():
                yield from _names(line.strip())
        return
    found = _of_address(source) if "://" in source else _of_path(source)
    if not (found := list(found)):
        raise SourceError(f"There is no picture in {source}.")
    yield from found


def _of_path(source: str) -> Iterator[str]:
    path = os.path.abspath(source)
    if os.path.isdir(path):
        yield from map(str, pictures_in(path))
    elif path.lower().endswith(".zip"):
        yield from _members(path)
    elif os.path.exists(path) or not glob.has_magic(source):
        yield path  # one that is not there is told of in its row
    else:
        yield from sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))


def _of_address(source: str) -> Iterator[str]:
    if source.startswith("zip://") and "::" in source:
        yield source  # a member, as a list may name it
        return
    system, path = file_system(source)
    if source.lower().endswith(".zip"):
        yield from _members(source)
        return
    try:
        found = system.glob(path) if glob.has_magic(path) else system.find(path)
    except Exception as error:  # each kind of store has its own
        raise SourceError(f"{source} cannot be listed ({type(error).__name__}).") from None
    names = [name for name in sorted(found) if Path(name).suffix.lower() in SUFFIXES]
    yield from (system.unstrip_protocol(name) for name in names)


def file_system(address: str) -> tuple:
    """The fsspec file system of an address or of a path on disk, and the path in it.

    Raises:
        SourceError: fsspec knows no such address, or needs another package for it.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except ImportError as error:
        raise SourceError(f"{address} needs another package: {error}") from None
    except ValueError:
        raise SourceError(f"{address} is no address that fsspec knows.") from None


@lru_cache(maxsize=8)
def _archive(source: str) -> zipfile.ZipFile:
    if "://" in source:
        system, path = file_system(source)
        return zipfile.ZipFile(system.open(path, "rb"))
    return zipfile.ZipFile(source)


def _members(archive: str) -> Iterator[str]:
    try:
        listed = _archive(archive).infolist()
    except (*ZIP_ERRORS, OSError):
        raise SourceError(f"{archive} is damaged or no zip archive; make it again.") from None
    for member in listed:
        if not member.is_dir() and not Path(member.filename).name.startswith("."):
            yield f"zip://{member.filename}::{archive}"


def read_film(name: str) -> XRay:
    """The X-ray that `film_names` calls so.

    Raises:
        XRayError: it cannot be read; one sentence that says why.
        FetchError: its store did not answer, which says nothing of the X-ray.
    """
    if "://" not in name:
        return load_xray(name)
    packed = name.startswith("zip://")
    try:
        if packed:
            member, _, archive = name.removeprefix("zip://").partition("::")
            with _archive(archive).open(member) as file:
                data = file.read(MAX_BYTES + 1)
        else:
            system, path = file_system(name)
            with system.open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise XRayError("There is no such file.") from None
    except Exception as error:  # each kind of store has its own
        if packed and isinstance(error, (*ZIP_ERRORS, KeyError)):
            raise XRayError("The file cannot be unpacked; make the archive again, without a password.") from None
        raise FetchError(f"The file cannot be fetched ({type(error).__name__}).") from None
    return load_xray(data)
