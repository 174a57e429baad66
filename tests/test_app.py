"""The page, served by app.py and driven by a browser; and its endpoint, called as a program would."""

import asyncio
import hashlib
import io
import json
import os
import re
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import WAIT_S, behind_shipped_segmenter, expect, served, wait_until
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError, AuthenticationError
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from manet_core import CLASSES, WeightsError, XRay, list_models, load_xray
from manet_core.phantom import phantom
from manet_core.pipeline import DISCLAIMER
from manet_core.tasks import get_task
from manet_core.weights import read_manifest
from ui import batch
from ui.claims import Claims
from ui.networks import Networks, results_of
from ui.opinion import PHANTOMS
from ui.render import shown_name
from ui.server import accounts

PATIENT = "Mustermann-Erika"  # what a file name may give away


@pytest.fixture(scope="module")
def client(server):
    return Client(server[0], verbose=False)


@pytest.fixture(scope="module")
def phantom_png(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / f"{PATIENT}.png"
    Image.fromarray((phantom(256, seed=0).pixels * 65535).astype(np.uint16)).save(path)
    return path


def _shot(page, name: str) -> None:
    """Keep a picture of the whole page, if MANET_SHOTS names a folder for them."""
    if "MANET_SHOTS" in os.environ:
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=Path(os.environ["MANET_SHOTS"]) / f"{name}.png", full_page=True)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _dicom(path: Path, pixels: np.ndarray) -> Path:
    """A DICOM as exported from many archives: MONOCHROME1, 12 bit, somebody's name in it."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.Modality = PATIENT, "DX"
    (dataset.Rows, dataset.Columns), dataset.SamplesPerPixel = pixels.shape, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME1", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelData = ((1 - pixels) * 4095).astype(np.uint16).tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def phantom_dicom(tmp_path_factory) -> Path:
    return _dicom(tmp_path_factory.mktemp("files") / "IM000001", phantom(256, seed=1).pixels[:240, :200])


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("no picture")
    return path


def _send(page, path: Path) -> None:
    page.set_input_files("#drop input[type=file]", path)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _stage(page) -> str:
    """The film as it is drawn now."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate("document.querySelector('.stage canvas').toDataURL()")


def test_empty_page_says_what_to_do(server, page):
    page.goto(server[0])
    page.wait_for_selector("text=Drop a frontal chest X-ray here")
    assert page.title() == "MANet"
    assert page.is_visible("text=A second opinion for chest X-rays")
    assert page.is_visible("text=synthetic phantom, not a person")
    assert page.is_visible(f"text={DISCLAIMER}")
    assert not page.is_visible(".stage") and not page.is_visible("text=Method of heatmaps")
    _shot(page, "empty")


def test_upload_shows_the_film_and_its_reading(server, page, phantom_png):
    url, uploads = server
    page.goto(url)
    _send(page, phantom_png)
    page.wait_for_selector(".readings [aria-pressed=true]")
    numbers = [
        [float(p[:-1]) for p in row.locator("td").all_inner_texts()] for row in page.locator(".readings tbody tr").all()
    ]
    assert [len(row) for row in numbers] == [3 + 1] * len(CLASSES), "three networks and their mean"
    assert [sum(column) for column in zip(*numbers)] == pytest.approx([100] * 4, abs=0.3)
    assert [row[3] for row in numbers] == pytest.approx([sum(row[:3]) / 3 for row in numbers], abs=0.11)
    assert page.is_visible("section.limits >> text=sum to 100%")
    assert page.is_visible(f"section.limits >> text={DISCLAIMER}")
    assert "Heatmap of" in page.inner_text(".explained")

    before, requests = _stage(page), len(page.requested)
    page.click(".readings [data-network=efficientnet_lite0_cbam][data-name=Tuberculosis]")
    page.wait_for_selector(".explained >> text=Heatmap of Tuberculosis by EfficientNet-Lite0, CBAM")
    assert _stage(page) != before
    page.click("button:text-is('Stages')")
    assert [label.split("\n")[0] for label in page.locator(".labels b").all_inner_texts()] == [
        "Original", "Predicted mask", "Post-processed mask", "Segmented lungs",
    ]  # fmt: skip
    page.click("button:text-is('Networks')")
    labels = page.locator(".labels p").all_inner_texts()
    assert len(labels) == 3 and all(": Tuberculosis" in label for label in labels)
    assert all("in lung" in label or "empty" in label for label in labels)
    assert page.requested[requests:] == [], "the browser has it all"

    _shot(page, "result")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert PATIENT not in kept and "Tuberculosis" not in kept
    digest = hashlib.sha256(load_xray(phantom_png).pixels.tobytes()).hexdigest()
    assert re.match(rf"{PATIENT}\.png, read \d{{4}}-.*, pixels SHA-256 {digest[:16]}", page.inner_text("#read"))
    assert page.locator("#drop").bounding_box()["width"] < 250  # it has done its work
    wait_until(lambda: not _files(uploads))


def test_a_film_can_be_fetched_with_its_key_alone(server, page):
    page.goto(server[0])
    with page.expect_response("**/film") as film:
        page.click("button:has-text('Clear lungs')")
    key = film.value.request.post_data
    assert len(key) == 32 and film.value.status == 200 and film.value.headers["cache-control"] == "no-store"
    asked = urllib.request.Request(server[0] + "film", key.encode(), method="POST")
    assert urllib.request.urlopen(asked).read() == film.value.body(), "as long as its page keeps it"
    for data in (key[::-1].encode(), b"\xff", b""):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(server[0] + "film", data, method="POST"))
    page.wait_for_selector(".readings")


def _choose_explainer(page, title: str) -> None:
    page.click("#explainer input")
    page.click(f"[role=option]:text-is('{title}')")


def test_another_explainer(server, page, phantom_png):
    page.goto(server[0])
    _send(page, phantom_png)
    page.wait_for_selector(".notes >> text=A heatmap (Grad-CAM)")
    page.wait_for_selector(".readings [aria-pressed=true]")
    before, numbers = _stage(page), page.inner_text(".readings")
    said = page.inner_text("#on-lesions")
    assert "heatmaps by Grad-CAM lie on lesions was not measured" in said, "these networks are random"
    _choose_explainer(page, "LayerCAM")
    page.wait_for_selector(".notes >> text=A heatmap (LayerCAM)")
    page.wait_for_selector("#explaining .stage", state="detached")
    page.wait_for_selector(".readings [aria-pressed=true]")
    assert page.inner_text(".readings") == numbers
    wait_until(lambda: _stage(page) != before)
    _shot(page, "explainer")
    page.click("button:has-text('Faint shadow')")  # the choice holds for the next X-ray
    page.wait_for_selector("text=synthetic drawing")
    page.wait_for_selector(".notes >> text=A heatmap (LayerCAM)")
    _choose_explainer(page, "Score-CAM (slow)")
    page.wait_for_selector("#explaining >> text=Computing heatmaps by Score-CAM: network")
    _choose_explainer(page, "Grad-CAM")  # whoever changes their mind need not wait
    page.wait_for_selector(".notes >> text=A heatmap (Grad-CAM)")
    page.wait_for_selector("#explaining .stage", state="detached")


def test_the_families_that_are_shipped(weights, tmp_path, page, phantom_png):
    """The five classes answer; guided attention and AlexNet's attention are there to be chosen, with their own maps."""
    with served(weights / "families.json", tmp_path) as (url, _):
        page.goto(url)
        _send(page, phantom_png)
        page.click("#anyway")
        expect(page.locator(".readings")).to_have_count(1)
        for count, task in ((2, "Normal, pneumonia or COVID-19"), (3, "COVID-19 or normal")):
            page.check(f"#families label:has(span:text-is('{task}')) input")
            expect(page.locator(".readings")).to_have_count(count)
        page.click("button[role=tab]:has-text('Compare attention')")
        page.click("label:has-text('AlexNet: COVID-19 or normal')")
        page.wait_for_selector(".attended >> text=What AlexNet, attention after two layers attends to")
        expect(page.locator(".attended .heat")).to_have_count(2)
        page.click("label:has-text('EfficientNet-Lite0: Normal, pneumonia or COVID-19')")
        page.wait_for_selector(".grid >> text=guided attention")
        expect(page.locator(".grid .heat")).to_have_count(3)
        page.click("button[role=tab]:has-text('Models')")
        expect(page.locator(".models h2.task")).to_have_count(3)
        expect(page.locator(".models summary >> text=guided attention")).to_be_visible()
        expect(page.locator(".models h2 >> text=External validation")).to_have_count(1)
        _shot(page, "families")


def test_several_tasks(many_tasks, weights, tmp_path, page, phantom_png):
    """Networks of five classes, of three, and of 14 findings, on every tab and at every endpoint."""
    (tmp_path / "weights").mkdir()
    with served(behind_shipped_segmenter(many_tasks, weights, tmp_path / "weights"), tmp_path) as (url, _):
        page.goto(url)
        page.check("label:has-text('Read first') input")
        _send(page, phantom_png)
        page.wait_for_selector("text=What do you see?")
        page.click("#quiz label:has-text('Tuberculosis')")
        page.wait_for_selector(".readings")
        expect(page.locator(".readings")).to_have_count(1)
        expect(page.locator(".readings thead button")).to_have_count(2)
        expect(page.locator(".readings thead th")).to_have_count(2 + 1)  # the mean has no heatmap
        for task, count in (("Normal, pneumonia or COVID-19", 2), ("14 findings", 3)):  # of the film that is kept
            page.check(f"#families label:has-text('{task}') input")
            page.wait_for_function("count => document.querySelectorAll('.readings').length == count", arg=count)
        expect(page.locator(".readings").nth(2).locator("tbody tr")).to_have_count(14)
        expect(page.locator(".summary")).to_have_count(3)
        page.click(".readings [data-name=Effusion]")
        page.wait_for_selector(".explained >> text=Heatmap of Effusion")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        _shot(page, "tasks")
        page.click("button:has-text('Report on one page')")
        with page.expect_download() as download:
            page.click("button:has-text('Save as PDF')")
        assert Path(download.value.path()).read_bytes().startswith(b"%PDF-")
        page.click("button[role=tab]:has-text('Compare attention')")
        page.wait_for_selector(".grid")
        page.click("label:has-text('EfficientNet-Lite0: 14 findings')")
        page.wait_for_selector(".grid thead >> text=Pneumothorax")
        expect(page.locator(".grid .heat")).to_have_count(14)
        _shot(page, "tasks-compare")
        page.click("button[role=tab]:has-text('Many X-rays')")
        page.set_input_files("#batch-drop input[type=file]", [phantom_png])
        page.wait_for_selector("#batch a[download='MANet.csv']")
        expect(page.locator("#batch thead th")).to_have_count(1 + 3 * 3 + 2)
        _shot(page, "tasks-many")
        page.click("button[role=tab]:has-text('Models')")
        page.wait_for_selector(".models h2.task >> text=14 findings")
        client = Client(url, verbose=False)
        answer = client.predict(handle_file(phantom_png), api_name="/analyze")
        tasks = {name: reading["task"] for name, reading in answer["readings"].items()}
        assert tasks == {f["name"]: f["task"] for f in client.predict(api_name="/models")}
        for name, reading in answer["readings"].items():
            classes = get_task(tasks[name]).classes
            assert tuple(reading["probabilities"]) == classes and reading["predicted"] in classes
        (row,) = client.predict([handle_file(phantom_png)], api_name="/batch")
        assert row["readings"] == answer["readings"]


def test_models_tab_says_what_was_not_measured(server, page):
    page.goto(server[0])
    page.click("button[role=tab]:has-text('Models')")
    page.wait_for_selector("text=Nothing has been measured of these weights")
    expect(page.locator(".models details")).to_have_count(4)


def test_bad_file_then_dicom(server, page, text_file, phantom_dicom):
    url, uploads = server
    page.goto(url)
    page.wait_for_selector("text=Drop a frontal chest X-ray here")
    _send(page, text_file)
    page.wait_for_selector("[role=alert] >> text=This is not a picture that MANet can read")
    assert "Traceback" not in page.content()
    expect(page.locator(".readings")).to_have_count(0)
    _send(page, phantom_dicom)
    page.wait_for_selector(".readings")
    expect(page.locator("[role=alert] >> text=not a picture")).to_have_count(0)
    page.wait_for_selector(".zoom-text >> text=200×240 pixels")
    _send(page, text_file)  # what was read stays, and is told to be of the film before
    page.wait_for_selector("[role=alert] >> text=notes.txt was not analysed")
    assert page.is_visible("[role=alert] >> text=Still shown is the X-ray before it, IM000001.")
    assert page.is_visible(".readings") and page.is_visible(".stage") and page.is_visible("#read >> text=IM000001")
    _shot(page, "refused")
    assert not _files(uploads)


def test_no_class_is_named_where_there_are_no_lungs(server, page, tmp_path, rng):
    (tmp_path / "noise.png").write_bytes(_png(rng.random((200, 200))))
    page.goto(server[0])
    _send(page, tmp_path / "noise.png")
    page.wait_for_selector("#withheld >> text=No reliable reading")
    assert page.locator("#withheld li").count() > 0 and page.is_visible(".stage")
    assert page.is_disabled("button:text-is('Networks')") is False and page.inner_text(".explained") == ""
    assert not page.is_visible(".readings") and not page.is_visible("#summary")
    page.click("button:has-text('answers anyway')")
    page.wait_for_selector(".readings")
    assert page.is_visible("#summary") and page.is_visible("#withheld") and not page.is_visible("#anyway")
    page.click("button:has-text('Clear lungs')")
    page.wait_for_selector("#read >> text=phantom, clear lungs")
    page.wait_for_selector(".readings")
    assert not page.is_visible("#withheld") and page.is_visible("#summary")


def test_phantom_button(server, page):
    page.goto(server[0])
    page.click("button:has-text('Dense shadow')")
    page.wait_for_selector(".readings")
    assert page.is_visible("[role=alert] >> text=synthetic")
    _shot(page, "phantom")


def test_pages_do_not_share_results(server, chromium, page, phantom_png):
    page.goto(server[0])
    _send(page, phantom_png)
    page.wait_for_selector(".readings")
    other = chromium.new_context()
    try:
        stranger = other.new_page()
        stranger.set_default_timeout(1000 * WAIT_S)
        stranger.goto(server[0])
        stranger.wait_for_selector("text=Drop a frontal chest X-ray here")
        expect(stranger.locator(".readings")).to_have_count(0)
    finally:
        other.close()


def test_endpoint_answers(server, client, phantom_png, phantom_dicom):
    for path in (phantom_png, phantom_dicom):
        answer = client.predict(handle_file(path), api_name="/analyze")
        keys = {"readings", "claims", "means", "explainer", "lung_area", "lung_areas", "height", "width"}
        assert set(answer) == keys | {"distance", "pose", "reliable", "withheld", "warnings", "disclaimer"}
        assert set(answer["readings"]) == {"efficientnet_lite0", "efficientnet_lite0_ma", "efficientnet_lite0_cbam"}
        for reading in answer["readings"].values():
            assert set(reading) == {"task", "probabilities", "predicted", "operating_point", "in_lung"}
            assert set(reading["probabilities"]) == set(reading["in_lung"]) == set(CLASSES)
            assert sum(reading["probabilities"].values()) == pytest.approx(1)
            assert reading["predicted"] == max(CLASSES, key=reading["probabilities"].get)
        assert answer["disclaimer"] == DISCLAIMER
        assert PATIENT not in str(answer)
    assert not _files(server[1])


def test_endpoint_refuses_with_a_sentence(client, text_file, tmp_path):
    with pytest.raises(AppError, match="This is not a picture that MANet can read"):
        client.predict(handle_file(text_file), api_name="/analyze")
    (tmp_path / "empty.png").touch()
    with pytest.raises(AppError, match="The file is empty"):
        client.predict(handle_file(tmp_path / "empty.png"), api_name="/analyze")


def test_endpoint_reads_uploads_alone(client, phantom_png):
    with pytest.raises(AppError, match="not an upload of this server"):
        client.predict({"path": str(phantom_png)}, api_name="/analyze")
    assert phantom_png.is_file()


def test_endpoint_same_file_at_once(server, client, phantom_png):
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(client.predict, handle_file(phantom_png), api_name="/analyze") for _ in range(4)]
        answers = [job.result() for job in jobs]
    assert all(answer == answers[0] for answer in answers)
    wait_until(lambda: not _files(server[1]))


def test_batch_endpoint(server, client, phantom_png, text_file, tmp_path):
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as archive:
        archive.write(phantom_png, "inside/film.png")
    files = [handle_file(path) for path in (phantom_png, text_file, tmp_path / "films.zip")]
    first, bad, zipped = client.predict(files, api_name="/batch")
    assert [first["file"], bad["file"], zipped["file"]] == [phantom_png.name, "notes.txt", "film.png"]
    assert "not a picture" in bad["error"]
    alone = client.predict(handle_file(phantom_png), api_name="/analyze")
    assert {k: v for k, v in first.items() if k != "file"} == alone
    assert not _files(server[1])


def test_batches_do_not_wait_for_one_another(client, phantom_png, tmp_path):
    with zipfile.ZipFile(tmp_path / "long.zip", "w") as archive:
        for number in range(30):
            archive.writestr(f"{number}.png", _png(phantom(256, seed=number % 3).pixels))
    long = client.submit([handle_file(tmp_path / "long.zip")], api_name="/batch")
    wait_until(lambda: long.status().code.name == "ITERATING")
    assert "readings" in client.predict([handle_file(phantom_png)], api_name="/batch")[0]
    assert not long.done()
    assert len(long.result()) == 30 and all("readings" in row for row in long.result())
    grown = [len(rows) for rows in long.outputs()]
    assert grown[0] == 0 and sorted(grown) == grown and len(set(grown)) > 2, "it did not come bit by bit"


def test_models_endpoint(client, random_weights):
    found = client.predict(api_name="/models")
    entries = read_manifest(random_weights)
    assert [f["name"] for f in found] == ["efficientnet_lite0", "efficientnet_lite0_ma", "efficientnet_lite0_cbam"]
    assert (
        found[1]["attention"] == "ma"
        and found[1]["task"] == "manet"
        and found[1]["sha256"] == entries["efficientnet_lite0_ma"]["sha256"]
    )


def test_public_endpoints(client):
    found = client.view_api(return_format="dict")["named_endpoints"]
    assert set(found) == {"/analyze", "/batch", "/models"}
    assert all(len(endpoint["description"]) > 20 for endpoint in found.values())
    for endpoint in found.values():
        for told in (*endpoint["parameters"], *endpoint["returns"]):
            assert len(told["python_type"]["description"]) > 20
    assert found["/batch"]["returns"][0]["python_type"]["type"] == "list[dict(str, Any)]"


def test_many_xrays(server, page, phantom_png, phantom_dicom, text_file, tmp_path):
    url, uploads = server
    page.goto(url)
    page.click("button[role=tab]:has-text('Many X-rays')")
    page.set_input_files("#batch-drop input[type=file]", [phantom_png, phantom_dicom, text_file])
    page.wait_for_selector("#batch a[download='MANet.csv']")
    expect(page.locator("#batch tbody tr")).to_have_count(3)
    assert "1 not read" in page.inner_text("#batch [role=status]")
    page.click("#batch th button:has-text('file')")
    names = page.locator("#batch tbody th").all_inner_texts()
    assert names == sorted(names, key=str.lower) and len(names) == 3
    with page.expect_download() as download:
        page.click("#batch a[download='MANet.json']")
    assert [row["file"] for row in json.loads(Path(download.value.path()).read_text())] == [
        phantom_png.name, phantom_dicom.name, text_file.name,
    ]  # fmt: skip
    assert not _files(uploads)
    page.click(f"#batch button.open:text-is('{phantom_dicom.name}')")  # the browser sends it again
    page.wait_for_selector(f"#read >> text={phantom_dicom.name}")
    assert page.is_visible("#viewer")
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as archive:
        archive.write(phantom_png, "inside.png")  # the browser has no file of this name
    page.click("button[role=tab]:has-text('Many X-rays')")
    page.set_input_files("#batch-drop input[type=file]", tmp_path / "films.zip")
    page.wait_for_selector("#batch th >> text=inside.png")
    expect(page.locator("#batch button.open")).to_have_count(0)


def test_columns_of_numbers_sort_as_numbers(page):
    """Without a server: the table and its script alone."""
    values = {"b.png": 0.28125, "d.png": 1.0, "a.png": 0.2501220703125, "c.png": 0.5}
    read = {"votes": {"Normal": 1}, "networks": 1, "names": ["Normal"]}
    rows = [
        {"file": name, "consensus": {"manet": read | {"means": [value]}}, "lung_area": value}
        | {"withheld": [], "warnings": [], "thumbnail": "data:,"}
        for name, value in values.items()
    ]
    page.set_content(batch.table(rows, len(rows), running=True))
    page.evaluate("script => new Function('element', script)(document.body)", batch._TABLE)
    for column in ("mean probability", "lung area"):
        for names in (sorted(values), sorted(values, reverse=True)):
            page.click(f"th button:text-is('{column}')")
            assert page.locator("tbody th").all_inner_texts() == names


def test_many_xrays_can_be_stopped(server, page, tmp_path):
    url, uploads = server
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as archive:
        for number in range(200):
            archive.writestr(f"{number}.png", _png(phantom(256, seed=number % 3).pixels))
    page.goto(url)
    page.click("button[role=tab]:has-text('Many X-rays')")
    page.set_input_files("#batch-drop input[type=file]", tmp_path / "films.zip")
    page.wait_for_selector("#batch tbody tr")
    page.dispatch_event("button:has-text('Stop here')", "click")  # it is drawn anew for every file
    page.wait_for_selector("#batch a[download='MANet.csv']")
    assert 0 < page.locator("#batch tbody tr").count() < 200
    assert "of 200 files" in page.inner_text("#batch [role=status]")
    _shot(page, "many-stopped")
    assert not _files(uploads)


def test_compare_attention(server, page):
    page.goto(server[0])
    page.click("button[role=tab]:has-text('Compare attention')")
    page.wait_for_selector("text=First analyse an X-ray")
    page.click("button[role=tab]:has-text('Second opinion')")
    page.click("button:has-text('Dense shadow')")
    page.wait_for_selector(".readings")
    page.click("button[role=tab]:has-text('Compare attention')")
    page.wait_for_selector(".grid")
    expect(page.locator(".grid .heat")).to_have_count(15)
    page.wait_for_selector(".pyramid figure")

    page.click("button:has-text('Draw another mask')")
    page.wait_for_selector("canvas[data-ready]")
    before = page.inner_html("#grid")
    page.click("label:has-text('add lung')")
    box = page.locator("canvas[data-ready]").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 200, steps=4)
    page.mouse.up()
    wait_until(lambda: page.inner_html("#grid") != before)  # another mask, other lungs and heatmaps
    page.click("button:has-text('The predicted mask again')")
    wait_until(lambda: page.inner_html("#grid") == before)

    page.click("label:has-text('all but the lungs')")
    page.wait_for_selector(".grid >> text=The networks are shown all but the lungs")
    page.click("#compare-explainer input")
    page.click("[role=option]:text-is('LayerCAM')")
    page.wait_for_selector(".grid >> text=A heatmap (LayerCAM)")
    page.click("label:has-text('Random weights')")
    page.wait_for_selector(".grid >> text=RANDOM")
    _shot(page, "compare")


def test_read_first(server, page):
    page.goto(server[0])
    page.click("label:has-text('Read first')")
    page.click("button:has-text('Clear lungs')")
    page.wait_for_selector("text=What do you see?")
    page.wait_for_selector(".stage")
    assert not page.is_visible(".readings") and not page.is_visible(".summary")
    page.focus(".stage")
    before = _stage(page)
    for name in ("Heatmap", "Mask", "Outline", "Lungs", "Stages", "Networks"):
        assert page.is_disabled(f".toolbar button:text-is('{name}')")
    for key in "hmolsn":
        page.keyboard.press(key)
    assert _stage(page) == before  # no mask, no heatmap
    tabs = page.locator("button[role=tab]:not(:has-text('Second opinion'))")
    assert tabs.count() == 3 and all(tab.is_disabled() for tab in tabs.all())
    _shot(page, "read-first")
    page.click("#quiz label:has-text('Tuberculosis')")
    page.wait_for_selector(".quiz >> text=You read Tuberculosis")
    page.wait_for_selector(".readings")
    wait_until(lambda: page.is_enabled(".toolbar button:text-is('Mask')") and _stage(page) != before)
    assert not any(t.is_disabled() for t in tabs.all())
    assert re.search("agree on [01] of 1", page.inner_text(".quiz"))


def test_keyboard_alone(server, page):
    page.goto(server[0])
    page.focus("button:has-text('Clear lungs')")
    page.keyboard.press("Enter")
    page.wait_for_selector(".readings [aria-pressed=true]")
    page.focus(".readings [aria-pressed=true]")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector(".explained >> text=Heatmap of Normal")
    assert page.evaluate("document.activeElement.dataset.name") == "Normal"
    page.focus("button[role=tab]:has-text('Models')")
    page.keyboard.press("Enter")
    page.wait_for_selector(".models")


def test_phone(server, chromium):
    context = chromium.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.set_default_timeout(1000 * WAIT_S)
    try:
        page.goto(server[0])
        page.click("button:has-text('Clear lungs')")
        page.wait_for_selector(".readings")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        _shot(page, "phone")
    finally:
        context.close()


def test_no_serious_fault_of_access(server, page, phantom_png):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

    def faults() -> list[str]:
        found = axe.Axe().run(page).response["violations"]
        return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]

    page.goto(server[0])
    page.wait_for_selector("text=Drop a frontal chest X-ray here")
    assert faults() == []
    _send(page, phantom_png)
    page.wait_for_selector(".readings")
    page.click("button:has-text('Report on one page')")
    assert faults() == []
    page.click("button[role=tab]:has-text('Compare attention')")
    page.wait_for_selector(".pyramid")
    page.click("button:has-text('Draw another mask')")
    assert faults() == []
    page.click("button[role=tab]:has-text('Many X-rays')")
    page.set_input_files("#batch-drop input[type=file]", phantom_png)
    page.wait_for_selector("#batch a[download='MANet.csv']")
    assert faults() == []
    page.click("button[role=tab]:has-text('Models')")
    page.wait_for_selector(".models")
    assert faults() == []


def test_report_is_saved(server, page):
    page.goto(server[0])
    page.click("button:has-text('Clear lungs')")
    page.wait_for_selector(".readings")
    page.click("button:has-text('Report on one page')")
    page.fill("#report textarea", "Teaching file 7")
    for kind, magic in (("PDF", b"%PDF-"), ("PNG", b"\x89PNG")):
        with page.expect_download() as download:
            page.click(f"button:has-text('Save as {kind}')")
        assert download.value.suggested_filename == f"MANet.{kind.lower()}"
        assert Path(download.value.path()).read_bytes().startswith(magic)
    assert not _files(server[1])


def test_password(random_weights, tmp_path, phantom_png):
    (tmp_path / "users").write_text("erika:correct horse\n")
    with served(random_weights, tmp_path, "--auth", str(tmp_path / "users")) as (url, _):
        with pytest.raises((AuthenticationError, ValueError)):
            Client(url, verbose=False).predict(handle_file(phantom_png), api_name="/analyze")
        with pytest.raises((AuthenticationError, ValueError)):
            Client(url, auth=("erika", "wrong"), verbose=False)
        client = Client(url, auth=("erika", "correct horse"), verbose=False)
        assert "readings" in client.predict(handle_file(phantom_png), api_name="/analyze")
        for _ in range(5):  # with the wrong one above, one too many
            with pytest.raises((AuthenticationError, ValueError)):
                Client(url, auth=("erika", "wrong"), verbose=False)
        with pytest.raises((AuthenticationError, ValueError)):
            Client(url, auth=("erika", "correct horse"), verbose=False)
        assert "readings" in client.predict(handle_file(phantom_png), api_name="/analyze")


def test_password_file_is_checked(tmp_path):
    for text in ("", "erika\n", "erika:\n", ":x\n"):
        (tmp_path / "users").write_text(text)
        with pytest.raises(SystemExit, match="NAME:PASSWORD"):
            accounts(tmp_path / "users")
    with pytest.raises(SystemExit, match="cannot be read"):
        accounts(tmp_path / "nobody")
    (tmp_path / "users").write_text("a:b:c\n\nd:e\n")
    assert accounts(tmp_path / "users") == [("a", "b:c"), ("d", "e")]


def test_mcp(random_weights, tmp_path):
    mcp = pytest.importorskip("mcp", reason="mcp is not installed: pip install 'gradio[mcp]'")
    transport = pytest.importorskip("mcp.client.streamable_http")

    async def ask(url: str) -> tuple[dict, str]:
        async with transport.streamablehttp_client(url) as (read, write, _), mcp.ClientSession(read, write) as session:
            await session.initialize()
            tools = (await session.list_tools()).tools
            answer = await session.call_tool("list_networks", {})
            return {tool.name: tool.description for tool in tools}, answer.content[0].text

    with served(random_weights, tmp_path, "--mcp") as (url, _):
        with ThreadPoolExecutor(1) as pool:  # in this thread the browser may have its own loop
            tools, answer = pool.submit(asyncio.run, ask(f"{url}gradio_api/mcp/")).result()
    assert set(tools) == {"analyze", "analyze_many", "list_networks"}
    assert "research and teaching only" in tools["analyze"]
    assert "efficientnet_lite0_ma" in answer


def test_without_weights_the_page_says_so(chromium, page, tmp_path, phantom_png):
    with served(tmp_path / "none", tmp_path) as (url, uploads):
        page.goto(url)
        page.wait_for_selector("[role=alert] >> text=manifest.json is missing")
        _send(page, phantom_png)
        page.wait_for_selector("[role=alert] >> text=Not analysed")
        assert page.is_visible("[role=alert] >> text=manifest.json is missing")
        assert not _files(uploads)
        _shot(page, "no-weights")


def test_shipped_weights_on_real_xrays(weights, cxr, index, page, tmp_path):
    """Every tab with X-rays of people: one as JPEG, one as DICOM, one of each class in an archive."""
    try:
        shipped = [name for name in list_models() if name in read_manifest(weights)]
    except WeightsError as error:
        pytest.skip(str(error))
    if not shipped:
        pytest.skip(f"no classifier has weights in {weights}; train and export one, as the README says")
    networks = Networks(weights)
    answering = networks.of_tasks(networks.tasks()[:1])  # those of the other tasks wait until they are chosen
    films = index[index["split"] == "test"].groupby("label").image.first()
    dicom = _dicom(tmp_path / "IM000002", load_xray(films["Tuberculosis"]).pixels)
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as archive:
        for label in CLASSES:
            archive.write(films[label], f"{label}.jpg")
    with served(weights, tmp_path) as (url, uploads):
        page.goto(url)
        claims = Claims(networks.get().entries, *results_of(weights))
        for film in (Path(films["Normal"]), dicom, phantom(**dict(zip(("seed", "opacity"), PHANTOMS["Dense shadow"])))):
            x = film if isinstance(film, XRay) else load_xray(film)
            analysis = networks.analyze(x, models=answering)
            page.click("text=Dense shadow") if film is x else _send(page, film)
            hashed = hashlib.sha256(np.ascontiguousarray(x.pixels)).hexdigest()[:16]
            page.wait_for_selector(f"#read >> text={hashed}")
            if doubts := claims.doubts(analysis):
                page.wait_for_selector("#withheld >> text=No reliable reading")
                assert doubts[0] in page.inner_text("#withheld") and not page.is_visible(".readings")
                page.click("#anyway")
            page.wait_for_selector(".readings")
            expect(page.locator(".readings thead button")).to_have_count(len(answering))
            expect(page.locator(".readings thead .mean")).to_have_count(1)
            table = page.locator(".readings").bounding_box()
            assert table["x"] + table["width"] <= page.viewport_size["width"], "within the column beside the film"
            said = page.inner_text("#headline")
            assert said.count("of other hospitals") == 1, "told, and told once"
            assert (f"All {len(answering)} networks: " in said) == (not doubts)
            _shot(page, f"real-{len(doubts)}-doubts")
        page.click("button[role=tab]:has-text('Compare attention')")
        page.wait_for_selector(".pyramid figure")
        _shot(page, "real-compare")
        page.click("button[role=tab]:has-text('Many X-rays')")
        page.set_input_files("#batch-drop input[type=file]", tmp_path / "films.zip")
        page.wait_for_selector("#batch a[download='MANet.csv']")
        expect(page.locator("#batch tbody tr")).to_have_count(len(CLASSES))
        for row in page.locator("#batch tbody tr").all():
            film = films[row.locator("th").inner_text().removesuffix(".jpg")]
            (claim,) = networks.analyze(load_xray(film), models=answering).to_dict()["claims"].values()
            said = row.locator("td").nth(1).inner_text()
            assert said == ("no reliable reading" if claim is None else shown_name(claim[0]))
        _shot(page, "real-many")
        page.click("button[role=tab]:has-text('Models')")
        page.wait_for_selector(".models details")
        expect(page.locator(".models details")).to_have_count(len(shipped) + 1)
        _shot(page, "models")
        assert not _files(uploads)
