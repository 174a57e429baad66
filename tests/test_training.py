"""prepare → segment → export → classify → export → evaluate on a few phantoms, and what must hold on the way."""

import ctypes
import io
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from manet_core import CLASSES, Pipeline, create_classifier, load_xray
from manet_core.lungs import Lungs
from manet_core.preprocess import View, crop, lung_box, network_input, resize, to_unit_range
from manet_core.tasks import MANET, NIH14
from manet_core.weights import read_manifest
from train import broad, classify, data, engine, evaluate, export, segment
from train.augment import augmentation
from train.complexity import last_map
from train.data import (
    LungPictures,
    Pictures,
    RawPictures,
    draw_weights,
    lung_pictures,
    predicted_lungs,
    read_index,
    split_by_image,
)
from train.recipe import PAPER, RECIPES, Recipe, Run
from train.segment import dice_loss, intersection_over_union

SMALL = ["--size", 64, "--batch", 8, "--device", "cpu", "--workers", 0]


def test_every_verb_in_turn(phantoms, run, tmp_path):
    """From phantoms to a pipeline that was trained, exported, measured and recorded."""
    weights, cache = tmp_path / "weights", tmp_path / "cache"
    common = ["--data", phantoms, "--cache", cache, *SMALL]
    run(
        segment,
        *common,
        "--out",
        tmp_path / "seg",
        "--width",
        8,
        "--epochs",
        20,
        "--lr",
        0.01,
        "--schedule",
        "onecycle",
        "--balance",
        0.5,
    )
    run(export, "--run", tmp_path / "seg", "--weights", weights)
    run(
        classify,
        *common,
        "--weights",
        weights,
        "--model",
        "efficientnet_lite0_ma",
        "--epochs",
        2,
        "--out",
        tmp_path / "c",
    )
    run(export, "--run", tmp_path / "c", "--weights", weights)
    card = weights / "MODEL_CARD.md"
    card.write_text("before\n<!-- evaluation -->\nold\n<!-- /evaluation -->\nafter\n")
    run(
        evaluate,
        "--data",
        phantoms,
        "--weights",
        weights,
        "--cache",
        cache,
        "--results",
        tmp_path / "results",
        "--record",
    )

    log = (tmp_path / "seg" / "log.csv").read_text().splitlines()
    assert len(log) == 21 and "iou_kermany" in log[0]
    entries = json.loads((weights / "manifest.json").read_text())["models"]
    assert entries["resunet"]["training"]["departures_from_paper"]["epochs"] == {"paper": 50, "here": 20}
    assert entries["resunet"]["training"]["pictures"] == {"kermany": 6, "shenzhen": 10}
    results = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert entries["efficientnet_lite0_ma"]["figures"]["test"] == results["classification"]["efficientnet_lite0_ma"]
    assert results["segmentation"]["kermany"]["iou"]["value"] > 0.6, "the segmenter learns the phantom"
    assert results["classification"]["efficientnet_lite0_ma"]["n"] == 8
    assert "old" not in card.read_text() and evaluate.tables(results) in card.read_text()

    analysis = Pipeline.load(weights).analyze(load_xray(phantoms / "25.png"))
    assert analysis.mask.any() and list(analysis.readings) == ["efficientnet_lite0_ma"]
    dtypes = {
        t.dtype for k, t in load_file(weights / "resunet.safetensors").items() if "running" not in k and "num_" not in k
    }
    assert dtypes == {torch.float16}


SHORT = replace(
    PAPER["classify"], model="efficientnet_lite0", size=64, epochs=3, batch=8, lr=0.05, precision="no", select="score"
)


def train_classifier(phantoms, cache, out, stop_after=None, **changes):
    """Three epochs of a small classifier; with `stop_after`, interrupted while that epoch is validated."""
    recipe = replace(SHORT, **changes)
    pictures = Pictures(phantoms, 64, cache)
    rows = pictures.rows("train", labelled=True)
    train_set = LungPictures("classify", pictures, rows, pictures.masks, augmentation(30, True), recipe.seed)
    torch.manual_seed(recipe.seed)
    net = create_classifier("efficientnet_lite0")  # has dropout, so the generator's state matters
    epochs = iter(range(1, 10))

    def loss(net, batch):
        return torch.nn.functional.cross_entropy(net(batch[0]), batch[2])

    def validate(net, device):
        if next(epochs) == stop_after:
            raise KeyboardInterrupt
        return {"score": 1.0}

    run = Run(str(phantoms), str(out), device="cpu")
    engine.fit(recipe, run, net, train_set, loss, validate)
    return torch.load(out / "last.ckpt", weights_only=True)["average" if recipe.ema else "net"]


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_an_interrupted_training_ends_with_the_same_weights(phantoms, tmp_path, ema):
    whole = train_classifier(phantoms, tmp_path, tmp_path / "whole", ema=ema)
    with pytest.raises(SystemExit, match="same command goes on"):
        train_classifier(phantoms, tmp_path, tmp_path / "cut", stop_after=2, ema=ema)
    resumed = train_classifier(phantoms, tmp_path, tmp_path / "cut", ema=ema)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = train_classifier(phantoms, tmp_path, tmp_path / "2", seed=1, ema=ema)
    assert any(not torch.equal(whole[name], other[name]) for name in other)


def test_of_equal_epochs_the_first_is_kept_and_recorded(phantoms, tmp_path):
    train_classifier(phantoms, tmp_path, tmp_path / "out", schedule="constant")
    one = train_classifier(phantoms, tmp_path, tmp_path / "one", epochs=1, schedule="constant")
    kept = load_file(tmp_path / "out" / "best.safetensors")
    assert json.loads((tmp_path / "out" / "result.json").read_text())["validation"]["epoch"] == 1
    assert all(torch.equal(kept[name], tensor) for name, tensor in one.items())
    last = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)["net"]
    assert not torch.equal(kept["classifier.weight"], last["classifier.weight"])


def test_the_lowest_loss_is_kept_and_patience_ends_the_training(tmp_path):
    losses = [0.9, 0.5, 0.7, 0.6, 0.4]
    net, given = torch.nn.Linear(1, 1), iter(losses)
    recipe = replace(SHORT, epochs=5, batch=2, select="val_loss", patience=2)
    pairs = torch.utils.data.TensorDataset(torch.ones(4, 1), torch.zeros(4, 1))

    def loss(net, batch):
        return (net(batch[0]) - batch[1]).square().mean()

    def train():
        run = Run("", str(tmp_path), device="cpu")
        engine.fit(recipe, run, net, pairs, loss, lambda net, device: {"val_loss": next(given)})
        return json.loads((tmp_path / "result.json").read_text())["validation"]

    assert train()["epoch"] == 2, "0.5, then two that are no better"
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 4
    assert train()["epoch"] == 2 and next(given) == 0.4, "the same command trains no further"


def test_a_moving_average_is_what_is_kept(tmp_path):
    """θ' ← d θ' + (1 − d) θ after every step, of which the first copies: by hand for three steps."""
    net, before = torch.nn.Linear(1, 1), []
    pairs = torch.utils.data.TensorDataset(torch.ones(6, 1), torch.zeros(6, 1))

    def loss(net, batch):
        before.append(net.weight.detach().clone())
        return (net(batch[0]) - batch[1]).square().mean()

    recipe = replace(SHORT, ema=0.75, epochs=1, batch=2, schedule="constant")
    engine.fit(recipe, Run("", str(tmp_path), device="cpu"), net, pairs, loss, lambda *_: {"score": 1.0})
    _, expected, second = before
    for weight in (second, net.weight.detach()):
        expected = 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(load_file(tmp_path / "best.safetensors")["weight"], expected)


STEPS = """
import json, os, sys

import torch
from torch import nn

from train.data import LungPictures, Pictures
from train.engine import fit
from train.recipe import Recipe, Run

data, cache, out = sys.argv[1:]
pictures = Pictures(data, 64, cache)
train_set = LungPictures("classify", pictures, pictures.rows("train", labelled=True), pictures.masks)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 4, 5, 4), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
net(torch.zeros(1, 1, 64, 64))
losses = []


def loss(net, batch):
    value = nn.functional.cross_entropy(net(batch[0]), batch[2])
    losses.append(value.item())
    return value


recipe = Recipe(size=64, epochs=3, batch=8, lr=0.02, precision="no")
fit(recipe, Run(data, out, device="cpu"), net, train_set, loss, lambda net, device: {"accuracy": 0.0})
with open(f"{out}/losses-{os.environ.get('RANK', 0)}.json", "w", encoding="utf-8") as file:
    json.dump(losses, file)
"""


def test_two_processes_train_as_one_does(phantoms, tmp_path, monkeypatch):
    """Each batch is shared among the processes: every step has the same loss, by the same weights.

    The network has no batch norm, whose statistics only GPUs share. `accelerate launch` would start a single process
    on a CPU; torchrun, which it calls for GPUs, starts both.
    """
    script = tmp_path / "steps.py"
    script.write_text(STEPS, encoding="utf-8")
    losses = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = [str(part) for part in (script, phantoms, tmp_path, out)]
        if processes == 1:
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(str(script))
        else:
            launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split(), *arguments]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            subprocess.run(launch, check=True, cwd=ROOT, env=environment, timeout=300)
        files = sorted(out.glob("losses-*.json"))
        assert len(files) == processes
        losses[processes] = np.mean([json.loads(file.read_text(encoding="utf-8")) for file in files], axis=0)
    assert losses[1].shape == (6,)
    np.testing.assert_allclose(losses[2], losses[1], atol=1e-5)
    assert losses[1][4:].mean() < losses[1][:2].mean() - 0.1, "the same X-rays again: what is learnt moves the loss"


def test_another_setting_in_the_same_folder_is_refused(phantoms, tmp_path):
    train_classifier(phantoms, tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit, match="another lr"):
        train_classifier(phantoms, tmp_path, tmp_path / "out", lr=0.1)


def test_a_setting_that_an_older_version_also_had_is_no_other_setting(tmp_path):
    engine._check_settings(tmp_path / "settings.json", {"lr": 0.1, "steps": None})
    engine._check_settings(tmp_path / "settings.json", {"lr": 0.1})


def test_too_few_pictures_are_explained(phantoms, tmp_path):
    with pytest.raises(SystemExit, match="fewer than --batch 64"):
        train_classifier(phantoms, tmp_path, tmp_path / "out", batch=64)


def test_the_cache_does_not_depend_on_how_the_folder_is_spelled(phantoms, tmp_path, monkeypatch):
    first = Pictures(phantoms, 64, tmp_path)
    monkeypatch.chdir(phantoms.parent)
    assert Pictures(phantoms.name, 64, tmp_path).stem == first.stem


def test_lungs_are_segmented_once_and_only_where_they_are_asked_for(phantoms, random_weights, tmp_path, monkeypatch):
    asked = []

    def segmenter(net, pictures, size):
        if len(asked) == 1 and len(pictures) < 32:
            raise KeyboardInterrupt
        asked.append(len(pictures))
        return [Lungs.from_probability((to_unit_range(resize(p, size)) > 0.5).astype(np.float32)) for p in pictures]

    monkeypatch.setattr(data, "predict_lungs", segmenter)
    index = pd.concat([pd.read_csv(phantoms / "index.csv", dtype=str)] * 2)
    index[["image", "mask"]] = index[["image", "mask"]].map(lambda name: str(phantoms / name))
    index.to_csv(tmp_path / "index.csv", index=False)
    pictures = Pictures(tmp_path, 96, tmp_path)
    rows = np.arange(2, 52)
    with pytest.raises(KeyboardInterrupt):
        predicted_lungs(pictures, random_weights, rows)
    assert asked == [32]
    asked.clear()
    lungs = predicted_lungs(pictures, random_weights, rows)
    assert asked == [18], "what was segmented before the interruption is kept"
    predicted_lungs(pictures, random_weights, rows[::3])
    assert asked == [18]

    assert lungs.shape == pictures.images.shape and not lungs[[0, 1, 52]].any()
    size = read_manifest(random_weights)["resunet"]["preprocessing"]["size"]
    other = pictures.resized(size)
    for row in rows[::7]:
        expected = Lungs.from_probability((to_unit_range(other.images[row] / 255) > 0.5).astype(np.float32))
        assert (lungs[row] == expected.at(96)).all(), "the mask that the pipeline would make"


def test_padding_fades_the_map_and_the_training_says_so(phantoms, random_weights, run, tmp_path, monkeypatch, capsys):
    nets = {name: create_classifier(name) for name in ("vgg16", "vgg16_ma", "inception_v3_ma")}
    assert last_map(nets["vgg16"], 64) is None
    line = np.ones(32)  # an average over a square is one over rows and one over columns
    for convolutions in (2, 2, 3, 3, 3):
        for _ in range(convolutions):
            line = np.convolve(np.pad(line, 1), np.full(3, 1 / 3), "valid")
        line = line.reshape(-1, 2).mean(1)
    assert last_map(nets["vgg16_ma"], 32) == pytest.approx(line.max() ** 2, rel=1e-4)
    assert last_map(nets["inception_v3_ma"], 80) < 1e-9 < 0.4 < last_map(nets["inception_v3_ma"], 299)

    common = ["--data", phantoms, "--weights", random_weights, "--cache", tmp_path / "cache", *SMALL, "--epochs", 1]
    for limit in (0, 1):
        monkeypatch.setattr(classify, "FADED", limit)
        run(classify, *common, "--model", "efficientnet_lite0_ma", "--out", tmp_path / str(limit))
        assert ("Use a larger --size" in capsys.readouterr().out) == bool(limit)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet34", "resnet50", "vgg16", "inception_v3"])
def test_cbam_put_into_a_trained_network_starts_as_the_identity(name):
    plain, cbam = create_classifier(name).eval(), create_classifier(f"{name}_cbam").eval()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    untouched = engine.start_from(cbam, plain.state_dict())
    assert untouched and all("cbam." in key for key in untouched)
    image = torch.randn(2, 1, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(cbam(image), plain(image), rtol=1e-4, atol=1e-4)

    trained = {key: torch.randn_like(tensor) for key, tensor in cbam.state_dict().items() if tensor.is_floating_point()}
    engine.start_from(cbam, trained)  # CBAM's own weights are kept
    assert all(torch.equal(cbam.state_dict()[key], tensor) for key, tensor in trained.items())


def test_items_depend_on_seed_epoch_and_item_alone(phantoms, tmp_path):
    pictures = Pictures(phantoms, 64, tmp_path)
    rows = pictures.rows("train", labelled=True)
    a, b = (LungPictures("classify", pictures, rows, pictures.masks, augmentation(30, True), seed=3) for _ in range(2))
    a[0], a[5]
    for dataset in (a, b):
        dataset.epoch = 2
    assert torch.equal(a[4][0], b[4][0])
    b.epoch = 3
    assert not torch.equal(a[4][0], b[4][0])


@pytest.mark.parametrize("kind, moved", [("paper", 3), ("robust", 3), ("style", 4), ("masks", 5)])
def test_augmentation_keeps_mask_and_image_together_and_the_outside_black(phantoms, tmp_path, kind, moved):
    pictures = Pictures(phantoms, 64, tmp_path)
    rows = pictures.rows("train", labelled=True)
    dataset = LungPictures("classify", pictures, rows, pictures.masks, augmentation(30, True, kind), seed=0)
    changed = 0
    for epoch in range(5):
        dataset.epoch = epoch
        for item in range(len(rows)):
            image, mask, target = dataset[item]
            assert image.shape == mask.shape == (1, 64, 64) and image.dtype == mask.dtype == torch.float32
            assert image.min() == -1 and image.max() == pytest.approx(1, abs=1e-5)
            assert set(mask.unique().tolist()) == {0.0, 1.0} and (image[mask == 0] == -1).all()
            assert target.tolist() == [float(name == pictures.index.label[rows[item]]) for name in CLASSES]
            changed += not np.array_equal(mask[0].numpy() > 0, pictures.masks[rows[item]])
    share = changed / (5 * len(rows))
    assert share == pytest.approx(1 - 0.5**moved, abs=0.09) and share < 1  # each step moves half of the masks


def test_augmentation_ranges_are_the_papers():
    """Each step has p = 0.5 and its own range."""
    steps = {type(s).__name__ + str(i): s for i, s in enumerate(augmentation(10, True).transforms)}
    shift, scale, rotate, brightness = steps.values()
    assert all(s.p == 0.5 for s in steps.values())
    assert shift.translate_percent["x"] == (-0.0625, 0.0625) == shift.translate_percent["y"]
    assert scale.scale["x"] == (0.8, 1.2) and scale.keep_ratio, "one scale for both axes"
    assert rotate.rotate == (-10, 10)
    assert brightness.brightness_limit == brightness.contrast_limit == (-0.2, 0.2)
    assert len(augmentation(10, False).transforms) == 3


def test_robust_augmentation_changes_tone_and_grain_but_no_mask(phantoms, tmp_path):
    """Every added step changes the picture alone, and none of them so much that it can no longer be recognised."""
    pictures = Pictures(phantoms, 64, tmp_path)
    added = augmentation(30, True, "robust").transforms[len(augmentation(30, True).transforms) :]
    assert len(added) == 6
    image, mask = np.array(pictures.images[0]), np.array(pictures.masks[0], np.uint8)
    for step in added:
        step.p = 1
        for seed in range(5):
            step.set_random_seed(seed)
            out = step(image=image, mask=mask)
            assert np.array_equal(out["mask"], mask) and out["image"].dtype == np.uint8
            assert np.corrcoef(out["image"].ravel(), image.ravel())[0, 1] > 0.75, step
            assert not np.array_equal(out["image"], image), step


def test_style_augmentation_takes_its_tones_from_another_source(phantoms, tmp_path):
    """A picture is lent the grey levels of another source's; every source lends alike, however small it is."""
    pictures = Pictures(phantoms, 64, tmp_path)
    rows = pictures.rows("train", labelled=True)
    pictures.index["source"] = ["one"] + ["many"] * (len(pictures.index) - 1)
    dark, bright = np.full((64, 64), 10, np.uint8), np.full((64, 64), 200, np.uint8)
    pictures.images = np.stack([bright] + [dark] * (len(pictures.index) - 1))
    matching = augmentation(30, True, "style").transforms[0]
    matching.p, matching.blend_ratio = 1, (1, 1)
    lent = []

    class Only:
        """The first step alone, which tells what it made."""

        transforms = [matching]

        def __call__(self, **given):
            out = matching(**given)
            lent.append(out["image"].mean())
            return out

    dataset = LungPictures("classify", pictures, rows, pictures.masks, Only())
    for epoch in range(20):
        dataset.epoch = epoch
        [dataset[item] for item in range(len(rows))]
    assert set(lent) == {10, 200} and np.mean(np.array(lent) == 200) == pytest.approx(0.5, abs=0.12)


def test_flips_and_turns_alone_move_the_whole_picture():
    turn, flip = augmentation(30, True, "flip").transforms
    assert turn.rotate == (-15, 15) and turn.p == 1 and flip.p == 0.5
    flip.p, picture = 1, np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert np.array_equal(flip(image=picture)["image"], picture[:, ::-1])


def test_a_recipe_may_keep_to_some_sources(phantoms, random_weights, tmp_path):
    run = Run(str(phantoms), cache=str(tmp_path), weights=str(random_weights))
    recipe = replace(RECIPES["classify"]["alexnet"], size=64, task="manet", sources="kermany")
    dataset = lung_pictures(recipe, run, "train", task=MANET)
    assert set(dataset.pictures.index.iloc[dataset.rows].source) == {"kermany"} and len(dataset) == 6
    assert not dataset.lungs.any(), "AlexNet needs no mask"
    assert lung_pictures(replace(recipe, model="resnet34_ma"), run, "train", task=MANET).lungs[dataset.rows].any()
    with pytest.raises(SystemExit, match="no X-ray from mars; there are: kermany, shenzhen"):
        lung_pictures(replace(recipe, sources="kermany,mars"), run, "train", task=MANET)


def test_other_masks_fill_hollows_or_move_the_rim_and_leave_the_picture(rng):
    """A hollow lung becomes whole in about half of the draws; areas grow and shrink, both lungs stay apart."""
    mask, image = np.zeros((64, 64), np.uint8), rng.integers(0, 255, (64, 64), np.uint8)
    mask[10:50, 8:26], mask[10:50, 38:56] = 1, 1
    mask[35:50, 14:20] = 0  # a diaphragm that the annotator left out
    step = augmentation(30, True, "masks").transforms[0]
    step.p, filled, areas = 1, 0, []
    for seed in range(200):
        step.set_random_seed(seed)
        out = step(image=image, mask=mask)
        assert np.array_equal(out["image"], image) and set(np.unique(out["mask"])) == {0, 1}
        assert not out["mask"][:, 31:33].any(), "the lungs were joined"
        filled += out["mask"][44, 17]
        areas.append(out["mask"].sum() / mask.sum())
    assert filled / 200 == pytest.approx(0.5, abs=0.1) and min(areas) < 0.8 and max(areas) > 1.3


def test_balance_draws_sources_and_classes_alike():
    labels = pd.Series(["sick"] * 10 + ["well"] * 5)
    sources = pd.Series(["a"] * 8 + ["b"] * 2 + ["a"] * 5)
    assert draw_weights(labels, sources, 0) is None
    weights = draw_weights(labels, sources, 1)
    assert weights[:8].sum() == pytest.approx(1) == pytest.approx(float(weights[8:10].sum()))
    assert draw_weights(labels, sources, 0.5)[0] == pytest.approx(8**-0.5)
    weights = draw_weights(labels, sources, 1, balance_classes=True)
    assert weights[:10].sum() == pytest.approx(1) == pytest.approx(float(weights[10:].sum()))
    assert weights[:8].sum() == pytest.approx(float(weights[8:10].sum()))
    assert draw_weights(labels, sources, 0, balance_classes=True)[[0, 10]].tolist() == pytest.approx([0.1, 0.2])


def test_the_papers_recipe_departs_from_nothing_and_others_say_where():
    assert PAPER["classify"].departures() == {} == PAPER["segment"].departures()
    assert (PAPER["classify"].size, PAPER["classify"].epochs, PAPER["classify"].batch) == (512, 200, 64)
    assert (PAPER["segment"].size, PAPER["segment"].epochs, PAPER["segment"].lr) == (512, 50, 2e-4)
    changed = replace(PAPER["classify"], size=224, model="resnet50", seed=2)
    assert changed.departures() == {"size": {"paper": 512, "here": 224}}
    assert changed.shared() == replace(changed, model="resnet34", seed=0, init="x").shared()
    assert changed.shared() != replace(changed, lr=0.1).shared()
    alexnet = RECIPES["classify"]["alexnet"]
    assert alexnet.departures() == {} and (alexnet.size, alexnet.lr, alexnet.batch) == (299, 1e-4, 64)
    assert replace(alexnet, epochs=4, seed=1).departures() == {"epochs": {"paper": 60, "here": 4}}


def test_settings_of_an_older_training_give_its_recipe(weights):
    """What a recipe did not name when the shipped networks were trained has the value that it then had."""
    entry = read_manifest(weights / "paper-composition.json")["resnet34_ma"]
    recipe = Recipe.of(entry["training"]["settings"] | {"task": "classify"})
    assert (recipe.model, recipe.size, recipe.task, recipe.crop) == ("resnet34_ma", 224, "manet", None)
    assert recipe.departures().keys() == entry["training"]["departures_from_paper"].keys()


def test_every_setting_is_an_option_of_the_command_line():
    parser = classify.options("")
    args = parser.parse_args("--out x --recipe broad --crop 0.1 --no-balance-classes --init y --seed 3".split())
    recipe = classify.recipe_from(args, "classify")
    changes = dict(crop=0.1, balance_classes=False, init="y", seed=3)
    assert recipe == replace(RECIPES["classify"]["broad"], **changes)


def test_a_partial_label_teaches_the_sum(rng):
    """−log(p(a) + p(b)), and cross entropy where the label is whole; smoothing spreads its share."""
    logits = torch.from_numpy(rng.normal(size=(3, 5))).float()
    labels = ["Pneumonia (unspecified)", "Tuberculosis", "Viral pneumonia"]
    target = torch.from_numpy(np.stack([MANET.target(label) for label in labels]))
    p = logits.double().softmax(1).numpy()
    whole = -np.log([p[0, 3] + p[0, 4], p[1, 2], p[2, 4]])
    assert classify.class_loss(logits, target, MANET).item() == pytest.approx(whole.mean(), rel=1e-5)
    smooth = (0.9 * whole - 0.1 * np.log(p).mean(1)).mean()
    assert classify.class_loss(logits, target, MANET, 0.1).item() == pytest.approx(smooth, rel=1e-5)


def test_unknown_findings_teach_nothing(rng):
    logits = torch.from_numpy(rng.normal(size=(2, 14))).float()
    target = torch.from_numpy(np.stack([NIH14.target("Effusion|Mass"), NIH14.target("")]))
    p = 1 / (1 + np.exp(-logits[0].double().numpy()))
    present = np.isin(NIH14.classes, ["Effusion", "Mass"])
    expected = -np.log(np.where(present, p, 1 - p)).mean()
    assert classify.class_loss(logits, target, NIH14).item() == pytest.approx(expected, rel=1e-5)


def test_group_sensitivity_leaves_out_groups_that_say_nothing():
    groups = np.array(["a"] * 20 + ["b"] * 10 + ["c"] * 2)
    right = np.array([True] * 10 + [False] * 10 + [True] * 10 + [False] * 2)
    assert classify.group_sensitivity(right, groups) == pytest.approx(0.75)
    assert classify.group_sensitivity(right[-2:], groups[-2:]) == 0, "all are small: all count"


def test_a_view_cuts_out_the_lungs(rng):
    mask = np.zeros((40, 50), bool)
    mask[10:30, 5:25] = True
    assert lung_box(mask, 0.1) == pytest.approx((8 / 40, 3 / 50, 32 / 40, 27 / 50))
    assert lung_box(mask, 1.0) == pytest.approx((0, 0, 1, 45 / 50)), "never beyond the picture"
    assert lung_box(np.zeros((4, 4), bool), 0.1) == (0, 0, 1, 1)
    picture = rng.random((40, 50)).astype(np.float32)
    assert np.array_equal(crop(picture, lung_box(mask, 0.1), 24), picture[8:32, 3:27])
    view = View(20, 50, 0.0)
    square = np.pad(mask, ((0, 10), (0, 0)))
    box = view.box(square)
    assert np.array_equal(view.cut(np.pad(picture, ((0, 10), (0, 0))), box), picture[10:30, 5:25])
    whole = View.of({"size": 50})
    assert whole.cut(picture, whole.box(mask)) is picture and whole.box(mask) == (0, 0, 1, 1)


def broad_batch(phantoms, cache, n=16, size=64):
    pictures = Pictures(phantoms, 96, cache)
    images, masks = pictures.images[:n], pictures.masks[:n]
    boxes = np.array([lung_box(mask, 0.05) for mask in masks], np.float32)
    raw = RawPictures(images, masks[:, None], boxes, np.zeros((n, 5), np.float32))
    image, mask, box, _ = raw.__getitems__(list(range(n)))
    return image.float() / 255, mask.float(), box


def test_the_broad_augmentation_keeps_mask_and_image_together(phantoms, tmp_path):
    """Shown as its own image, a mask comes out as the mask: both are moved alike, and ranges hold."""
    image, mask, box = broad_batch(phantoms, tmp_path)
    for seed in range(3):
        out, moved = broad.broad(image, mask, box, 64, torch.Generator().manual_seed(seed), other_masks=False)
        assert out.shape == moved.shape == (16, 1, 64, 64) and set(moved.unique().tolist()) == {0, 1}
        assert out.min() >= 0 and out.max() <= 1 and moved.mean((1, 2, 3)).min() > 0.1
        again, _ = broad.broad(image, mask, box, 64, torch.Generator().manual_seed(seed), other_masks=False)
        assert torch.equal(out, again), "a seed decides every draw"
        both, _ = broad.broad(mask, mask, box, 64, torch.Generator().manual_seed(seed), other_masks=False)
        inside = torch.stack([b[m > 0].mean() - b[m == 0].mean() for b, m in zip(both, moved)])
        assert (inside > 0.2).all(), "the drawn tone changes contrast, not place"
        shown = broad.shown(out, moved, "lungs")
        assert (shown[moved == 0] == -1).all() and shown.max() == 1


def test_the_broad_augmentation_without_its_draws_is_the_view(phantoms, tmp_path, monkeypatch):
    """With every draw in its middle, a batch is what the validation set shows: the lungs' box, resized."""

    class Middle(broad._Draw):
        def __call__(self, low=0.0, high=1.0):
            return torch.full((self.batch, 1, 1, 1), (low + high) / 2 if low != 0.0 else 0.99)

        def often(self, p):
            return torch.zeros(self.batch, 1, 1, 1)

    monkeypatch.setattr(broad, "_Draw", Middle)
    image, mask, box = broad_batch(phantoms, tmp_path)
    out, moved = broad.broad(image, mask, box, 64, torch.Generator())
    for k in range(16):
        side = np.rint(box[k].numpy() * 96)
        assert np.abs(crop(image[k, 0].numpy(), box[k].tolist(), 64) - out[k, 0].numpy()).mean() < 0.02, side
        expected = crop(mask[k, 0].numpy(), box[k].tolist(), 64) > 0.5
        assert (expected != (moved[k, 0].numpy() > 0)).mean() < 0.03


@pytest.mark.parametrize("quality", [20, 50, 75, 95])
def test_what_jpeg_loses_is_what_libjpeg_loses(quality):
    """To the rounding of its whole numbers; a picture whose sides are no multiple of eight."""
    y, x = np.mgrid[:203, :181] / 200
    grain = np.random.default_rng(0).normal(0, 0.1, x.shape)
    pixels = np.rint(255 * (0.5 + 0.3 * np.sin(20 * x * y) + grain).clip(0, 1)).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=quality)
    theirs = np.asarray(Image.open(file)) / 255
    image = torch.from_numpy(pixels.astype(np.float32) / 255)[None, None]
    ours = broad.jpeg(image, torch.tensor([float(quality)]))[0, 0].numpy()
    assert ours.shape == theirs.shape and ours.min() >= 0 and ours.max() <= 1
    lost = np.abs(theirs - pixels / 255).mean()
    assert np.abs(ours - theirs).mean() < 0.003 < lost


@pytest.mark.parametrize("sees", ["lungs", "whole", "outside", "shape"])
def test_what_a_batch_is_shown_is_what_the_pipeline_shows(phantoms, tmp_path, sees):
    image, mask, _ = broad_batch(phantoms, tmp_path, 3)
    shown = broad.shown(image, mask, sees)
    for k in range(3):
        expected = network_input(image[k, 0].numpy(), mask[k, 0].numpy(), sees, np.random.default_rng(0))
        np.testing.assert_allclose(shown[k, 0].numpy(), expected, atol=1e-5)


def test_loaders_reopen_their_arrays_by_path(phantoms, random_weights, tmp_path):
    """A data set that travels to another process carries names, not pixels."""
    pictures = Pictures(phantoms, 96, tmp_path)
    rows = pictures.rows("train", labelled=True)
    dataset = LungPictures("classify", pictures, rows, predicted_lungs(pictures, random_weights, rows))
    data_of = pickle.dumps(dataset)
    assert len(data_of) < pictures.images.nbytes / 4
    again = pickle.loads(data_of)
    assert isinstance(again.pictures.images, np.memmap) and all(map(torch.equal, again[3][:2], dataset[3][:2]))


def test_a_changed_picture_is_decoded_again(phantoms, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(phantoms, root)
    before = Pictures(root, 64, tmp_path / "cache")
    shutil.copy(root / "1.png", root / "0.png")
    after = Pictures(root, 64, tmp_path / "cache")
    assert after.stem != before.stem and np.array_equal(after.images[0], before.images[1])


def test_broad_trainings_run_and_are_exported(phantoms, run, tmp_path):
    """A segmenter of two conventions, then a network that is shown the lungs' box: trained, shipped, asked."""
    index = pd.read_csv(phantoms / "index.csv", dtype=str, keep_default_na=False)
    index[["image", "mask"]] = index[["image", "mask"]].map(lambda name: str(phantoms / name))
    index["mask_origin"] = ["NLM manual" if i % 2 else "v7:filename" for i in range(len(index))]
    index["findings"] = ["Effusion" if i % 3 else "No Finding" for i in range(len(index))]
    index.loc[1, "label"] = "Pneumonia (unspecified)"
    root, weights = tmp_path / "data", tmp_path / "weights"
    root.mkdir()
    index.to_csv(root / "index.csv", index=False)
    common = ["--data", root, "--cache", tmp_path / "cache", *SMALL, "--recipe", "broad", "--epochs", 1]
    run(segment, *common, "--width", 4, "--out", tmp_path / "seg")
    run(export, "--run", tmp_path / "seg", "--weights", weights)
    common += ["--working", 80, "--weights", weights, "--model", "efficientnet_lite0"]
    run(classify, *common, "--task", "nih14", "--select", "auroc", "--out", tmp_path / "nih")
    start = tmp_path / "nih" / "best.safetensors"
    run(classify, *common, "--init", start, "--out", tmp_path / "broad")
    run(export, "--run", tmp_path / "broad", "--weights", weights)
    entries = read_manifest(weights)
    assert entries["resunet"]["network"]["conventions"] == 2
    entry = entries["efficientnet_lite0"]
    assert (
        entry["task"] == "manet" and entry["preprocessing"]["crop"] == 0.05 and entry["preprocessing"]["working"] == 80
    )
    assert entry["training"]["departures_from_paper"]["augment"] == {"paper": "paper", "here": "broad"}
    assert sum(entry["training"]["pictures"].values()) == 16, "the partial label counts"
    assert json.loads((tmp_path / "nih" / "result.json").read_text())["validation"]["auroc"] >= 0
    assert "before" not in entry["training"]
    result = json.loads((tmp_path / "broad" / "result.json").read_text())
    result["settings"]["init"] = str(weights / entry["file"])
    (tmp_path / "broad" / "result.json").write_text(json.dumps(result))
    run(export, "--run", tmp_path / "broad", "--weights", weights)
    assert read_manifest(weights)["efficientnet_lite0"]["training"]["before"] == entry["training"]
    shipped = (weights / entry["file"]).read_bytes()
    with pytest.raises(SystemExit, match="efficientnet_lite0.safetensors belongs to .*manifest.json: choose another"):
        run(export, "--run", tmp_path / "broad", "--weights", weights / "other.json", "--tag", "")
    assert (weights / entry["file"]).read_bytes() == shipped and not (weights / "other.json").exists()


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc"
)
def test_memory_that_a_step_frees_is_there_for_the_next():
    """Counted in a process of its own: how many pages the kernel has to clear for blocks of 64 MiB that come and go."""
    count = """
import resource, torch
from train.engine import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def cleared():
    before = faults()
    for _ in range(5):
        torch.zeros(64, 2**18)
    return faults() - before
as_usual = cleared()
keep_freed_memory(torch.device("cpu"))
print(as_usual, min(cleared() for _ in range(4)))
"""
    told = subprocess.run([sys.executable, "-c", count], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    as_usual, kept = map(int, told.split())
    assert as_usual > 1000 and kept < as_usual / 10


def test_each_process_of_a_training_draws_another_augmentation(monkeypatch):
    def drawn(epoch: int, process: str | None, seed: int = 0) -> float:
        monkeypatch.delenv("RANK", raising=False)
        if process is not None:
            monkeypatch.setenv("RANK", process)
        draws = broad.Draws(seed, torch.device("cpu"))
        torch.rand((), generator=draws.of(epoch - 1))
        return torch.rand((), generator=draws.of(epoch)).item()

    alone = torch.Generator().manual_seed(100_003 * 2 + 3)
    assert drawn(3, None, seed=2) == drawn(3, "0", seed=2) == torch.rand((), generator=alone).item()
    assert len({drawn(epoch, process) for epoch in (0, 1) for process in "012"}) == 6


def test_a_segmenter_refuses_what_it_does_not_do(phantoms, tmp_path):
    run = Run(str(phantoms), str(tmp_path / "out"), str(tmp_path), device="cpu")
    with pytest.raises(SystemExit, match="not augmented by 'masks': choose paper, robust, style or broad"):
        segment.train(replace(PAPER["segment"], size=32, augment="masks"), run)


@pytest.mark.parametrize("augment", ["paper", "robust"])
def test_a_segmenter_is_augmented_as_its_recipe_says(phantoms, tmp_path, monkeypatch, augment):
    seen = []
    monkeypatch.setattr(segment, "fit", lambda recipe, run, net, train_set, *others: seen.append(train_set))
    run = Run(str(phantoms), str(tmp_path / "out"), str(tmp_path), device="cpu")
    segment.train(replace(PAPER["segment"], size=32, augment=augment), run)
    steps = [type(step).__name__ for step in seen[0].augment.transforms]
    assert ("GaussNoise" in steps) == (augment == "robust")


@pytest.mark.parametrize(
    "kernel, stride, channels, kept", [(5, 1, 1, True), (3, 2, 1, True), (3, 1, 1, False), (5, 1, 8, False)]
)
def test_depthwise_convolutions_that_bf16_slows_down_train_in_float32(kernel, stride, channels, kept):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 8, kernel, stride, kernel // 2, groups=8 // channels)
    image = torch.randn(2, 8, 9, 9)
    exact = layer(image).bfloat16()
    with engine.training_precision(True, torch.device("cpu")):
        found = layer(image)
    with torch.autocast("cpu", torch.bfloat16):
        usual = layer(image)
    assert found.dtype == torch.bfloat16 and not torch.equal(exact, usual)
    assert torch.equal(found, exact if kept else usual)
    with engine.training_precision(False, torch.device("cpu")):
        assert layer(image).dtype == torch.float32


def test_patients_do_not_cross_splits(index):
    splits = index.groupby("patient").split.nunique()
    assert (splits == 1).all()


def test_the_split_by_image_is_8_1_1_of_each_class_and_touches_nothing_else(index):
    drawn = split_by_image(index)
    assert drawn.drop(columns="split").equals(index.drop(columns="split"))
    assert drawn.split.equals(split_by_image(index).split)
    ours = index.split.isin(["train", "val", "test"]) & index.label.isin(CLASSES)
    assert drawn.split[~ours].equals(index.split[~ours])
    for _, splits in drawn[ours].groupby("label").split:
        shares = splits.value_counts(normalize=True)
        assert abs(shares["train"] - 0.8) < 0.01 and abs(shares["test"] - 0.1) < 0.01
    assert (drawn[ours].groupby("patient").split.nunique() > 1).any(), "which is what is wrong with it"


def test_missing_index_is_explained(tmp_path):
    with pytest.raises(SystemExit, match="train.prepare"):
        read_index(tmp_path)


# --- figures against independent arithmetic --------------------------------------------------------------------------


def test_dice_loss_and_iou_by_hand():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1  # 8 pixels
    logits = torch.full((1, 1, 4, 4), -100.0)
    logits[..., :1, :] = 100  # 4 of them found
    assert dice_loss(logits, mask).item() == pytest.approx(1 - (2 * 4 + 1) / (4 + 8 + 1))
    found, truth = logits[:, 0].numpy() > 0, mask[:, 0].numpy() > 0
    assert intersection_over_union(found, truth) == [0.5]
    assert intersection_over_union(np.zeros((1, 2, 2), bool), np.zeros((1, 2, 2), bool)) == [1.0]


def test_epoch_sampler_is_a_permutation_or_follows_its_weights():
    sampler = engine.EpochSampler(100, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(100)) and first == list(sampler)
    sampler.epoch = 1
    assert list(sampler) != first
    weighted = engine.EpochSampler(10_000, 0, torch.tensor([1.0] * 5_000 + [3.0] * 5_000))
    assert np.mean(np.array(list(weighted)) >= 5_000) == pytest.approx(0.75, abs=0.02)
    assert len(list(DataLoader(range(100), 7, sampler=sampler, drop_last=True))) == 14
    numbered = list(engine.EpochSampler(10_000, 0, weighted.weights, numbered=True))
    assert [number % 10_000 for number in numbered] == list(weighted)
    assert len(set(numbered)) == 10_000, "each time that a row is drawn has a number of its own"


def test_a_picture_drawn_twice_in_an_epoch_is_augmented_twice(phantoms, random_weights, tmp_path):
    pictures = Pictures(phantoms, 64, tmp_path)
    rows = pictures.rows("train", labelled=True)
    lungs = predicted_lungs(pictures, random_weights, rows)
    plain = LungPictures("classify", pictures, rows, lungs)
    n = len(plain)
    assert len(list(plain)) == n == len(rows)
    assert all(map(torch.equal, plain[2][:2], plain[2 + n][:2])) and np.array_equal(plain[2][2], plain[2 + n][2])
    turned = LungPictures("classify", pictures, rows, lungs, augmentation(30, True, "paper"))
    assert not torch.equal(turned[2][0], turned[2 + n][0]) and torch.equal(turned[2 + n][0], turned[2 + n][0])
