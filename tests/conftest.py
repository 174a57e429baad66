"""What several test files need: real X-rays where they are, weights shipped and random, the page and a browser."""

import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file
from serving import ROOT, WAIT_S, served, wait_until  # noqa: F401, which tests take from here

from manet_core import CLASSES, create_classifier, create_segmenter
from manet_core.phantom import phantom, phantom_mask
from manet_core.tasks import get_task
from manet_core.weights import fingerprint, read_manifest, sha256, write_manifest
from train.measures.study import last_layer

BROWSER_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

LONGEST = ("app", "benchmark", "viewer", "evidence", "paper", "training", "archive", "teach", "main", "verbs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker ends on one of them while the other has nothing."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def weights() -> Path:
    """The shipped weights."""
    return ROOT / "weights"


@pytest.fixture(scope="session")
def cxr() -> Path:
    """Root of the real X-rays: MANET_DATA, or shared/cxr beside the repository."""
    root = Path(os.environ.get("MANET_DATA", ROOT.parent / "shared" / "cxr"))
    if not (root / "index.csv").is_file():
        pytest.skip(f"no real X-rays: {root}/index.csv is missing; set MANET_DATA to a folder that has it")
    return root


@pytest.fixture(scope="session")
def index(cxr):
    """The rows of the real X-rays, paths absolute."""
    from train.data import read_index

    return read_index(cxr)


def make_weights(folder: Path, tasks: dict[str, str], **preprocessing: dict) -> Path:
    """Fill `folder` with random weights: a small segmenter, and a classifier for each {network: task}.

    All see 64×64 pixels, unless `preprocessing` says otherwise of a network. Those of which one class holds name the
    last one whatever they see, as a page shows no class where its networks disagree.
    """
    torch.manual_seed(0)
    models = {}
    for name, task in ({"resunet": "segment"} | tasks).items():
        classes = ("lung",) if task == "segment" else get_task(task).classes
        net = create_segmenter(width=4) if task == "segment" else create_classifier(name, len(classes))
        if task != "segment" and get_task(task).exclusive:
            last_layer(net)[1].bias.data[-1] += 5
        path = folder / f"{name}.safetensors"
        save_file(net.state_dict(), path)
        models[name] = {
            "task": task,
            "file": path.name,
            "sha256": sha256(path),
            "network": {"name": name} | ({"width": 4} if task == "segment" else {}),
            "classes": list(classes),
            "preprocessing": preprocessing.get(name, {"size": 64}),
        } | ({} if task == "segment" else {"temperature": 1.0})
    write_manifest(folder, models)
    return folder


def behind_shipped_segmenter(random: Path, weights: Path, folder: Path) -> Path:
    """Fill `folder` with random classifiers and the shipped segmenter, which finds the lungs of a phantom."""
    entry = read_manifest(weights)["resunet"]
    segmenter = {key: value for key, value in entry.items() if key not in ("familiarity", "pose")}
    for path in (*random.glob("*.safetensors"), weights / segmenter["file"]):
        (folder / path.name).symlink_to(path.resolve())
    write_manifest(folder, read_manifest(random) | {"resunet": segmenter})
    return folder


def with_mean(folder: Path, name: str) -> None:
    """Give a network of a weights folder a mean heatmap of each class: strongest in the picture's upper left."""
    models, path = read_manifest(folder), folder / "heatmaps.safetensors"
    of, segmenter = models[name], models["resunet"]
    save_file({name: torch.linspace(1, 0, 28).outer(torch.linspace(1, 0, 28)).repeat(len(of["classes"]), 1, 1)}, path)
    of["heatmaps"] = {
        "file": path.name,
        "sha256": sha256(path),
        "of": fingerprint(of),
        "segmenter": fingerprint(segmenter),
        "films": dict.fromkeys(of["classes"], 123),
        "alike": dict.fromkeys(of["classes"], 0.5),
    }
    write_manifest(folder, models)


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory) -> Path:
    """A weights folder with a small segmenter and the efficientnet_lite0 trio, all random."""
    trio = ("efficientnet_lite0", "efficientnet_lite0_ma", "efficientnet_lite0_cbam")
    return make_weights(tmp_path_factory.mktemp("weights"), dict.fromkeys(trio, "manet"))


@pytest.fixture(scope="session")
def many_tasks(tmp_path_factory) -> Path:
    """A weights folder of random networks that are asked for five classes, three, and 14 findings.

    The five-class resnet34_ma is shown the lungs' box alone.
    """
    tasks = {
        "efficientnet_lite0": "manet",
        "efficientnet_lite0_ma": "guided",
        "efficientnet_lite0_cbam": "nih14",
        "resnet34_ma": "manet",
    }
    box = {"size": 64, "working": 96, "crop": 0.05}
    return make_weights(tmp_path_factory.mktemp("tasks"), tasks, resnet34_ma=box)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A data root of 30 phantoms: class 0 clear, class 3 with an opacity; 16 train, 6 val, 8 test."""
    from train.data import COLUMNS

    root = tmp_path_factory.mktemp("phantoms")
    rows = [",".join(COLUMNS)]
    for i in range(30):
        sick = i % 2
        image, mask = root / f"{i}.png", root / f"{i}-mask.png"
        Image.fromarray((phantom(96, i, opacity=float(sick)).pixels * 255).astype(np.uint8)).save(image)
        Image.fromarray(phantom_mask(96, i)).save(mask)
        split = "train" if i < 16 else "val" if i < 22 else "test"
        rows.append(f"{image.name},{mask.name},{CLASSES[3 * sick]},{'shenzhen' if i % 3 else 'kermany'},p{i},{split}")
    (root / "index.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def picture(tmp_path) -> Path:
    """A phantom as a file."""
    path = tmp_path / "chest.png"
    Image.fromarray((phantom(128).pixels * 255).astype(np.uint8)).save(path)
    return path


def flip_a_bit(path: Path) -> None:
    """Damage a file in its last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call a verb's main with arguments, in a scratch cache."""

    def call(verb, *arguments):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        verb.main()

    return call


def hangs_up(connection: socket.socket) -> bool:
    """Whether the other side ends a connection."""
    connection.settimeout(WAIT_S)
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the first call's precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)


def expect(locator):
    """Playwright's assertions of a page's `locator`, which wait until they hold: an answer changes a page in steps."""
    from playwright import sync_api

    return sync_api.expect(locator)


@pytest.fixture(scope="session")
def server(random_weights, weights, tmp_path_factory):
    folder = behind_shipped_segmenter(random_weights, weights, tmp_path_factory.mktemp("weights"))
    with_mean(folder, "efficientnet_lite0_ma")
    with served(folder, tmp_path_factory.mktemp("server")) as url_and_uploads:
        yield url_and_uploads


@pytest.fixture(scope="session")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    sync_api.expect.set_options(timeout=1000 * WAIT_S)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A fresh page of 1280×720; `page.requested` lists every address it asked for."""
    context = chromium.new_context(viewport={"width": 1280, "height": 720})
    page = context.new_page()
    page.set_default_timeout(1000 * WAIT_S)
    page.requested = []
    context.on("request", lambda request: page.requested.append(request.url))
    yield page
    context.close()
    strangers = [
        url for url in page.requested if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))
    ]
    assert not strangers
