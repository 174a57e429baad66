"""Mean heatmaps: how they are made, whose they are, and what the viewer is told of them."""

import base64
import io
import json
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
from conftest import flip_a_bit, make_weights
from PIL import Image
from safetensors.numpy import load_file

from manet_core import Pipeline, WeightsError
from manet_core.heatmap_means import SIDE, HeatmapMean, alike, load_means, small
from manet_core.phantom import phantom
from manet_core.weights import read_manifest
from train import heatmap_means
from train.data import read_index
from train.shards import write_shards
from ui import viewer
from ui.networks import Film

NAME = "efficientnet_lite0"


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("weights"), {NAME: "manet"})


def test_a_mean_is_of_all_heatmaps_that_show_anything(phantoms, random_weights, run, monkeypatch, tmp_path):
    monkeypatch.setattr(heatmap_means, "FEWEST", 3)
    run(heatmap_means, "--data", phantoms, "--weights", random_weights, "--films", 5)
    entries = read_manifest(random_weights)
    found = load_means(random_weights, entries)[NAME]
    index = read_index(phantoms)
    drawn = np.random.default_rng(0).permutation(index.image[index.split == "val"].to_numpy())[:5]
    readings = [a.readings[NAME] for a in Pipeline.load(random_weights).analyze_many(drawn.tolist())]
    expected = {}
    for label in entries[NAME]["classes"]:
        maps = [small(reading.heatmaps[label]) for reading in readings if reading.peaks[label] > 0]
        if len(maps) >= 3:
            expected[label] = (len(maps), np.mean(maps, 0), np.median([alike(m, np.mean(maps, 0)) for m in maps]))
    assert found and [*found] == [*expected]
    for label, (films, mean, correlation) in expected.items():
        assert found[label].films == films and found[label].mean.shape == (SIDE, SIDE)
        assert found[label].mean == pytest.approx(mean, abs=1e-3)
        assert found[label].alike == pytest.approx(correlation, abs=2e-3)
    path = random_weights / entries[NAME]["heatmaps"]["file"]
    assert path.name == "heatmaps.safetensors" and path.stat().st_size < 200_000
    assert {array.shape[1:] for array in load_file(path).values()} == {(SIDE, SIDE)}

    other = entries[NAME] | {"sha256": "0" * 64}  # means are of the very weights, and of the very masks
    assert load_means(random_weights, entries | {NAME: other}) == {}
    refitted = entries[NAME] | {"last_layer": {"sha256": "0" * 64}}
    assert load_means(random_weights, entries | {NAME: refitted}) == {}
    segmenter = entries["resunet"] | {"sha256": "0" * 64}
    assert load_means(random_weights, entries | {"resunet": segmenter}) == {}
    flip_a_bit(path)
    with pytest.raises(WeightsError, match="damaged"):
        load_means(random_weights, entries)


def test_means_are_made_of_shards_too(phantoms, random_weights, run, monkeypatch, tmp_path):
    monkeypatch.setattr(heatmap_means, "FEWEST", 3)
    path, found = random_weights / "heatmaps.safetensors", []
    write_shards(read_index(phantoms), "0" * 12, tmp_path / "shards", 2**20, 2**18)
    for data in (phantoms, tmp_path / "shards"):
        run(heatmap_means, "--data", data, "--weights", random_weights, "--films", 5)
        found.append(load_file(path))
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(array, found[1][name]) for name, array in found[0].items())


def test_no_mean_is_made_of_few(phantoms, random_weights, run):
    with pytest.raises(SystemExit, match="has 6 validation X-rays; a mean needs 100"):
        run(heatmap_means, "--data", phantoms, "--weights", random_weights)


def test_the_viewer_is_told_of_the_mean_and_the_difference(random_weights, rng):
    analysis = Pipeline.load(random_weights).analyze(phantom(96, seed=1))
    reading = analysis.readings[NAME]
    label = max(reading.peaks, key=reading.peaks.get)
    means = {NAME: {label: HeatmapMean(rng.random((SIDE, SIDE), np.float32), 123, 0.5)}}

    def told(analysis, means) -> dict:
        film = Film(analysis, {}, (96, 96), "", "", datetime.now(), "key")
        (network,) = json.loads(viewer.layers_text(film, [], True, means))["networks"]
        return {name: of["mean"] for name, of in network["classes"].items() if "mean" in of}

    def levels(url: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))), float) / 255

    (found,) = told(analysis, means).values()
    own, mean = small(reading.heatmaps[label]), means[NAME][label].mean
    assert levels(found["mean"]) == pytest.approx(mean, abs=0.003)
    assert 2 * levels(found["difference"]) - 1 == pytest.approx(own - mean, abs=0.005)
    assert found["note"] == (
        f"correlation {alike(own, mean):.2f} with the mean; half of 123 validation X-rays: 0.50 or more"
    )
    reading.peaks[label] = 0.0
    assert told(analysis, means) == {} and told(analysis, {}) == {}
    reading.peaks[label] = 1.0
    assert told(analysis, means) and told(replace(analysis, explainer="layercam"), means) == {}, "they are of Grad-CAM"
