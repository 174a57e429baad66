"""Weights: verified, explained when missing or damaged, and loaded without pickle."""

import json
import shutil

import pytest
import torch
from conftest import flip_a_bit

from manet_core import Pipeline, WeightsError
from manet_core.weights import load_network, read_manifest, sets_of, sha256, write_manifest


@pytest.fixture
def copy(random_weights, tmp_path):
    return shutil.copytree(random_weights, tmp_path / "weights")


def test_loads_in_evaluation_mode_without_gradients(random_weights):
    net = load_network(random_weights, "efficientnet_lite0_ma")
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert next(net.parameters()).dtype == torch.float32


def test_no_folder_no_manifest(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(WeightsError, match="manifest.json is missing"):
            Pipeline.load(folder)


def test_damaged_manifest(copy):
    (copy / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(WeightsError, match="damaged"):
        Pipeline.load(copy)


def test_missing_file_is_named(copy):
    (copy / "efficientnet_lite0.safetensors").unlink()
    with pytest.raises(WeightsError, match="efficientnet_lite0.safetensors is missing"):
        Pipeline.load(copy)
    assert Pipeline.load(copy, models=["efficientnet_lite0_ma"]).models == ["efficientnet_lite0_ma"]


def test_a_flipped_byte_is_noticed(copy):
    path = copy / "efficientnet_lite0.safetensors"
    flip_a_bit(path)
    with pytest.raises(WeightsError, match="damaged"):
        Pipeline.load(copy)


def test_weights_of_another_network_are_noticed(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    entry = manifest["models"]["efficientnet_lite0"]
    entry["file"] = "efficientnet_lite0_cbam.safetensors"
    entry["sha256"] = sha256(copy / entry["file"])
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(WeightsError, match="does not fit"):
        load_network(copy, "efficientnet_lite0")


@pytest.mark.parametrize(
    "file", ["../resunet.safetensors", "/etc/passwd", "..", "a/b.safetensors", "..\\x", "C:x", "", None, 3, []]
)
def test_a_manifest_cannot_point_outside_its_folder(copy, file):
    edited(copy, "efficientnet_lite0", file=file)
    with pytest.raises(WeightsError, match="beside the manifest|is missing"):
        load_network(copy, "efficientnet_lite0")


def test_a_manifest_of_any_content_is_a_sentence(copy):
    for text in ("[]", '{"models": []}', '{"models": {"resunet": 3}}', '{"models": null}', "\0", "[" * 10_000):
        (copy / "manifest.json").write_text(text, encoding="utf-8")
        with pytest.raises(WeightsError, match="damaged"):
            Pipeline.load(copy)


@pytest.mark.parametrize("network", [None, 3, {}, {"name": "resnet99"}, {"name": "resnet34", "depth": 9}])
def test_an_entry_without_a_network_is_named(copy, network):
    edited(copy, "efficientnet_lite0", network=network)
    with pytest.raises(WeightsError, match="'efficientnet_lite0' describes no network"):
        load_network(copy, "efficientnet_lite0")


def test_a_file_that_is_no_safetensors_is_named(copy):
    (copy / "x.safetensors").write_bytes(b"no weights")
    edited(copy, "efficientnet_lite0", file="x.safetensors", sha256=sha256(copy / "x.safetensors"))
    with pytest.raises(WeightsError, match="x.safetensors is no safetensors file"):
        load_network(copy, "efficientnet_lite0")


def test_an_unknown_model_is_named_with_those_that_are_there(random_weights):
    with pytest.raises(WeightsError, match="resnet50_ma.*efficientnet_lite0"):
        Pipeline.load(random_weights, models=["resnet50_ma"])


def edited(folder, name: str, **changes):
    """`folder`, whose manifest now says `changes` of `name`; a key of None is taken out."""
    entries = read_manifest(folder)
    entries[name] = {key: value for key, value in (entries[name] | changes).items() if value is not None}
    write_manifest(folder, entries)
    return folder


def test_a_missing_temperature_is_named_with_what_fits_it(copy):
    edited(copy, "efficientnet_lite0_ma", temperature=None)
    with pytest.raises(WeightsError, match="'efficientnet_lite0_ma'.*python -m train.evaluate"):
        Pipeline.load(copy)
    assert Pipeline.load(copy, ["efficientnet_lite0"]).models == ["efficientnet_lite0"]
    load_network(copy, "efficientnet_lite0_ma")  # as what fits it must


def test_a_network_must_answer_what_its_task_asks(copy):
    five = read_manifest(copy)["efficientnet_lite0"]["classes"]
    for task, classes in (("guided", five), ("manet", five[::-1]), ("nih14", None)):
        edited(copy, "efficientnet_lite0", task=task, classes=classes)
        with pytest.raises(WeightsError, match="names the wrong"):
            Pipeline.load(copy)
    edited(copy, "efficientnet_lite0", task="nonsense")
    with pytest.raises(WeightsError, match="'efficientnet_lite0'.*no task 'nonsense'.*manet, guided"):
        Pipeline.load(copy)


def test_another_manifest_in_the_folder_selects_another_set(copy):
    entries = read_manifest(copy)
    several = {"resunet": entries["resunet"], "the third": entries["efficientnet_lite0_cbam"]}
    other = copy / "other.json"
    write_manifest(other, several)
    assert read_manifest(other) == several and read_manifest(copy) == entries
    pipe = Pipeline.load(other)
    assert pipe.models == ["the third"] and pipe.hashes["the third"] == several["the third"]["sha256"]
    with pytest.raises(WeightsError, match="missing.json is missing"):
        Pipeline.load(copy / "missing.json")


def test_a_manifest_joins_several_sets(copy):
    entries = read_manifest(copy)
    classifier = entries["efficientnet_lite0"]
    write_manifest(copy / "more.json", {"resunet": entries["resunet"], "another": classifier})
    joined = copy / "joined.json"
    joined.write_text('{"sets": ["manifest.json", "more.json"]}', encoding="utf-8")
    assert sets_of(joined) == [copy / "manifest.json", copy / "more.json"] and sets_of(copy) == [copy / "manifest.json"]
    assert list(read_manifest(joined)) == [*entries, "another"]
    same, other = (load_network(path, name) for path, name in ((copy, "efficientnet_lite0"), (joined, "another")))
    assert all(torch.equal(weight, other.state_dict()[key]) for key, weight in same.state_dict().items())
    with pytest.raises(WeightsError, match="manifest.json, more.json"):
        write_manifest(joined, entries)
    assert read_manifest(copy) == entries

    write_manifest(copy / "more.json", {"resunet": entries["resunet"] | {"sha256": 64 * "0"}})
    with pytest.raises(WeightsError, match="differ in 'resunet'"):
        read_manifest(joined)
    for sets in ('["nothing.json"]', '["../manifest.json"]', "[]", "[3]", '"manifest.json"', '["joined.json"]'):
        joined.write_text(f'{{"sets": {sets}}}', encoding="utf-8")
        with pytest.raises(WeightsError, match="is missing" if "nothing" in sets else "is damaged"):
            read_manifest(joined)


def test_the_manifest_is_replaced_whole_or_not_at_all(copy, monkeypatch):
    before = (copy / "manifest.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_manifest(copy, {"resunet": {"figures": object()}})
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError):
        write_manifest(copy, {})
    assert (copy / "manifest.json").read_text(encoding="utf-8") == before


def test_shipped_weights_fit_and_are_what_the_manifest_says(weights):
    entries = read_manifest(weights)
    assert "resunet" in entries and "efficientnet_lite0_ma" in entries
    total = 0
    for name, entry in entries.items():
        path = weights / entry["file"]
        assert sha256(path) == entry["sha256"]
        assert {"network", "classes", "preprocessing", "training", "figures"} <= entry.keys()
        assert path.stat().st_size < 95e6
        total += path.stat().st_size
        assert load_network(weights, name) is not None
    assert total < 300e6
