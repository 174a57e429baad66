"""A film's report and lungs as DICOM files, made of the film's own file, which is asked for once more.

Patient and study must be those of the film, and the page has kept neither: they are read at this moment alone.
"""

import base64
import io
import zipfile

from manet_core import WeightsError, XRayError
from manet_core.files.raster import MAX_BYTES

from . import render
from .networks import Film, Networks
from .startup import gr
from .uploads import Uploads

NAME = "MANet-dicom.zip"


def dicom_button() -> gr.UploadButton:
    """The button, which asks for the film's file."""
    return gr.UploadButton("Save as DICOM: choose the film’s file again", size="sm", elem_id="dicom")


def connect(
    button: gr.UploadButton, found: gr.State, saved: gr.HTML, networks: Networks, uploads: Uploads, **event
) -> None:
    """Let the button answer into `saved`, as `saved_dicom` has it; `found` holds the film that is shown."""

    def answer(film: Film | None, file: dict) -> tuple[str, None]:
        return saved_dicom(film, file, networks, uploads), None

    made = button.upload(answer, [found, button], [saved, button], preprocess=False, concurrency_limit=4, **event)
    made.then(None, js="() => document.querySelector('#saved a')?.click()", **event)


def saved_dicom(film: Film | None, file: dict, networks: Networks, uploads: Uploads) -> str:
    """HTML with a zip archive of the DICOM files to be saved, or with the sentence why there is none."""
    from manet_core.dicom_out import dicom_out  # not before: the page starts without pydicom

    try:
        with uploads.opened(file) as stream:
            data = stream.read(MAX_BYTES + 1)
        if film is None:
            return render.alert("The result has expired", ["Drop the X-ray again to save DICOM files."])
        made = dicom_out(film.analysis, networks.get(), data)
    except (XRayError, WeightsError) as error:
        return render.alert("No DICOM file was made", [str(error)])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for kind, content in made.files.items():
            archive.writestr(f"MANet-{kind}.dcm", content)
    link = f"data:application/zip;base64,{base64.b64encode(packed.getvalue()).decode()}"
    told = render.alert("Not in it", made.missing) if made.missing else ""
    return f'<a download="{NAME}" href="{link}">Save {NAME} again</a>{told}'
