"""The DICOM receiver, called by pynetdicom's own client and by dcmtk's."""

import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager, nullcontext

import pytest
from conftest import hangs_up, wait_until
from pydicom import dcmread
from pydicom.uid import RLELossless, SecondaryCaptureImageStorage, SegmentationStorage
from pynetdicom import AE, StoragePresentationContexts, evt
from pynetdicom.sop_class import CTImageStorage, Verification
from test_dicom_out import FILM, IDENTITY
from test_xray import dicom, one_sentence

from manet_core import Pipeline, listen
from manet_core.__main__ import main
from manet_core.dicom_out import NAME
from manet_core.listen import OUT_OF_RESOURCES, SUCCESS, Peer, Receiver

DCMTK = pytest.mark.skipif(shutil.which("storescu") is None, reason="there is no storescu: apt-get install dcmtk")
WAIT_S = float(os.environ.get("MANET_TEST_WAIT", 120))


@pytest.fixture(scope="module")
def pipe(weights):
    """The shipped segmenter alone."""
    return Pipeline.load(weights, [])


@pytest.fixture
def no_report(monkeypatch):
    """Draws no report, which takes a second: the lungs alone are made."""
    whole = listen.dicom_out
    monkeypatch.setattr(listen, "dicom_out", lambda *given: whole(*given, kinds=["lungs"]))


def _film(**header) -> bytes:
    return dicom(FILM, bits=12, **IDENTITY | header)


def _dataset(data: bytes):
    dataset = dcmread(io.BytesIO(data))
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


@contextmanager
def listening(receiver: Receiver):
    """The port of a receiver; on leaving, all that it accepted is done."""
    try:
        yield receiver.start(port=0)[1]
    finally:
        receiver.stop()


@contextmanager
def calling(port: int, title: str = "MODALITY", called: str = "MANET"):
    """An association with a receiver, established or not."""
    ae = AE(title)
    ae.add_requested_context(Verification)
    ae.add_requested_context(CTImageStorage)
    for film in (SecondaryCaptureImageStorage, "1.2.840.10008.5.1.4.1.1.1.1"):
        ae.add_requested_context(film)
        ae.add_requested_context(film, RLELossless)
    association = ae.associate("127.0.0.1", port, ae_title=called)
    try:
        with listen.undisturbed(association) if association.is_established else nullcontext():
            yield association
    finally:
        association.release()


def _entries(out) -> list[dict]:
    (folder,) = out.iterdir()
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_films_are_analysed_and_one_bad_one_hurts_nobody(pipe, no_report, tmp_path, capfd):
    compressed = _dataset(_film())
    compressed.compress(RLELossless)
    small = _dataset(dicom(FILM[:20, :20].copy(), bits=12, **IDENTITY))
    cut = _dataset(_film())
    cut.PixelData = cut.PixelData[:-1000]
    homeless = _dataset(_film(SeriesInstanceUID=""))
    sent = [_dataset(_film()), small, compressed, cut, homeless]
    with listening(Receiver(pipe, classes=["Normal"], out=tmp_path / "out")) as port:
        with calling(port) as association:
            assert association.send_c_echo().Status == SUCCESS
            assert [association.send_c_store(dataset).Status for dataset in [*sent, sent[0]]] == [SUCCESS] * 6
    entries = _entries(tmp_path / "out")
    names = [str(dataset.SOPInstanceUID) for dataset in sent]
    assert [entry["file"] for entry in entries] == [*names, f"{names[0]}-2"]
    assert ["lung_area" in entry for entry in entries] == [True, False, True, False, True, True]
    assert "20×20" in entries[1]["error"] and "damaged" in entries[3]["error"] and "which study" in entries[4]["fault"]
    (folder,) = (tmp_path / "out").iterdir()
    made = {names[0], names[2], f"{names[0]}-2"}
    assert {path.name for path in folder.iterdir()} == {f"{name}-lungs.dcm" for name in made} | {
        "results.json", "results.csv",
    }  # fmt: skip
    lungs = dcmread(folder / f"{names[0]}-lungs.dcm")
    assert lungs.PatientName == IDENTITY["PatientName"] and lungs.StudyInstanceUID == IDENTITY["StudyInstanceUID"]
    told = capfd.readouterr()
    for text in (told.out, told.err, *(path.read_text(encoding="utf-8") for path in folder.glob("results.*"))):
        assert not any(str(IDENTITY[name]) in text for name in ("PatientName", "PatientID", "AccessionNumber"))


def test_only_who_is_allowed_may_call_and_only_by_name(pipe, tmp_path):
    with listening(Receiver(pipe, title="SECOND", allowed=["PACS", "MODALITY"], out=tmp_path / "out")) as port:
        for title, called, welcome in (
            ("MODALITY", "SECOND", True),
            ("STRANGER", "SECOND", False),
            ("MODALITY", "MANET", False),
        ):
            with calling(port, title, called) as association:
                assert association.is_established == welcome
        with calling(port, called="SECOND") as association:
            with pytest.raises(ValueError, match="presentation context"):
                dataset = _dataset(_film())
                dataset.SOPClassUID = CTImageStorage
                association.send_c_store(dataset)


def test_results_are_sent_back(pipe, no_report, tmp_path, monkeypatch, capfd):
    """To a peer that hangs up at first; the second film's results are never taken."""
    monkeypatch.setattr(listen, "TRIES_S", (0, 0.1))
    got, ae = [], AE("PACS")

    def take(event):
        got.append(event.dataset)
        return 0xA700 if len(got) != 2 else SUCCESS

    ae.supported_contexts = StoragePresentationContexts
    pacs = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, take)])
    film = _dataset(_film())
    peer = Peer("PACS", "127.0.0.1", pacs.server_address[1])
    with listening(Receiver(pipe, return_to=peer)) as port, calling(port) as association:
        for dataset in (film, _dataset(_film())):
            assert association.send_c_store(dataset).Status == SUCCESS
    pacs.shutdown()
    assert len(got) == 4 and got[1].Modality == "SEG" and got[1].PatientID == IDENTITY["PatientID"]
    assert got[1].SourceImageSequence[0].ReferencedSOPInstanceUID == film.SOPInstanceUID
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "1 of 1 results could not be sent to PACS" in said[0]


def test_what_a_peer_takes_by_no_means_is_not_tried_again(pipe, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(listen, "TRIES_S", (0, WAIT_S))
    whole, got, ae = listen.dicom_out, [], AE("PACS")
    monkeypatch.setattr(listen, "dicom_out", lambda *given: whole(*given, kinds=["lungs", "outline"]))

    def take(event):
        got.append(event.dataset.Modality)
        return SUCCESS

    ae.add_supported_context(SegmentationStorage)
    pacs = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, take)])
    begun = time.monotonic()
    with listening(Receiver(pipe, return_to=Peer("PACS", "127.0.0.1", pacs.server_address[1]))) as port:
        with calling(port) as association:
            assert association.send_c_store(_dataset(_film())).Status == SUCCESS
    pacs.shutdown()
    assert got == ["SEG"] and time.monotonic() - begun < WAIT_S
    assert "PACS takes no such DICOM object: outline." in capfd.readouterr().err


class Slow:
    """A pipeline that waits to be let on."""

    def __init__(self, seconds: float = 0.3):
        self.seconds, self.begun = seconds, 0

    def analyze(self, film):
        self.begun += 1
        time.sleep(self.seconds)
        raise RuntimeError("a network that fails")


def test_a_full_queue_refuses_with_the_right_status_and_what_was_accepted_is_done(tmp_path, capfd):
    with listening(Receiver(Slow(), out=tmp_path / "out", most_waiting=2)) as port, calling(port) as association:
        film = _dataset(_film())
        statuses = [association.send_c_store(film).Status for _ in range(8)]
    assert statuses[:2] == [SUCCESS] * 2 and set(statuses) == {SUCCESS, OUT_OF_RESOURCES}
    entries = _entries(tmp_path / "out")
    assert len(entries) == statuses.count(SUCCESS)
    assert {entry["error"] for entry in entries} == {"The analysis failed (RuntimeError); report this."}


def test_what_is_its_own_and_comes_back_is_not_analysed(tmp_path, capfd):
    pipe = Slow(0)
    sent = [_dataset(_film(Manufacturer=maker)) for maker in (NAME, f"Not {NAME}", None)]
    with listening(Receiver(pipe, out=tmp_path / "out")) as port, calling(port) as association:
        assert [association.send_c_store(dataset).Status for dataset in sent] == [SUCCESS] * 3
    said = [entry["error"] for entry in _entries(tmp_path / "out")]
    assert said[0] == "This is a result of MANet itself, not a film; it is not analysed." and one_sentence(said[0])
    assert pipe.begun == 2 and all("RuntimeError" in error for error in said[1:])


def test_a_folder_that_cannot_be_written_pauses(tmp_path, monkeypatch, capfd):
    receiver = Receiver(Slow(0), out=tmp_path / "out")

    def full(*given, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(receiver._folder, "write", full)
    with listening(receiver) as port, calling(port) as association:
        assert association.send_c_store(_dataset(_film())).Status == SUCCESS
        wait_until(lambda: receiver._paused)
        assert association.send_c_store(_dataset(_film())).Status == OUT_OF_RESOURCES
    assert "No space left on device" in capfd.readouterr().err


def test_long_runs_begin_new_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(listen, "FILMS_A_FOLDER", 2)
    folder = listen._Folder(tmp_path, None)
    for number in range(5):
        folder.write(str(number), "no film", {}, None, save=number == 4)
    counts = [len(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(tmp_path.rglob("results.json"))]
    assert sorted(counts) == [1, 2, 2]


def test_hostile_callers_are_left_and_others_served(tmp_path, monkeypatch):
    """Claims of gigabytes, nonsense, silence, trickles, and films without an end."""
    monkeypatch.setattr(listen, "SILENCE_S", 0.5)
    monkeypatch.setattr(listen, "MAX_BYTES", 3_000_000)
    receiver = Receiver(Slow(0), out=tmp_path / "out")
    receiver._ae.network_timeout = 0.5
    with listening(receiver) as port:
        address = ("127.0.0.1", port)
        tracemalloc.start()
        for begun in (
            struct.pack(">BBL", 1, 0, 0xFFFFFFF0),
            struct.pack(">BBL", 4, 0, 0x7FFFFFFF) + bytes(1000),
            struct.pack(">BBL", 1, 0, 200) + bytes(200),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            struct.pack(">BBL", 1, 0, 200) + bytes(10),
            b"\1\0",
            b"",
        ):
            with socket.create_connection(address) as hostile:
                hostile.sendall(begun)
                assert hangs_up(hostile)
        with calling(port) as association:
            endless = _dataset(_film())
            endless.PixelData = bytes(8_000_000)
            assert "Status" not in association.send_c_store(endless)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 60_000_000
        with calling(port) as association:
            assert association.send_c_echo().Status == SUCCESS
            assert association.send_c_store(_dataset(_film())).Status == SUCCESS
    assert len(_entries(tmp_path / "out")) == 1


def test_no_more_callers_than_there_are_ears(monkeypatch):
    monkeypatch.setattr(listen, "MOST_CALLERS", 2)
    with listening(Receiver(Slow(0))) as port:
        with calling(port) as first, calling(port) as second, calling(port) as third:
            assert first.is_established and second.is_established and not third.is_established
        with calling(port) as again:
            assert again.send_c_echo().Status == SUCCESS


@DCMTK
def test_dcmtk_calls(pipe, no_report, tmp_path):
    film = _dataset(_film())
    film.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    with listening(Receiver(pipe, allowed=["DCMTK"], out=tmp_path / "out")) as port:
        here = ["-aec", "MANET", "127.0.0.1", str(port)]
        assert subprocess.run(["echoscu", "-aet", "DCMTK", *here]).returncode == 0
        assert subprocess.run(["echoscu", "-aet", "ECHOSCU", *here], capture_output=True).returncode != 0
        assert subprocess.run(["storescu", "-aet", "DCMTK", *here, tmp_path / "film.dcm"]).returncode == 0
    (entry,) = _entries(tmp_path / "out")
    assert entry["file"] == film.SOPInstanceUID and "fault" not in entry


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
def test_sigterm_ends_it_and_what_was_accepted_is_there(weights, no_report, tmp_path, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    statuses = []

    def send_and_end() -> None:
        wait_until(lambda: _listens(port))
        with calling(port) as association:
            statuses.extend(association.send_c_store(_dataset(_film())).Status for _ in range(3))
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send_and_end)
    sender.start()
    command = ["listen", "--weights", str(weights), "--models", "", "--out", str(tmp_path / "out")]
    assert main([*command, "--port", str(port), "--allow", "MODALITY", "--csv"]) == 0
    sender.join()
    assert capsys.readouterr().out == f"MANet listens as MANET at 127.0.0.1:{port} (Ctrl-C ends it).\n"
    assert statuses == [SUCCESS] * 3
    assert ["lung_area" in entry for entry in _entries(tmp_path / "out")] == [True] * 3


def _listens(port: int) -> bool:
    with calling(port) as association:
        return association.is_established


@pytest.mark.parametrize(
    "options, said",
    [
        ([], "Say where results go"),
        (["--out", "x", "--host", "0.0.0.0"], "Name those who may call"),
        (["--return-to", "PACS"], "AE@HOST:PORT"),
        (["--return-to", "PACS@host:0"], "AE@HOST:PORT"),
        (["--out", "x", "--title", "A TITLE THAT IS TOO LONG"], "1 to 16 characters"),
        (["--out", "x", "--host", "192.0.2.1", "--allow", "A"], "choose another --port"),
    ],
)
def test_usage_is_told_in_a_sentence(random_weights, options, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["listen", "--weights", str(random_weights), "--models", "efficientnet_lite0", *options])
    except SystemExit as end:
        status = end.code
    assert status == 2 and said in capsys.readouterr().err


def test_pynetdicom_is_asked_for_where_it_is_missing(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "manet_core.listen")
    monkeypatch.setitem(sys.modules, "pynetdicom", None)
    assert main(["listen", "--out", "x"]) == 2
    assert capsys.readouterr().err == "listen needs one package more: pip install pynetdicom\n"
