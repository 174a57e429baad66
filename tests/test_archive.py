"""An archive into Parquet files: every source, every X-ray once, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.dataset as ds
import pytest
from conftest import ROOT
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from manet_core import Pipeline, XRayError, archive
from manet_core.__main__ import main
from manet_core.phantom import phantom
from manet_core.sources import FetchError, SourceError, film_names, read_film
from manet_core.weights import read_manifest, write_manifest

MODEL = "efficientnet_lite0_ma"


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """A folder of seven small X-rays and one file that is none."""
    folder = tmp_path_factory.mktemp("films")
    for i in range(7):
        Image.fromarray((phantom(80, i).pixels * 255).astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def batch(weights, out, *sources, status=1) -> list[dict]:
    """The rows that `batch` leaves, by file; and checks its exit status."""
    options = ["--out", str(out), "--weights", str(weights), "--models", MODEL, "--part", "3"]
    assert main(["batch", *map(str, sources), *options]) == status
    return rows(out)


def rows(out) -> list[dict]:
    found = ds.dataset(out / "rows", schema=archive.SCHEMAS["rows"]).to_table().to_pylist()
    return sorted(found, key=lambda row: row["file"])


def test_a_folder_becomes_rows_that_say_what_analyze_does(films, random_weights, tmp_path, capsys):
    found = batch(random_weights, tmp_path / "o", films, "--masks", "--heatmaps")
    assert [Path(row["file"]).name for row in found] == [*(f"{i}.png" for i in range(7)), "bad.png"]
    assert len(list((tmp_path / "o" / "rows").iterdir())) == 3, "parts of three"
    assert found[-1]["error"].endswith(".") and found[-1]["network"] is None
    pipe = Pipeline.load(random_weights, [MODEL])
    one = pipe.analyze(films / "3.png")
    reading, known, row = one.readings[MODEL], one.to_dict(), found[3]
    assert dict(row["probabilities"]) == pytest.approx(reading.probabilities, abs=1e-6)
    assert row["weights"] == pipe.hashes[MODEL] and row["task"] == "manet" and row["error"] is None
    assert (row["reliable"], row["withheld"], row["warnings"]) == (one.reliable, one.withheld, one.warnings)
    assert row["lung_area"] == pytest.approx(known["lung_area"])
    assert row["lung_area_right"] == pytest.approx(known["lung_areas"]["right"])
    assert row["claim"] == (reading.predicted if one.reliable else "no reliable reading")
    masks = {row["file"]: archive.mask_of(row) for row in ds.dataset(tmp_path / "o" / "masks").to_table().to_pylist()}
    assert len(masks) == 7 and (masks[row["file"]] == one.segmentation.cleaned).all()
    heatmaps = ds.dataset(tmp_path / "o" / "heatmaps").to_table().to_pylist()
    assert len(heatmaps) == 7 * 5
    (map_,) = [h for h in heatmaps if h["file"] == row["file"] and h["class"] == "COVID-19"]
    np.testing.assert_allclose(archive.heatmap_of(map_), reading.heatmaps["COVID-19"], atol=0.002)
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["failed"] == 1
    assert "films per core-hour" in capsys.readouterr().out


def test_what_is_finished_is_not_done_again(films, random_weights, tmp_path, monkeypatch, capsys):
    out, seen, analyze = tmp_path / "o", [], Pipeline._analyze

    def count(self, xrays, *options):
        seen.extend(xrays)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return analyze(self, xrays, *options)

    monkeypatch.setattr(Pipeline, "_analyze", count)
    before = batch(random_weights, out, films, status=130)
    assert 0 < len(before) < 8 and len({row["file"] for row in before}) == len(before)
    (out / "rows" / ".x.1.unfinished").write_bytes(b"half a part")
    (out / "masks" / "orphan.parquet").write_bytes(b"of a part that never was")
    seen.extend([None] * 5)
    after = batch(random_weights, out, films, films / "1.png")
    assert len(after) == 8 and [row for row in after if row in before] == before
    assert not list(out.rglob("*.unfinished")) and not list(out.rglob("orphan*"))
    seen.clear()
    assert batch(random_weights, out, films, status=0) == after and not seen
    assert main(["batch", str(films), "--out", str(out), "--weights", str(random_weights)]) == 2
    assert "choose another --out" in capsys.readouterr().err


CHANGED = {  # what of a manifest changes an answer: (network, its entry with that changed)
    "segmenter": ("resunet", {"sha256": "another"}),
    "familiarity": ("resunet", {"familiarity": {"sha256": "another", "limit": 2.0}}),
    "pose": ("resunet", {"pose": {"sha256": "another", "limit": 0.9}}),
    "size of the segmenter": ("resunet", {"preprocessing": {"size": 32}}),
    "classifier": (MODEL, {"sha256": "another"}),
    "last layer": (MODEL, {"last_layer": {"sha256": "another"}}),
    "temperature": (MODEL, {"temperature": 1.5}),
    "operating point": (MODEL, {"operating_point": 0.5}),
    "preprocessing": (MODEL, {"preprocessing": {"size": 64, "crop": 0.05}}),
}


@pytest.fixture(scope="module")
def answered(films, random_weights, tmp_path_factory) -> Path:
    """The output folder of a finished run."""
    out = tmp_path_factory.mktemp("answered") / "o"
    batch(random_weights, out, films / "bad.png")
    return out


def goes_on(answered, films, entries, folder, status) -> None:
    """Check the exit status of the same command with other entries in the manifest; it needs no weights any more."""
    write_manifest(folder, entries)
    batch(folder, answered, films / "bad.png", status=status)


@pytest.mark.parametrize("what", CHANGED)
def test_answers_of_other_networks_are_not_gone_on_with(answered, films, random_weights, tmp_path, capsys, what):
    entries, (name, changed) = read_manifest(random_weights), CHANGED[what]
    goes_on(answered, films, entries | {name: entries[name] | changed}, tmp_path, status=2)
    assert "choose another --out" in capsys.readouterr().err
    goes_on(answered, films, entries, tmp_path, status=0)


def test_what_changes_no_answer_or_is_not_asked_keeps_nobody_from_going_on(answered, films, random_weights, tmp_path):
    told = {"figures": {"test": 1}, "training": {"minutes": 5}, "heatmaps": {"sha256": "another"}, "file": "moved"}
    entries = {name: dict(reversed((entry | told).items())) for name, entry in read_manifest(random_weights).items()}
    entries["efficientnet_lite0"]["sha256"] = "another"
    goes_on(answered, films, entries, tmp_path, status=0)


@pytest.mark.parametrize("kind", ["of an earlier version", "cut short", "no text"])
def test_settings_that_say_too_little_are_refused(films, random_weights, tmp_path, capsys, kind):
    weights = {MODEL: read_manifest(random_weights)[MODEL]["sha256"]}
    before = (json.dumps({"weights": weights, "masks": False, "heatmaps": False}, indent=2) + "\n").encode()
    settings = {"of an earlier version": before, "cut short": before[:-9], "no text": b"\xff"}
    (tmp_path / "settings.json").write_bytes(settings[kind])
    batch(random_weights, tmp_path, films / "bad.png", status=2)
    assert "choose another --out" in capsys.readouterr().err


@pytest.fixture
def store(films, monkeypatch):
    """Films at memory://store, whose opening raises what is put into `errors` by name."""
    system, errors, whole = fsspec.filesystem("memory"), {}, MemoryFileSystem._open
    for path in films.iterdir():
        system.pipe(f"/store/{path.name}", path.read_bytes())

    def open_(self, path, *args, **options):
        if error := errors.get(Path(path).name):
            raise error
        return whole(self, path, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", open_)
    yield errors
    system.rm("/store", recursive=True)


def test_a_film_that_its_store_does_not_give_is_asked_for_again(store, random_weights, tmp_path, capsys):
    out = tmp_path / "o"
    store |= {"1.png": TimeoutError(), "2.png": RuntimeError("Session is closed"), "3.png": FileNotFoundError()}
    before = batch(random_weights, out, "memory://store")
    assert [Path(row["file"]).name for row in before] == [f"{i}.png" for i in (0, 3, 4, 5, 6)] + ["bad.png"]
    assert before[1]["error"] == "There is no such file."
    done = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (done["read"], done["failed"]) == (4, 4)
    assert "2 could not be fetched; the same command asks for them again." in capsys.readouterr().err
    store.clear()
    after = batch(random_weights, out, "memory://store", status=0)
    assert len(after) == 8 and [row for row in after if row in before] == before
    done = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (done["read"], done["failed"], done["finished before"]) == (2, 0, 6)
    assert capsys.readouterr().err.count("fetched") == 0


def test_a_part_of_which_nothing_was_fetched_is_not_there(store, random_weights, tmp_path):
    """Of a worker of a cluster."""
    job = archive.Job(str(tmp_path), str(random_weights), (MODEL,), "cpu")
    archive.begin(job, read_manifest(random_weights))
    names = film_names(["memory://store"])
    store |= {f"{i}.png": OSError("no answer") for i in range(3)}
    reader = archive.Reader(job)
    assert reader(names[:3]) == (0, 3, 3) and not list((tmp_path / "rows").iterdir())
    assert reader(names[2:4]) == (1, 1, 1) and [row["file"] for row in rows(tmp_path)] == names[3:4]
    assert archive.begin(job, read_manifest(random_weights)) == set(names[3:4])


def test_what_is_wrong_with_an_archive_is_no_fault_of_its_store(store, films, tmp_path):
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as made:
        made.write(films / "1.png", "1.png")
    data = bytearray((tmp_path / "films.zip").read_bytes())
    data[60:90] = bytes(30)
    fsspec.filesystem("memory").pipe("/store/films.zip", bytes(data))
    store["films.zip"] = OSError("no answer")
    for kind, said in ((FetchError, "OSError"), (XRayError, "unpacked")):
        with pytest.raises(XRayError, match=said) as caught:
            read_film("zip://1.png::memory://store/films.zip")
        assert caught.type is kind
        store.clear()


def test_sources_of_every_kind(films, tmp_path, monkeypatch):
    inside = film_names([str(films)])
    assert inside == [str(films / name) for name in sorted(os.listdir(films))]
    assert film_names([str(films / "[0-2].png"), str(films / "1.png")]) == inside[:3]
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as made:
        for name in inside:
            made.write(name, f"within/{Path(name).name}")
    members = film_names([str(tmp_path / "films.zip")])
    assert members == [f"zip://within/{Path(name).name}::{tmp_path / 'films.zip'}" for name in inside]
    assert (read_film(members[2]).pixels == read_film(inside[2]).pixels).all()
    (tmp_path / "list.txt").write_text(f"{inside[4]}\n\n{members[0]}\n{inside[4]}\n", encoding="utf-8")
    assert film_names([f"@{tmp_path / 'list.txt'}"]) == [inside[4], members[0]]
    store = fsspec.filesystem("memory")
    for source in (inside[0], tmp_path / "films.zip"):
        store.pipe(f"/bucket/{Path(source).name}", Path(source).read_bytes())
    (stored,) = film_names(["memory://bucket"])
    remote = film_names(["memory://bucket/films.zip"])
    assert len(remote) == 8 and (read_film(stored).pixels == read_film(remote[0]).pixels).all()
    for wrong in (str(tmp_path / "*.dcm"), "@nowhere.txt", "nonsense://x", "memory://empty", str(tmp_path / "no.zip")):
        with pytest.raises(SourceError, match=r"\w"):
            film_names([wrong])


def test_without_ray_the_engine_says_what_to_install(films, random_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    options = ["--out", str(tmp_path / "o"), "--weights", str(random_weights), "--engine", "ray"]
    assert main(["batch", str(films), *options]) == 2
    assert "pip install 'ray[data]'" in capsys.readouterr().err


def test_ray_writes_the_same_rows_and_a_killed_worker_loses_and_doubles_nothing(films, random_weights, tmp_path):
    """One of its two workers is killed as soon as a part is there."""
    pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'ray[data]'")
    psutil = pytest.importorskip("psutil")
    here, there = batch(random_weights, tmp_path / "local", films), tmp_path / "ray"
    command = [sys.executable, "-m", "manet_core", "batch", films, "--out", there, "--weights", random_weights]
    command += ["--models", MODEL, "--part", "1", "--engine", "ray", "--workers", "2"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        killed = None
        while process.poll() is None and killed is None:
            if (there / "rows").is_dir() and list((there / "rows").glob("*.parquet")):
                workers = [p for p in psutil.Process(process.pid).children(True) if "MapWorker" in " ".join(_line(p))]
                if workers:
                    killed = workers[0]
                    killed.kill()
            time.sleep(0.02)
        errors = process.communicate()[1]
    assert process.returncode == 1, errors
    assert killed is not None
    found = rows(there)
    assert [row["file"] for row in found] == [row["file"] for row in here]
    for one, other in zip(found, here):
        assert dict(one.pop("probabilities") or {}) == pytest.approx(dict(other.pop("probabilities") or {}), abs=1e-5)
        assert one == other


def _line(process) -> list[str]:
    import psutil

    try:
        return process.cmdline()
    except psutil.Error:
        return []
