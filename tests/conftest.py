"""What several test files need: real X-rays where they are, weights shipped and random."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

from manet_core import CLASSES, create_classifier, create_segmenter
from manet_core.phantom import phantom, phantom_mask
from manet_core.weights import sha256

ROOT = Path(__file__).parent.parent


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


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory) -> Path:
    """A weights folder with a small segmenter and the efficientnet_lite0 trio, all random."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    models = {}
    names = ["resunet", "efficientnet_lite0", "efficientnet_lite0_ma", "efficientnet_lite0_cbam"]
    for name in names:
        segments = name == "resunet"
        net = create_segmenter(width=4) if segments else create_classifier(name)
        path = folder / f"{name}.safetensors"
        save_file(net.state_dict(), path)
        models[name] = {
            "task": "segment" if segments else "classify",
            "file": path.name,
            "sha256": sha256(path),
            "network": {"name": name} | ({"width": 4} if segments else {}),
            "classes": ["lung"] if segments else list(CLASSES),
            "preprocessing": {"size": 64},
        }
    (folder / "manifest.json").write_text(json.dumps({"models": models}))
    return folder


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
    (root / "index.csv").write_text("\n".join(rows) + "\n")
    return root


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


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the first call's precision for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)
