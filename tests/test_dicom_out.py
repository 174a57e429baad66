"""Results as DICOM objects, read back by pydicom and by highdicom, and validated by dciodvfy where it is installed."""

import base64
import io
import json
import shutil
import subprocess
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import (
    GrayscaleSoftcopyPresentationStateStorage,
    ImplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)
from skimage.draw import polygon2mask
from test_xray import dicom, lut, one_sentence, picture

from manet_core import Pipeline, XRayError, load_xray
from manet_core.__main__ import main
from manet_core.dicom_out import DESCRIPTION, dicom_out
from manet_core.lungs import Lungs
from manet_core.phantom import phantom, phantom_mask
from manet_core.pipeline import DISCLAIMER
from manet_core.preprocess import resize
from manet_core.report import headline
from manet_core.tasks import get_task
from ui.filing import saved_dicom
from ui.networks import Networks
from ui.uploads import Uploads

FILM = (phantom(200, seed=1).pixels[:180] * 4095).astype(np.uint16)  # 180 rows, 200 columns
STUDY = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
IDENTITY = STUDY | {
    "SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg", "PatientID": "0815", "PatientSex": "M",
    "PatientBirthDate": "19010101", "StudyDate": "20200229", "StudyTime": "101112.5", "AccessionNumber": "A42",
    "StudyID": "7", "StudyDescription": "Thorax p.a.", "ReferringPhysicianName": "Weiß^Änne",
}  # fmt: skip
PRIVATE = {
    "InstitutionName": "Charité",
    "OperatorsName": "Operator^A",
    "PatientComments": "Secret",
    "PatientAge": "99Y",
}


@pytest.fixture(scope="module")
def pipe(weights):
    """The shipped segmenter, which finds the lungs of a phantom, and one network."""
    return Pipeline.load(weights, ["efficientnet_lite0_ma"])


@pytest.fixture(scope="module")
def analysis(pipe):
    return pipe.analyze(load_xray(dicom(FILM, bits=12)))


@pytest.fixture(scope="module")
def source():
    return dicom(FILM, bits=12, PatientOrientation=["L", "F"], **IDENTITY, **PRIVATE)


@pytest.fixture(scope="module")
def made(pipe, analysis, source):
    """{kind: the bytes of a file}."""
    out = dicom_out(analysis, pipe, source)
    assert not out.missing and set(out.files) == {"report", "lungs", "outline"}
    return out.files


@pytest.fixture(scope="module")
def read(made):
    return {kind: dcmread(io.BytesIO(data)) for kind, data in made.items()}


@pytest.fixture(scope="module")
def anonymous(pipe, analysis):
    return dicom_out(analysis, pipe, picture(FILM))


def test_they_are_filed_with_the_film_and_take_no_more_of_its_header(made, read, source):
    film = dcmread(io.BytesIO(source))
    assert read["report"].SOPClassUID == SecondaryCaptureImageStorage
    assert read["lungs"].SOPClassUID == SegmentationStorage
    assert read["outline"].SOPClassUID == GrayscaleSoftcopyPresentationStateStorage
    for kind, dataset in read.items():
        for name in IDENTITY.keys() - {"SeriesInstanceUID"}:
            assert dataset[name].value == film[name].value, name
        for value in PRIVATE.values():
            assert value.encode("latin-1") not in made[kind]
        (referred,) = (
            dataset.ReferencedSeriesSequence[0].ReferencedImageSequence
            if kind == "outline"
            else dataset.SourceImageSequence
        )
        assert referred.ReferencedSOPInstanceUID == film.SOPInstanceUID
        assert referred.ReferencedSOPClassUID == film.SOPClassUID
    together = [*read.values(), film]
    for name in ("SOPInstanceUID", "SeriesInstanceUID"):
        assert len({dataset[name].value for dataset in together}) == 4


def test_they_say_what_they_are_and_what_made_them(read, pipe, analysis, source):
    for dataset in read.values():
        assert dataset.SeriesDescription == DESCRIPTION
        assert DISCLAIMER in dataset.get("DerivationDescription", dataset.get("ContentDescription"))
        assert dataset.Manufacturer == dataset.ManufacturerModelName == "MANet" and dataset.SoftwareVersions
    said = read["report"].ImageComments
    for name, entry in pipe.entries.items():
        assert (f"{name}: {entry['sha256']}" in said) == (name in ("resunet", *analysis.readings))
    (algorithm,) = read["lungs"].SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    assert pipe.entries["resunet"]["sha256"] in algorithm.AlgorithmParameters
    assert read["report"].BurnedInAnnotation == "NO"
    band = read["report"].pixel_array[:36]
    assert (band == 0).all(2).mean() > 0.7 and (band == 255).all(2).sum() > 500  # white on black
    again = dcmread(io.BytesIO(dicom_out(analysis, pipe, source, ["lungs"]).files["lungs"]))
    assert again.SOPInstanceUID != read["lungs"].SOPInstanceUID


def test_the_lungs_lie_on_the_stored_pixels(made, read, analysis):
    (mask,) = hd.seg.segread(io.BytesIO(made["lungs"])).get_pixels_by_source_instance(
        [read["lungs"].SourceImageSequence[0].ReferencedSOPInstanceUID], combine_segments=True
    )
    assert mask.shape == FILM.shape and (mask == analysis.mask).all()
    drawn = phantom_mask(200, seed=1)[:180]
    assert (mask & drawn).sum() / (mask | drawn).sum() > 0.75
    assert read["lungs"].PatientOrientation == ["L", "F"]


STORED = {
    "MONOCHROME1": lambda: dicom(4095 - FILM, bits=12, PhotometricInterpretation="MONOCHROME1", **STUDY),
    "inverse": lambda: dicom(4095 - FILM, bits=12, PresentationLUTShape="INVERSE", **STUDY),
    "negative slope": lambda: dicom(4095 - FILM, bits=12, RescaleSlope=-1, RescaleIntercept=0, **STUDY),
    "one frame": lambda: dicom(FILM, bits=12, NumberOfFrames=1, **STUDY),
    "compressed": lambda: _compressed(dicom(FILM, bits=12, **STUDY)),
    "turned view": lambda: dicom(FILM, bits=12, PatientOrientation=["F", "R"], FieldOfViewRotation=90, **STUDY),
    "without preamble": lambda: dicom(FILM, bits=12, bare=True, **STUDY),
}


SHOWN = {name: STORED[name] for name in ("MONOCHROME1", "inverse", "negative slope")} | {
    "window": lambda: dicom(FILM, bits=12, WindowCenter=1500, WindowWidth=2000, **STUDY),
    "LUT": lambda: dicom(FILM, bits=12, VOILUTSequence=_table(), WindowCenter=100, WindowWidth=9, **STUDY),
    "implicit LUT": lambda: dicom(FILM, bits=12, VOILUTSequence=_table(), syntax=ImplicitVRLittleEndian, **STUDY),
}


def _table() -> list[Dataset]:
    """A VOI LUT that brightens, with a free text that is nobody else's business."""
    (item,) = lut(0, 65535 * (np.arange(4096) / 4095) ** 0.6)
    item.LUTExplanation = "Secret"
    return [item]


def _compressed(data: bytes) -> bytes:
    dataset, file = dcmread(io.BytesIO(data)), io.BytesIO()
    dataset.compress(RLELossless)
    dataset.save_as(file)
    return file.getvalue()


@pytest.mark.parametrize("name", STORED)
def test_however_a_film_is_stored_its_mask_is_the_same(pipe, analysis, name):
    """The header says how a film is to be shown; a segmentation counts rows and columns as they are stored."""
    data = STORED[name]()
    assert load_xray(data).pixels.shape == FILM.shape
    lungs = dcmread(io.BytesIO(dicom_out(analysis, pipe, data, ["lungs"]).files["lungs"]))
    assert (lungs.pixel_array.astype(bool) == analysis.mask).all()


def test_the_outline_encloses_the_mask_and_the_text_names_no_more_than_the_report(read, analysis):
    outline, text = (item for item in read["outline"].GraphicAnnotationSequence)
    assert {item.GraphicAnnotationUnits for item in outline.GraphicObjectSequence} == {"PIXEL"}
    enclosed = np.zeros(FILM.shape, bool)
    for item in outline.GraphicObjectSequence:
        corners = np.reshape(item.GraphicData, (-1, 2))
        assert (corners[0] == corners[-1]).all() and (corners >= 0).all() and (corners <= FILM.shape[::-1]).all()
        enclosed ^= polygon2mask(FILM.shape, corners[:, ::-1] - 0.5)
    assert (enclosed & analysis.mask).sum() / (enclosed | analysis.mask).sum() > 0.97
    (said,) = text.TextObjectSequence
    assert said.UnformattedTextValue.splitlines() == [headline(analysis, get_task("manet")), DISCLAIMER]


@pytest.mark.skipif(shutil.which("dcmp2pgm") is None, reason="dcmp2pgm is not installed: apt-get install dcmtk")
@pytest.mark.parametrize("name", ["MONOCHROME1", "inverse", "negative slope", "window", "LUT", "implicit LUT"])
def test_a_viewer_shows_the_film_under_the_outline_as_we_do(pipe, analysis, name, tmp_path):
    """DCMTK renders the film by the presentation state: the same greys as ours, up to its 256 levels."""
    stored = (tmp_path / "film.dcm", tmp_path / "state.dcm")
    data = SHOWN[name]()
    xray = load_xray(data)
    out = dicom_out(replace(analysis, original=xray.pixels), pipe, data, ["outline"])
    for path, content in zip(stored, (data, out.files["outline"])):
        path.write_bytes(content)
    assert b"Secret" not in out.files["outline"]
    command = ["dcmp2pgm", "--pstate", stored[1], stored[0], tmp_path / "shown.pgm"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shown = np.asarray(Image.open(tmp_path / "shown.pgm"), np.float32) / 255
    top = 30  # rows of text
    inside = analysis.mask[top:]
    assert shown.shape == FILM.shape
    assert np.corrcoef(shown[top:].ravel(), xray.pixels[top:].ravel())[0, 1] > 0.95
    assert np.abs(shown[top:] - xray.pixels[top:])[inside].mean() < 0.02


def test_a_damaged_window_costs_only_the_presentation_state(pipe, analysis, source, monkeypatch):
    def damaged(made, source):
        made.WindowCenter = "no number"

    monkeypatch.setattr("manet_core.dicom_out._show_as", damaged)
    out = dicom_out(analysis, pipe, source, ["lungs", "outline"])
    assert set(out.files) == {"lungs"} and "window is damaged" in out.missing[0]


def test_a_film_of_which_a_small_copy_is_kept(pipe, analysis, source):
    small = pipe.analyze(load_xray(source), [])
    small = replace(small, original=resize(small.original, (90, 100)))
    out = dicom_out(small, pipe, source, ["lungs"])
    assert (dcmread(io.BytesIO(out.files["lungs"])).pixel_array.astype(bool) == analysis.mask).all()


@pytest.mark.parametrize("turn", [np.fliplr, np.flipud, lambda film: film[::-1, ::-1], lambda film: film[:, 20:]])
def test_another_film_than_was_analysed_is_refused(pipe, analysis, turn):
    data = dicom(np.ascontiguousarray(turn(FILM)), bits=12, **IDENTITY)
    with pytest.raises(XRayError, match="not the film that was analysed"):
        dicom_out(analysis, pipe, data)


def test_what_is_no_dicom_becomes_a_report_of_nobody(anonymous):
    dataset = dcmread(io.BytesIO(anonymous.files["report"]))
    assert set(anonymous.files) == {"report"} and "refers to a DICOM file" in anonymous.missing[0]
    assert dataset.PatientName == "Anonymous" and dataset.StudyInstanceUID and "SourceImageSequence" not in dataset


@pytest.mark.parametrize("kind", ["lungs", "outline"])
def test_no_lung_no_segmentation(pipe, analysis, source, kind):
    empty = replace(analysis, segmentation=Lungs.from_probability(np.zeros((64, 64), np.float32)))
    out = dicom_out(empty, pipe, source, [kind])
    assert not out.files and "No lung" in out.missing[0]


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"StudyInstanceUID": STUDY["StudyInstanceUID"]},
        {"SeriesInstanceUID": STUDY["SeriesInstanceUID"]},
    ],
)
def test_a_film_without_a_study_is_filed_nowhere(pipe, analysis, header):
    with pytest.raises(XRayError, match="which study") as error:
        dicom_out(analysis, pipe, dicom(FILM, bits=12, **header))
    assert one_sentence(str(error.value))


def test_faults_of_a_header_are_not_quoted(pipe, analysis, caplog, recwarn):
    """Values that no standard allows are handed on as they stand or refused; no log and no warning tells them."""
    faults = {"PatientSex": "SECRET", "PatientBirthDate": "SECRET", "PatientID": "SECRET" * 20, "StudyDate": "SECRET"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = dicom(FILM, bits=12, **STUDY | faults)
    caplog.clear()
    caplog.set_level(0)
    try:
        dicom_out(analysis, pipe, data, ["lungs"])
    except XRayError as error:
        assert one_sentence(str(error)) and "SECRET" not in str(error)
    assert "SECRET" not in caplog.text and not [w for w in recwarn if "SECRET" in str(w.message)]


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed: apt-get install dicom3tools")
def test_dciodvfy_finds_no_fault(made, anonymous, tmp_path):
    files = made | {"anonymous": anonymous.files["report"]}
    for kind, data in files.items():
        (tmp_path / kind).write_bytes(data)
        run = subprocess.run(["dciodvfy", tmp_path / kind], capture_output=True, text=True)
        assert "Error" not in run.stderr + run.stdout, run.stderr
        assert run.returncode == 0


@pytest.mark.parametrize("name", ["image_dfl", "SC_rgb_rle", "SC_rgb_jpeg_dcmtk", "SC_rgb_dcmtk_+eb+cr"])
def test_headers_of_others_films(pipe, analysis, name):
    """Films that pydicom ships for its own tests, under a mask of ours."""
    path = get_testdata_file(f"{name}.dcm", download=False)
    film = dcmread(path)
    out = dicom_out(replace(analysis, original=load_xray(path).pixels), pipe, Path(path), ["lungs"])
    lungs = dcmread(io.BytesIO(out.files["lungs"]))
    assert lungs.pixel_array.shape == (film.Rows, film.Columns) and lungs.pixel_array.any()
    assert (lungs.PatientName, lungs.StudyInstanceUID) == (film.get("PatientName", ""), film.StudyInstanceUID)


@pytest.mark.parametrize("name", ["CT_small", "MR_small"])
def test_a_slice_is_no_film(pipe, analysis, name):
    path = Path(get_testdata_file(f"{name}.dcm", download=False))
    out = dicom_out(replace(analysis, original=load_xray(path).pixels), pipe, path, ["lungs"])
    assert not out.files and "only of radiographs" in out.missing[0]


def test_the_command_line_writes_them_beside_the_panel(source, tmp_path, capsys, monkeypatch):
    for name, data in {"a.dcm": source, "b.png": picture(FILM), "c.dcm": dicom(FILM, bits=12)}.items():
        (tmp_path / name).write_bytes(data)
    films = [str(tmp_path / name) for name in ("a.dcm", "b.png", "c.dcm")]
    options = ["--models", "", "--no-panels", "--dicom", "--out", str(tmp_path / "out")]
    assert main(["analyze", *films, *options]) == 1
    said = capsys.readouterr().err
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"results.json", "a.dcm-report.dcm", "a.dcm-lungs.dcm", "a.dcm-outline.dcm", "b.png-report.dcm"}
    assert "b.png: A DICOM segmentation refers" in said and "c.dcm: The DICOM file does not say" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert ["fault" in entry for entry in results] == [False, False, True]
    assert "0815" not in (tmp_path / "out" / "results.json").read_text(encoding="utf-8") + said


def test_the_page_asks_for_the_films_file_once_more(pipe, source, weights, tmp_path):
    """It has kept neither patient nor study; another film's file is refused, and no file stays on the disk."""
    networks, uploads = Networks(weights, []), Uploads(tmp_path)
    xray = load_xray(source)
    film = networks.keep(xray, networks.analyze(xray))

    def saved(data: bytes, film=film) -> str:
        (tmp_path / "hash").mkdir()
        (tmp_path / "hash" / "film").write_bytes(data)
        html = saved_dicom(film, {"path": str(tmp_path / "hash" / "film")}, networks, uploads)
        assert not list(tmp_path.iterdir())
        return html

    html = saved(source)
    packed = zipfile.ZipFile(io.BytesIO(base64.b64decode(html.split("base64,")[1].split('"')[0])))
    assert packed.namelist() == [f"MANet-{kind}.dcm" for kind in ("report", "lungs", "outline")] and "alert" not in html
    lungs = dcmread(io.BytesIO(packed.read("MANet-lungs.dcm")))
    assert lungs.PatientID == "0815" and lungs.pixel_array.shape == FILM.shape
    for data, sentence in (
        (dicom(np.ascontiguousarray(FILM[:, ::-1]), bits=12, **IDENTITY), "not the film that was analysed"),
        (b"no picture", "not a picture"),
    ):
        assert sentence in saved(data) and "base64" not in saved(data)
    assert "expired" in saved(source, None)
