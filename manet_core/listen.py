"""A DICOM receiver: films that are sent by C-STORE are analysed, and results go into a folder or back to a PACS.

It keeps nothing of what it is sent: a film waits in memory, and is forgotten when it has been read.
"""

import logging
import re
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from socketserver import BaseServer

from pydicom import dcmread, uid
from pynetdicom import AE, build_context, evt
from pynetdicom.sop_class import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    GrayscaleSoftcopyPresentationStateStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    Verification,
)
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

from .dicom_out import NAME, dicom_out, is_own
from .files.raster import MAX_BYTES
from .files.xray import XRayError, load_xray
from .pipeline import Analysis, Pipeline
from .results import Results, replace_file

_FILMS = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
)
_RESULTS = {  # the kinds of `dicom_out`
    "report": SecondaryCaptureImageStorage,
    "lungs": SegmentationStorage,
    "outline": GrayscaleSoftcopyPresentationStateStorage,
}
_SYNTAXES = [
    *(uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian),
    *(uid.ExplicitVRBigEndian, uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless),
    *(uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless, uid.JPEG2000),
]
MOST_CALLERS = 10  # associations at once
MOST_HELD = 1 << 30  # bytes of all films that wait or are arriving
MOST_PDU = 1 << 17  # bytes of one piece of a message
SILENCE_S = 30  # in which a piece must come whole
PAUSE_S = 60  # for which no film is taken after results could not be written
TRIES_S = (0, 2, 8)  # waits before the attempts to send a result
FILMS_A_FOLDER = 1000  # after which another folder is begun, as results.json is written whole again and again
SUCCESS, OUT_OF_RESOURCES, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000  # PS3.4, table B.2-1


@dataclass(frozen=True)
class Peer:
    """Another DICOM program: its AE title, host and port."""

    title: str
    host: str
    port: int


class Receiver:
    """Takes films while it analyses those before.

    Args:
        pipe: the networks.
        title: own AE title; whoever calls another is refused.
        allowed: AE titles that may call; () for all.
        classes: the columns of results.csv; None: it is not written.
        out: folder for results, in which each run has its own folder; None: none are written.
        return_to: where the DICOM objects are sent.
        most_waiting: films that wait to be read; a further one is refused with the status "out of resources".
    """

    def __init__(
        self,
        pipe: Pipeline,
        title: str = "MANET",
        allowed: Iterable[str] = (),
        classes: list[str] | None = None,
        out: Path | None = None,
        return_to: Peer | None = None,
        most_waiting: int = 64,
    ):
        self.pipe, self.return_to, self.most_waiting = pipe, return_to, most_waiting
        self._folder = None if out is None else _Folder(out, classes)
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._changed, self._over, self._paused = threading.Condition(), False, 0.0
        self._worker = threading.Thread(target=self._work, name="reader")
        self._server: ThreadedAssociationServer | None = None
        # Its log may quote what callers send. A name that logs nowhere else stays silent.
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
        self._ae = AE(title)
        self._ae.require_called_aet, self._ae.require_calling_aet = True, list(allowed)
        self._ae.maximum_associations, self._ae.maximum_pdu_size = MOST_CALLERS, MOST_PDU
        self._ae.acse_timeout = self._ae.dimse_timeout = SILENCE_S
        self._ae.network_timeout = self._ae.connection_timeout = SILENCE_S
        self._ae.add_supported_context(Verification)
        for film in _FILMS:
            self._ae.add_supported_context(film, _SYNTAXES)

    def start(self, host: str = "127.0.0.1", port: int = 11112) -> tuple[str, int]:
        """Begin to listen; returns the address, whose port is a free one if 0 was given.

        Raises:
            OSError: the address is taken or is none of this machine's.
        """
        self._server = self._ae.make_server(
            (host, port), evt_handlers=[(evt.EVT_C_STORE, self._take)], server_class=_Server, request_handler=_Caller
        )
        self._server.held = self.held
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="listener", daemon=True).start()
        self._worker.start()
        return self._server.server_address[:2]

    def stop(self) -> None:
        """Take no more, and finish what was accepted; from another thread or a second time: give up what waits."""
        if self._server is not None:
            server, self._server = self._server, None
            BaseServer.shutdown(server)  # pynetdicom's own counts on its own way of making a server
            server.server_close()
            for association in server.active_associations:
                association.abort()
        else:
            self._waiting.clear()
        with self._changed:
            self._over = True
            self._changed.notify()
        if self._worker.ident is not None:
            self._worker.join()

    def held(self) -> int:
        """Bytes of the films that wait or are arriving."""
        arriving = 0 if self._server is None else sum(map(_arrived, self._server.active_associations))
        return arriving + sum(len(data) for _, data in list(self._waiting))

    def _take(self, event: evt.Event) -> int:
        """The status of a film that was sent: it waits, or there is no room for it."""
        if event.request.DataSet is None:
            return NOT_UNDERSTOOD
        data = event.encoded_dataset()
        with self._changed:
            if len(self._waiting) >= self.most_waiting or time.monotonic() < self._paused or self._over:
                return OUT_OF_RESOURCES
            self._waiting.append((str(event.request.AffectedSOPInstanceUID), data))
            self._changed.notify()
        return SUCCESS

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._over)
                if not self._waiting:
                    break
                name, data = self._waiting.popleft()
                last = not self._waiting
            name = name if re.fullmatch(r"[0-9.]{1,64}", name) else "unnamed"  # it will be that of a file
            try:
                self._answer(name, data, last)
            except OSError as error:
                self._paused = time.monotonic() + PAUSE_S
                print(f"{name}: The result cannot be written ({error.strerror}); make room.", file=sys.stderr)
            except Exception as error:  # one film is to hurt no other
                print(f"{name}: The result cannot be told ({type(error).__name__}); report this.", file=sys.stderr)
            del data  # which would be kept until the next film comes

    def _answer(self, name: str, data: bytes, last: bool) -> None:
        """Read a film, and write or send what comes of it."""
        found, files, fault = self._read(data)
        if isinstance(found, Analysis) and files and self.return_to is not None:
            fault = self._send(files) or fault
        if fault or isinstance(found, str):
            print(f"{name}: {fault or found}", file=sys.stderr)
        if self._folder is not None:
            self._folder.write(name, found, files, fault, save=last)

    def _read(self, data: bytes) -> tuple[Analysis | str, dict[str, bytes], str | None]:
        """The analysis or the sentence why there is none; the DICOM objects; the sentence why one is missing."""
        if is_own(data):  # a PACS may send on what was returned to it
            return f"This is a result of {NAME} itself, not a film; it is not analysed.", {}, None
        try:
            analysis = self.pipe.analyze(load_xray(data))
        except XRayError as error:
            return str(error), {}, None
        except Exception as error:  # one film is to hurt no other
            return f"The analysis failed ({type(error).__name__}); report this.", {}, None
        try:
            made = dicom_out(analysis, self.pipe, data)
        except XRayError as error:
            return analysis, {}, str(error)
        except Exception as error:
            return analysis, {}, f"The DICOM objects could not be made ({type(error).__name__}); report this."
        return analysis, made.files, " ".join(made.missing) or None

    def _send(self, files: dict[str, bytes]) -> str | None:
        """Send results to `return_to`; the sentence why that failed.

        What the peer takes by no means is not tried again.
        """
        left, title = dict(files), self.return_to.title
        for seconds in TRIES_S:
            time.sleep(seconds)
            contexts = [build_context(_RESULTS[kind]) for kind in left]
            association = self._ae.associate(self.return_to.host, self.return_to.port, contexts, ae_title=title)
            if not association.is_established:
                continue
            taken = {context.abstract_syntax for context in association.accepted_contexts}
            try:
                with undisturbed(association):
                    for kind in [kind for kind in left if _RESULTS[kind] in taken]:
                        if _stored(association, left[kind]):
                            del left[kind]
            finally:
                association.release()
            if not any(_RESULTS[kind] in taken for kind in left):
                return f"{title} takes no such DICOM object: {', '.join(left)}." if left else None
        return f"{len(left)} of {len(files)} results could not be sent to {title}; see whether it runs."


@contextmanager
def undisturbed(association) -> Iterator[None]:
    """While this lasts, the thread of an association that we asked for rests.

    About once in a thousand times it takes the answer that `send_c_store` waits for, until that gives up.
    """
    gate = association._reactor_checkpoint
    gate.clear()
    while association.is_established and not association._is_paused:
        time.sleep(0.001)
    time.sleep(0.02)  # it says that it rests just before it does
    gate.set = lambda: None
    try:
        yield
    finally:
        del gate.set
        gate.set()


def _stored(association, data: bytes) -> bool:
    """Whether a peer has taken an object."""
    try:
        status = association.send_c_store(dcmread(BytesIO(data)))
    except (RuntimeError, ValueError):  # the association is over, or the peer takes no such object
        return False
    return status.get("Status") in (SUCCESS, 0xB000, 0xB006, 0xB007)  # the latter are warnings


class _Folder:
    """results.json, results.csv and DICOM files, in a folder named for the moment when it was begun.

    Raises:
        OSError: as `Results` has it.
    """

    def __init__(self, out: Path, classes: list[str] | None):
        self.out, self._classes = out, classes
        self._begin()

    def _begin(self) -> None:
        begun, number = time.strftime("%Y%m%d-%H%M%S"), 1
        folder = self.out / begun
        while folder.exists():
            folder, number = self.out / f"{begun}-{number}", number + 1
        folder.mkdir(parents=True)
        self._results, self._names = Results(folder, self._classes), Counter()

    def write(self, name: str, found: Analysis | str, files: dict[str, bytes], fault: str | None, save: bool) -> None:
        """Add a film's entry and its files."""
        if self._names.total() >= FILMS_A_FOLDER:
            self._results.save()
            self._begin()
        self._names[name] += 1
        stem = name if self._names[name] == 1 else f"{name}-{self._names[name]}"  # sent again
        for kind, data in files.items():
            replace_file(self._results.folder / f"{stem}-{kind}.dcm", data)
        if isinstance(found, str):
            self._results.refuse(stem, found)
        else:
            self._results.add(stem, found, fault)
        if save:
            self._results.save()


def _arrived(association) -> int:
    """Bytes of the message that an association is receiving."""
    message = association.dimse.message
    return 0 if message is None else message.data_set.tell() + message.encoded_command_set.tell()


class _Server(ThreadedAssociationServer):
    """A server that hangs up on more callers than it has ears for."""

    def verify_request(self, request, client_address) -> bool:
        return len(self.active_associations) < 2 * MOST_CALLERS  # from `MOST_CALLERS` on they are refused politely


class _Caller(RequestHandler):
    """A connection of which no more is read than there is room for."""

    def _create_association(self):
        association = super()._create_association()
        socket = association.dul.socket
        socket.recv = partial(_receive, socket)
        return association


def _receive(connection: AssociationSocket, count: int) -> bytearray:
    """The next bytes of what a caller sends.

    Pynetdicom believes whatever length a caller claims, and waits for it for ever.

    Raises:
        OSError: they are too many or too slow, which ends the association.
    """
    association = connection.assoc
    arrived = _arrived(association)
    if count > MOST_PDU + 6 or arrived + count > MAX_BYTES:
        raise OSError("too much at once")
    if arrived and association._server.held() > MOST_HELD or association.dimse.msg_queue.qsize() > 1:
        raise OSError("no room")
    data, end = bytearray(), time.monotonic() + SILENCE_S
    while len(data) < count:
        connection.socket.settimeout(max(0.01, end - time.monotonic()))
        piece = connection.socket.recv(count - len(data))
        if not piece:
            break
        data += piece
    connection.socket.settimeout(SILENCE_S)
    return data
