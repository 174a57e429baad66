"""Results as DICOM objects that a PACS files beside the film: the report, the lungs, and their outline on the film.

They belong to the film's study and patient, so both are read from the film's header here, and nowhere else: at the
moment when an object is asked for, from the file that the caller still has. Nothing of it is kept or logged.
"""

import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset, dcmread
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from .files.dicom import is_inverted, looks_like_dicom, read_elements
from .files.xray import XRayError, load_xray, quiet
from .pipeline import DISCLAIMER, SEGMENTER, Analysis, Pipeline
from .preprocess import resize
from .report import headline, save_report
from .tasks import get_task
from .weights import fingerprint

NAME = "MANet"
DESCRIPTION = "MANet: research and teaching only, not a medical device"  # a PACS shows 64 characters of a series
# Whose film it is and which study it belongs to: copied as they stand, so that the objects are filed with the film.
_IDENTITY = """
    SpecificCharacterSet TimezoneOffsetFromUTC PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex
    PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence StudyInstanceUID StudyDate
    StudyTime StudyID StudyDescription AccessionNumber IssuerOfAccessionNumberSequence
    ReferringPhysicianName""".split()
_REFERENCE = "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Rows Columns".split()
# How the film is to be shown; a presentation state must repeat it.
_SHOWN = """
    SamplesPerPixel PhotometricInterpretation PresentationLUTShape PixelRepresentation RescaleSlope RescaleIntercept
    WindowCenter WindowWidth VOILUTFunction ModalityLUTSequence VOILUTSequence""".split()
_OPTIONAL = ["PatientOrientation"]
_OUTLINE_COLOUR = (79, -28, -30)  # CIELab of a light blue that colour-blind readers see on grey
_LONGEST_TEXT = 1024  # characters that DICOM allows an annotation
_BAND = 36  # pixels of the line that is burned into the report


@dataclass(frozen=True)
class DicomOut:
    """DICOM files made of one film, and why others were not.

    Attributes:
        files: {"report": a Secondary Capture image, "lungs": a DICOM Segmentation, "outline": a Grayscale Softcopy
            Presentation State}, the bytes of whole files.
        missing: a sentence for each that could not be made; [] when all are there.
    """

    files: dict[str, bytes]
    missing: list[str]


class _Missing(Exception):
    """An object that this film allows none of; one sentence that says why."""


def dicom_out(
    analysis: Analysis, pipe: Pipeline, source: bytes | Path, kinds: Collection[str] = ("report", "lungs", "outline")
) -> DicomOut:
    """The report, the lungs and their outline as DICOM files, in the film's study if the film is DICOM.

    Args:
        analysis: of that film, by `pipe`; its `original` may be smaller than the film.
        pipe: what made the analysis; the hashes of its weights are told in the files.
        source: the film's file, or the bytes of it. Of a PNG, say, the report becomes that of an anonymous patient.
        kinds: what to make.

    Raises:
        XRayError: `source` is unreadable or another film, or does not say which study it belongs to.
    """
    source, files, missing = _source(analysis, source), {}, []
    for kind in kinds:
        try:
            files[kind] = _bytes(_MAKERS[kind](analysis, pipe, source), source)
        except _Missing as error:
            missing.append(str(error))
    return DicomOut(files, missing)


def is_own(data: bytes) -> bool:
    """Whether a DICOM file is one that `dicom_out` made, by the manufacturer in its header."""
    try:
        with quiet():
            return str(read_elements(data, ["Manufacturer"]).get("Manufacturer") or "").strip() == NAME
    except Exception:  # what it says may be damaged in every way; who reads the picture says so
        return False


def _report(analysis: Analysis, pipe: Pipeline, source: Dataset | None) -> Dataset:
    """The one-page report as a Secondary Capture image, without identity; see `dicom_out`."""
    import highdicom as hd  # takes a second, and nothing else here needs it

    page = io.BytesIO()
    save_report(analysis, page, hashes=pipe.hashes, format="png")  # without a title: a file's name may name a patient
    capture = hd.sc.SCImage(
        pixel_array=_marked(page),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        study_instance_uid=generate_uid(None),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **_equipment(9001),
    )
    capture.PatientOrientation = capture.Laterality = None  # a page of text and pictures has none
    capture.BurnedInAnnotation = "NO"  # it names nobody
    capture.SecondaryCaptureDeviceManufacturer = capture.SecondaryCaptureDeviceManufacturerModelName = NAME
    capture.SecondaryCaptureDeviceSoftwareVersions = capture.SoftwareVersions
    capture.ImageComments = _made_by(analysis, pipe)
    capture.DerivationDescription = f"Report on one page. {DISCLAIMER}"
    if source is not None:
        capture.SourceImageSequence = [_refers_to(source)]
    return capture


def _lungs(analysis: Analysis, pipe: Pipeline, source: Dataset | None) -> Dataset:
    """The cleaned lung mask as a binary DICOM Segmentation on the film's stored pixels, without identity.

    Raises:
        _Missing: there is no DICOM file to refer to, or no lung.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    if source is None:
        raise _Missing("A DICOM segmentation refers to a DICOM file, and this film is none; its report is there.")
    mask = analysis.segmentation.at((source.Rows, source.Columns))
    if not mask.any():
        raise _Missing("No lung was found, so there is no DICOM segmentation of it.")
    version = _equipment(9002)["software_versions"]
    segmenter = fingerprint(pipe.entries[SEGMENTER])
    algorithm = hd.AlgorithmIdentificationSequence(
        name=f"{NAME} lung segmentation",
        family=codes.DCM.ArtificialIntelligence,
        version=version,
        source=NAME,
        parameters={"weights SHA-256": segmenter},
    )
    lungs = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Lungs",
        segmented_property_category=codes.SCT.Organ,
        segmented_property_type=codes.SCT.Lung,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
    )
    try:
        made = hd.seg.Segmentation(
            [_without_identity(source)],
            mask[None],
            "BINARY",
            [lungs],
            device_serial_number=segmenter[:64],  # a program has no serial number; its weights say which one it is
            content_label="LUNGS",
            content_description=DISCLAIMER,
            **_equipment(9002),
        )
    except (AttributeError, KeyError, TypeError, ValueError):  # of a CT, say, it must know where the slice lies
        raise _Missing("There is no DICOM segmentation of this kind of DICOM picture, only of radiographs.") from None
    made.DerivationDescription = f"Lung mask. {DISCLAIMER}"
    made.PatientOrientation = source.get("PatientOrientation")
    return made


def _outline(analysis: Analysis, pipe: Pipeline, source: Dataset | None) -> Dataset:
    """The outline of the cleaned lung mask and the headline, to be drawn over the film by a viewer, without identity.

    The film is shown as its own header has it: modality LUT, first VOI LUT or else the window, polarity.

    Raises:
        _Missing: there is no DICOM file to refer to, it is in colour, or there is no lung.
    """
    import highdicom as hd

    if source is None:
        raise _Missing("A DICOM presentation state refers to a DICOM file, and this film is none.")
    if source.get("SamplesPerPixel", 1) != 1:
        raise _Missing("There is no DICOM presentation state of a picture in colour.")
    outlines = _outlines(analysis.segmentation.at((source.Rows, source.Columns)))
    if not outlines:
        raise _Missing("No lung was found, so there is no DICOM presentation state with its outline.")
    film = _without_identity(source)
    film.SamplesPerPixel = 1
    lines = [*(headline(analysis, get_task(name)) for name in analysis.tasks), DISCLAIMER]
    text = hd.pr.TextObject(
        "\r\n".join(lines).encode("ascii", "replace").decode()[:_LONGEST_TEXT],
        units="DISPLAY",
        bounding_box=(0.02, 0.01, 0.98, 0.03 + 0.03 * len(lines)),
        text_justification="LEFT",
    )
    drawn = [hd.pr.GraphicObject("POLYLINE", points, units="PIXEL") for points in outlines]
    layers = [
        hd.pr.GraphicLayer(name, order, what, hd.color.CIELabColor(*_OUTLINE_COLOUR))
        for order, (name, what) in enumerate({"LUNGS": "Outline of the lung mask", "READING": "Reading"}.items(), 1)
    ]
    made = hd.pr.GrayscaleSoftcopyPresentationState(
        [film],
        device_serial_number=fingerprint(pipe.entries[SEGMENTER])[:64],
        content_label="LUNGS",
        content_description=DISCLAIMER,
        graphic_layers=layers,
        graphic_annotations=[
            hd.pr.GraphicAnnotation([film], layers[0], graphic_objects=drawn),
            hd.pr.GraphicAnnotation([film], layers[1], text_objects=[text]),
        ],
        **_equipment(9003),
    )
    made.PresentationLUTShape = "INVERSE" if is_inverted(source) else "IDENTITY"
    made.Laterality = None  # of a pair of organs, it is both
    try:
        with quiet():
            _show_as(made, source)
            made.save_as(io.BytesIO(), enforce_file_format=True)
    except Exception:  # whatever pydicom raises of a damaged element
        raise _Missing("The DICOM header's window is damaged, so there is no DICOM presentation state.") from None
    return made


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed lines around a mask (H, W) bool, each (N, 2) of (column, row) from the corner of the first pixel."""
    from skimage.measure import approximate_polygon, find_contours  # a second of imports, and nothing else needs them

    lines = find_contours(np.pad(mask, 1).astype(np.float32), 0.5)
    return [(approximate_polygon(line, 0.5)[:, ::-1] - 0.5).clip(0, mask.shape[::-1]) for line in lines]


def _show_as(made: Dataset, source: Dataset) -> None:
    """Give a presentation state the modality LUT and the VOI LUT or window of a film, without their free text."""

    def table(sequence: str, names: Collection[str]) -> list[Dataset]:
        item = Dataset()
        for name in names:
            if name in source[sequence][0]:
                item[name] = source[sequence][0][name]
        return [item]

    if source.get("ModalityLUTSequence"):
        made.ModalityLUTSequence = table("ModalityLUTSequence", ["LUTDescriptor", "ModalityLUTType", "LUTData"])
    elif "RescaleSlope" in source or "RescaleIntercept" in source:
        made.RescaleSlope, made.RescaleIntercept = source.get("RescaleSlope", 1), source.get("RescaleIntercept", 0)
        made.RescaleType = "US"
    window = Dataset()
    if source.get("VOILUTSequence"):
        window.VOILUTSequence = table("VOILUTSequence", ["LUTDescriptor", "LUTData"])
    elif source.get("WindowCenter") is not None and source.get("WindowWidth") is not None:
        for name in ("WindowCenter", "WindowWidth", "VOILUTFunction"):
            if name in source:
                window[name] = source[name]
    if window:
        made.SoftcopyVOILUTSequence = [window]


_MAKERS = {"report": _report, "lungs": _lungs, "outline": _outline}


def _source(analysis: Analysis, data: bytes | Path) -> Dataset | None:
    """Identity of a film's file and what objects refer to; None of a file that is no DICOM.

    Raises:
        XRayError: as `dicom_out` has it.
    """
    small = resize(load_xray(data).pixels, analysis.original.shape)
    if not any(np.allclose(kept, small, atol=0.01) for kept in (analysis.original, 1 - analysis.original)):
        raise XRayError("The file is not the film that was analysed, as it is stored; choose that film's own file.")
    data = data.read_bytes() if isinstance(data, Path) else data
    if not looks_like_dicom(data):
        return None
    try:
        with quiet():
            source = dcmread(io.BytesIO(data), force=True, specific_tags=_IDENTITY + _REFERENCE + _SHOWN + _OPTIONAL)
            if all(source.get(name) for name in _REFERENCE):
                return source
    except Exception:  # what it says may be damaged in every way, and must not be quoted
        pass
    raise XRayError("The DICOM file does not say which study and series it belongs to; nothing can be filed there.")


def _equipment(series: int) -> dict:
    """What every kind of object says of its origin, as arguments of highdicom."""
    from . import __version__  # defined after this module is imported

    return {
        "series_instance_uid": generate_uid(None),
        "series_number": series,
        "sop_instance_uid": generate_uid(None),
        "instance_number": 1,
        "manufacturer": NAME,
        "manufacturer_model_name": NAME,
        "software_versions": __version__,
        "series_description": DESCRIPTION,
    }


def _refers_to(source: Dataset) -> Dataset:
    """An item that names the film as the source of a derived picture."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)]
    return item


def _made_by(analysis: Analysis, pipe: Pipeline) -> str:
    """Each network that was asked with the SHA-256 of its weights, as text of any length."""
    hashes = {SEGMENTER: fingerprint(pipe.entries[SEGMENTER])} | pipe.hashes
    return " ".join([DISCLAIMER, *(f"{name}: {hashes[name]}." for name in (SEGMENTER, *analysis.readings))])


def _marked(page: io.BytesIO) -> np.ndarray:
    """A report (H, W, 3) uint8 under a black band that says what it is not to be used for."""
    picture = Image.open(page).convert("RGB")
    marked = Image.new("RGB", (picture.width, picture.height + _BAND))
    marked.paste(picture, (0, _BAND))
    place = {"anchor": "mm", "font": ImageFont.load_default(22), "fill": "white"}
    ImageDraw.Draw(marked).text((picture.width / 2, _BAND / 2), DISCLAIMER.upper().rstrip("."), **place)
    return np.asarray(marked)


def _without_identity(source: Dataset) -> Dataset:
    """What highdicom needs of a film; what it would make of names and dates is left to `_bytes`, which copies them."""
    film = Dataset()
    for name in _REFERENCE:
        setattr(film, name, source.get(name))
    film.Modality = "OT"
    for name in "PatientID PatientName PatientBirthDate PatientSex AccessionNumber StudyID StudyDate StudyTime".split():
        setattr(film, name, None)
    return film


def _bytes(made: Dataset, source: Dataset | None) -> bytes:
    """An object as a file: of the film's patient and study as they stand there, or of nobody."""
    if source is None:
        made.PatientName, made.PatientID = "Anonymous", f"{NAME}-anonymous"
    file = io.BytesIO()
    with quiet():
        made.save_as(file, enforce_file_format=True)  # a fault of the object itself is no fault of the film
        if source is None:
            return file.getvalue()
        file = io.BytesIO()
        try:
            for name in _IDENTITY:
                if name in source:
                    made[name] = source[name]
            made.save_as(file, enforce_file_format=True)
        except Exception:  # whatever pydicom raises of a damaged element; the text might hold the patient's name
            raise XRayError("The DICOM file's patient or study is damaged; nothing can be filed there.") from None
    return file.getvalue()
