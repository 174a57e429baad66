"""A data set as Parquet shards: equal to the folder that it was made of, and whole or refused."""

import shutil

import fsspec
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from train import classify, prepare
from train.data import Pictures, fingerprint, read_index
from train.measures.segmentation import measure_masks
from train.shards import list_shards, write_shards


@pytest.fixture(scope="module")
def packed(phantoms, tmp_path_factory):
    """The phantoms in three shards, with row groups of three or four films; one has no mask."""
    root = tmp_path_factory.mktemp("one-without-mask")
    index = read_index(phantoms).assign(findings="Mass")
    index.loc[7, "mask"] = ""
    index.to_csv(root / "index.csv", index=False)
    films = sum(path.stat().st_size for path in phantoms.glob("*.png"))
    shards = write_shards(read_index(root), "0" * 12, root / "shards", films // 3 + 2000, films // 8)
    assert [path.name[:14] for path in shards] == [f"{number:05}-of-00003" for number in range(3)]
    return root, root / "shards"


def test_shards_give_what_the_folder_gives_to_the_bit(packed, tmp_path):
    folder, shards = (Pictures(data, 64, tmp_path) for data in packed)
    assert np.array_equal(folder.images, shards.images) and np.array_equal(folder.masks, shards.masks)
    assert folder.masks[6].any() and not folder.masks[7].any() and folder.stem != shards.stem
    columns = [name for name in folder.index if name not in ("image", "mask")]
    pd.testing.assert_frame_equal(folder.index[columns], shards.index[columns])
    assert (shards.index["mask"] == "").equals(folder.index["mask"] == "")
    assert np.array_equal(shards.rows("val", with_mask=True), folder.rows("val", with_mask=True))
    larger = shards.resized(80)
    assert np.array_equal(larger.images, folder.resized(80).images) and larger.stem != shards.stem


def test_shards_are_read_from_a_store_and_decoded_once(packed, tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    for path in packed[1].iterdir():
        store.pipe(f"/films/{path.name}", path.read_bytes())
    known = Pictures("memory://films", 64, tmp_path)
    assert np.array_equal(known.images, Pictures(packed[0], 64, tmp_path).images)
    monkeypatch.setattr(Pictures, "_decode", lambda *_: pytest.fail("decoded again"))
    assert Pictures("memory://films", 64, tmp_path).stem == known.stem
    name = f"/films/{path.name}"
    store.pipe(name, store.cat(name))
    assert fingerprint(read_index("memory://films")) != known.stem.split("-")[0], "a shard was written anew"


def test_a_training_on_shards_ends_with_the_same_weights(run, packed, random_weights, tmp_path):
    made = {}
    for data in packed:
        out = tmp_path / data.name
        options = ["--model", "efficientnet_lite0_ma", "--size", 64, "--epochs", 1, "--batch", 8]
        where = ["--cache", tmp_path / "cache", "--weights", random_weights]
        run(classify, "--data", data, "--out", out, *where, *options)
        made[data.name] = load_file(out / "best.safetensors")
    folder, shards = made.values()
    assert folder.keys() == shards.keys() and all((folder[key] == shards[key]).all() for key in folder)


def test_masks_of_shards_are_measured_on_the_films_own_pixels(packed, random_weights):
    folder, shards = (measure_masks(data, random_weights, "val") for data in packed)
    assert len(folder) == 6 and folder.iou.tolist() == shards.iou.tolist()


def test_prepare_writes_shards_and_goes_on_where_it_was_interrupted(run, packed, tmp_path, capsys):
    run(prepare, "shards", "--data", packed[0], "--out", tmp_path)
    (shard,) = map(tmp_path.joinpath, map(str, list_shards(tmp_path)))
    assert shard.name == f"00000-of-00001-{fingerprint(read_index(packed[0]))}.parquet"
    assert "30 X-rays are in 1 shard(s)" in capsys.readouterr().out
    before = shard.stat().st_mtime_ns
    run(prepare, "shards", "--data", packed[0], "--out", tmp_path)
    assert shard.stat().st_mtime_ns == before and len(read_index(tmp_path)) == 30
    shutil.copytree(packed[1], tmp_path, dirs_exist_ok=True)
    assert len(read_index(tmp_path)) == 60, "two sets in one folder"
    with pytest.raises(SystemExit, match="has other shards, such as 00000-of-00003-0.* choose another folder"):
        run(prepare, "shards", "--data", packed[0], "--out", tmp_path)
    with pytest.raises(SystemExit, match=r"has an index\.csv, which is read before any shard"):
        run(prepare, "shards", "--data", packed[0], "--out", packed[0])


def test_shards_that_are_missing_or_damaged_are_named(packed, tmp_path):
    shutil.copytree(packed[1], tmp_path, dirs_exist_ok=True)
    _, second, third = sorted(tmp_path.iterdir())
    third.unlink()
    with pytest.raises(SystemExit, match=r"lacks 1 of 3 shards, the first of them 00002-of-00003-0+\.parquet\."):
        read_index(tmp_path)
    shutil.copy(packed[1] / third.name, third)
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1  # in a film, where only its checksum tells
    second.write_bytes(data)
    assert len(read_index(tmp_path)) == 30
    with pytest.raises(SystemExit, match=rf"The shard \S+{second.name} cannot be read \(\w+\); write it again\."):
        Pictures(tmp_path, 64, tmp_path / "cache")
    second.write_bytes(data[:100])
    with pytest.raises(SystemExit, match="cannot be read"):
        read_index(tmp_path)
    with pytest.raises(SystemExit, match="no address that fsspec knows"):
        read_index("nonsense://films")
    with pytest.raises(SystemExit, match="no shards at memory://nothing: write"):
        read_index("memory://nothing")
    with pytest.raises(SystemExit, match=r"There is no .*index\.csv: run"):
        read_index(tmp_path / "cache")
