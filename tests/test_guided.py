"""Guided attention: its networks, attention mining against arithmetic and in training, and the verb on phantoms."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, make_weights
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from manet_core import create_classifier, list_models
from manet_core.explain.gradcam import grad_cam, scale_maps
from manet_core.explain.library import BindMask
from manet_core.networks.classifier import Classifier
from manet_core.networks.guided import BODIES
from manet_core.networks.registry import spec
from manet_core.tasks import GUIDED
from train import gain, guided, imagenet, stages
from train.classify import class_loss
from train.engine import start_from
from train.recipe import RECIPES, Run
from train.stages import GuidedRecipe

SIZES = {  # of the papers of the bodies
    "mobilenetv2": 224, "densenet121": 224, "efficientnet_b0": 224, "efficientnet_b1": 240, "efficientnet_b3": 300,
    "efficientnet_b5": 456, "vgg16": 224, "resnet50v2": 224, "inception_v3": 299, "inception_resnet_v2": 299,
    "efficientnet_lite0": 224,
}  # fmt: skip


def test_ten_bodies_and_one_each_at_its_size():
    assert guided.BACKBONES == tuple(SIZES) == tuple(BODIES) and len(guided.PAPERS_TEN) == 10
    for backbone, size in SIZES.items():
        name = f"{backbone}_guided"
        assert name in list_models() and spec(name)[4:] == (3, size, "whole") and spec(name).uses_mask
        with torch.device("meta"):
            net, image, found = create_classifier(name), torch.zeros(1, 1, size, size), []
            for block in (net.finer_block, net.last_block):
                block.register_forward_hook(lambda *a, found=found: found.append(a[2].shape[-1]))
            assert net(image, image).shape == (1, 3)
        assert -(-found[0] // 2) - found[1] in (0, 1), f"{backbone}: the finer block has twice the resolution"
        layers = [layer for layer in net.head if not isinstance(layer, (nn.AdaptiveAvgPool2d, nn.Flatten))]
        assert [type(layer) for layer in layers] == [nn.Linear, nn.ELU, nn.Dropout] * 2 + [nn.Linear]
        assert [layer.out_features for layer in layers[::3]] == [128, 64, 3]
        assert layers[0].in_features == net.body.num_features
        assert [layer.p for layer in layers[2::3]] == [0.10, 0.05]
        assert not [layer for layer in net.body.modules() if isinstance(layer, nn.Linear)], "no head of timm's is left"


@pytest.fixture(scope="module")
def net():
    """MobileNetV2 with guidance, in evaluation mode, of random weights that let a signal through."""
    torch.manual_seed(0)
    made = create_classifier("mobilenetv2_guided")
    with torch.no_grad():
        made.train()(torch.randn(8, 1, 64, 64))  # so that the running statistics are those of some pictures
    return made.eval().requires_grad_(False)


def test_the_mask_multiplies_the_features_where_guidance_is_on(net):
    image, mask = torch.rand(2, 1, 64, 96) * 2 - 1, (torch.rand(2, 1, 64, 96) > 0.4).float()
    whole = net.forward_features(image)
    share = mask.view(2, 1, 2, 32, 3, 32).mean((3, 5))  # of lung in the cells of a 2 × 3 grid
    torch.testing.assert_close(net.forward_features(image, mask), whole * share)
    assert torch.equal(net.forward_features(image, torch.ones_like(mask)), whole)
    assert net.attention_maps(mask) == []
    state = net.state_dict()
    assert torch.equal(state["guidance"], torch.tensor(True))
    unguided = create_classifier("mobilenetv2_guided").eval()
    unguided.load_state_dict(state | {"guidance": torch.tensor(False)})
    assert torch.equal(unguided.forward_features(image, mask), whole), "the file of weights says whether it is guided"
    with pytest.raises(ValueError, match="same height and width"):
        net(image, mask[..., :64])


def test_grad_cam_is_the_librarys(net):
    image, mask = torch.randn(1, 1, 96, 96), (torch.rand(1, 1, 96, 96) > 0.3).float()
    logits, maps = grad_cam(net, net.forward_features(image, mask))
    heatmaps = scale_maps(maps, 96)
    with GradCAM(BindMask(net, mask), [net.last_block]) as cam:
        for k in range(3):
            expected = cam(image.clone().requires_grad_(), [ClassifierOutputTarget(k)])[0]
            np.testing.assert_allclose(heatmaps[k], expected, atol=1e-4)
    assert heatmaps.max() > 0.9


@pytest.mark.parametrize("channels", [1, 3])
def test_imagenet_weights_see_the_scale_that_they_know(channels):
    """EfficientNet-Lite0's fill the whole body, and a grey X-ray looks as it does to timm in three colours."""
    net = create_classifier("efficientnet_lite0_guided", in_channels=channels).eval()
    weights = imagenet.guided_body("efficientnet_lite0", channels)
    assert start_from(net.body, weights) == []
    theirs = timm.create_model(BODIES["efficientnet_lite0"], num_classes=0, global_pool="").eval()
    theirs.load_state_dict(imagenet.guided_body("efficientnet_lite0", 3))
    film = torch.rand(1, 1, 64, 64)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        expected = theirs.forward_features((film.expand(-1, 3, -1, -1) - mean) / std)
        seen = net.forward_features((2 * film - 1).expand(-1, channels, -1, -1))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_the_tables_are_drawn_from_the_results():
    rows = json.loads((ROOT / "results" / "guided" / "results.json").read_text(encoding="utf-8"))
    assert (ROOT / "results" / "guided" / "tables.md").read_text(encoding="utf-8") == guided.markdown(rows)
    assert guided.headline(rows) in (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")


def test_without_internet_imagenet_is_a_sentence(monkeypatch):
    def offline(*args, pretrained=False, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(SystemExit, match="cannot fetch timm's vgg16.tv_in1k .* use --no-imagenet"):
        imagenet.guided_body("vgg16")


class Small(Classifier):
    """Two smooth convolutions and a linear head, for arithmetic in float64."""

    def __init__(self, channels: int = 3, classes: int = 2, norm: bool = False):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.last = nn.Sequential(nn.Softplus(), nn.Conv2d(channels, channels, 3, padding=1), nn.Softplus())
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.ELU(), nn.LazyLinear(classes))

    def forward_features(self, image, mask=None):
        features = self.last(self.norm(self.first(image)))
        return features if mask is None else features * F.adaptive_avg_pool2d(mask, features.shape[-2:])

    def forward_head(self, features):
        return self.head(features)


def small(seed: int = 0, side: int = 8, **options) -> Small:
    """A `Small` of float64 whose layers have their sizes."""
    torch.manual_seed(seed)
    net = Small(**options).double()
    net(torch.zeros(2, 1, side, side, dtype=torch.float64))
    return net


def left_of(net, image, mask, true, omega=gain.OMEGA):
    """L_attn, from a picture alone."""
    features = net.forward_features(image, mask)
    return gain.remaining(net, image, mask, features, net.forward_head(features), true, omega).mean()


def test_attention_mining_by_the_equations(rng):
    """Eq. 1 to 5, with gradients taken one class and one picture at a time, and sums in NumPy."""
    net, true = small(), torch.tensor([1, 0])
    image = torch.from_numpy(rng.uniform(-1, 1, (2, 1, 8, 8)))
    expected = []
    for picture, k in zip(image, true):
        _, maps = grad_cam(net, net.forward_features(picture[None]))
        scaled = maps[k].detach().numpy()
        scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min())
        large = F.interpolate(torch.from_numpy(scaled)[None, None], (8, 8), mode="bilinear").numpy()[0]
        erased = picture.numpy() - picture.numpy() / (1 + np.exp(-10 * (large - 0.5)))
        logits = net(torch.from_numpy(erased)[None])[0].detach().numpy()
        expected.append(np.exp(logits[k]) / np.exp(logits).sum())
    features = net.forward_features(image)
    found = gain.remaining(net, image, None, features, net.forward_head(features), true)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6)


def test_what_is_attended_to_becomes_grey_and_the_rest_stays():
    image, maps = torch.rand(1, 1, 16, 16) * 2 - 1, torch.zeros(1, 1, 4, 4)
    maps[..., :2] = 7
    left = gain.erased(image, maps, omega=200)
    assert left[..., :6].abs().max() < 1e-6 and torch.equal(left[..., 10:], image[..., 10:])
    unseen = gain.threshold(torch.zeros(1, 1, 4, 4), (16, 16))
    torch.testing.assert_close(unseen, torch.full((1, 1, 16, 16), 1 / (1 + np.exp(5.0))).float(), msg="nothing is")


def test_gradients_are_finite_differences(rng):
    """Of every weight, through the Grad-CAM and the gradients that it is made of."""
    net, true = small(), torch.tensor([1, 0])
    image, mask = (torch.from_numpy(rng.uniform(low, 1, (2, 1, 8, 8))) for low in (-1, 0))
    weights = list(net.parameters())
    found = torch.autograd.grad(left_of(net, image, mask, true), weights)
    step, checked = 1e-6, 0
    for tensor, gradient in zip(weights, found):
        for place in range(tensor.numel()):
            flat, sides = tensor.data.view(-1), []
            for sign in (1, -1):
                flat[place] += sign * step
                sides.append(left_of(net, image, mask, true).item())
                flat[place] -= sign * step
            assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(gradient.flatten()[place].item(), abs=1e-7)
            checked += 1
    assert checked > 150 and max(gradient.abs().max() for gradient in found) > 1e-3


def test_the_gradient_is_of_second_order(rng):
    """With the attention held fixed it would be another one: what teaches the attention passes through it."""
    net, true = small(), torch.tensor([1, 0])
    image = torch.from_numpy(rng.uniform(-1, 1, (2, 1, 8, 8)))
    (found,) = torch.autograd.grad(left_of(net, image, None, true), [net.first.weight])
    features = net.forward_features(image)
    maps = gain.attention(features, net.forward_head(features).gather(1, true[:, None])[:, 0]).detach()
    fixed = net(gain.erased(image, maps)).softmax(1).gather(1, true[:, None]).mean()
    (other,) = torch.autograd.grad(fixed, [net.first.weight])
    assert (found - other).abs().max() > 0.1 * other.abs().max()


def toy(seed: int, count: int = 48, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures whose class is in a bright square, on the left or on the right, in one of two rows."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 1, side, side, generator=generator, dtype=torch.float64) * 0.4 - 0.8
    true = torch.arange(count) % 2
    for i, k in enumerate(true):
        image[i, 0, 10 * (i // 2 % 2) : 10 * (i // 2 % 2) + 6, 10 * k : 10 * k + 6] = 1
    return image, true


def trained_on_toys(alpha: float) -> tuple[float, float]:
    """Accuracy and L_attn on other pictures, after a training with α."""
    net, (image, true) = small(side=16, channels=6), toy(1)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        features = net.forward_features(image)
        logits = net.forward_head(features)
        loss = F.cross_entropy(logits, true)
        if alpha:
            loss = loss + alpha * gain.remaining(net, image, None, features, logits, true).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, true = toy(2)
    return (net(image).argmax(1) == true).double().mean().item(), left_of(net, image, None, true).item()


def test_attention_mining_lowers_what_remains():
    plain, mined = trained_on_toys(0), trained_on_toys(1)
    assert plain[0] > 0.95 and mined[0] > 0.95, "both learn the class"
    assert mined[1] < plain[1] - 0.1, (plain, mined)


def test_erased_pictures_leave_no_trace_in_batch_norm(rng):
    net = small(norm=True).train()
    image = torch.from_numpy(rng.uniform(-1, 1, (4, 1, 8, 8)))
    features = net.forward_features(image)
    before = net.norm.running_mean.clone(), net.norm.running_var.clone()
    gain.remaining(net, image, None, features, net.forward_head(features), torch.tensor([0, 1, 0, 1]))
    assert torch.equal(net.norm.running_mean, before[0]) and torch.equal(net.norm.running_var, before[1])
    assert net.norm.momentum == 0.1


class Numbers(torch.utils.data.Dataset):
    """Items that say which they are."""

    epoch = 0

    def __len__(self):
        return 10

    def __getitem__(self, item):
        return self.epoch, item


def test_short_epochs_go_through_all_in_turn():
    some = stages.EachEpoch(Numbers(), 4, seed=0)
    drawn = []
    for epoch in range(5):
        some.epoch = epoch
        assert [some[i] for i in range(len(some))] == [(epoch, item) for item in some.drawn(epoch)]
        drawn.extend(some.drawn(epoch))
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    weighted = stages.EachEpoch(Numbers(), 400, seed=0, weights=torch.tensor([1.0, 3] + [0] * 8))
    assert 0.68 < np.mean(weighted.drawn(0)) < 0.82 and max(weighted.drawn(0)) == 1


LABELS = ("Normal", "Bacterial pneumonia", "COVID-19", "Viral pneumonia")


@pytest.fixture(scope="module")
def data(phantoms, tmp_path_factory):
    """The phantoms, labelled in turn, and two of them with an outlined lesion; weights of a small segmenter."""
    root = tmp_path_factory.mktemp("guided")
    index = pd.read_csv(phantoms / "index.csv", dtype=str, keep_default_na=False)
    index["image"], index["mask"] = (str(phantoms) + "/" + index[column] for column in ("image", "mask"))
    index["label"] = [LABELS[i % 4] for i in range(len(index))]
    index.to_csv(root / "index.csv", index=False)
    lesion = index[index.label == "COVID-19"].iloc[:2][["image", "label", "mask"]].rename(columns={"mask": "ggo"})
    lesion.assign(consolidation="").to_csv(root / "lesions.csv", index=False)
    (root / "weights").mkdir()
    make_weights(root / "weights", {})
    return root


def command(data, *more) -> list:
    """A short training of one small network, all three stages."""
    folders = ["--data", data, "--weights", data / "weights", "--cache", data / "cache", "--device", "cpu"]
    short = ["--size", 64, "--batch", 4, "--epochs", 2, "--steps", 2, "--chosen-on", 4, "--heatmaps", 4]
    out = ["--out", data / "out", "--results", data / "results"]
    return [*folders, *short, *out, "--backbones", "efficientnet_lite0", *more]


def test_three_stages_on_phantoms(data, run, monkeypatch):
    with pytest.raises(SystemExit, match="train stage I of efficientnet_lite0_guided first"):
        run(guided, *command(data, "--stages", "II"))
    with pytest.raises(SystemExit, match="no finished stage below .*: leave --report away"):
        run(guided, *command(data, "--report"))
    run(guided, *command(data))
    rows = json.loads((data / "results" / "results.json").read_text(encoding="utf-8"))
    assert [(row["backbone"], row["stage"]) for row in rows] == [("efficientnet_lite0", s) for s in ("I", "II", "III")]
    for row in rows:
        assert row["epochs"] == 2 and row["films"] == (16 if row["stage"] == "I" else 8)
        assert row["val"]["n"] == 6 and row["test"]["n"] == 8
        counts = {name: figure["n"] for name, figure in row["test"]["per_class"].items()}
        assert counts == {"Normal": 2, "Pneumonia": 4, "COVID-19": 2}, "bacterial and viral are one class"
        hit = sum(figure["n"] * figure["sensitivity"]["value"] for figure in row["test"]["per_class"].values())
        assert hit / 8 == pytest.approx(row["test"]["accuracy"]["value"])
        assert row["attention"]["n"] == 4 and row["lesions"]["patients"] == 2
        assert ("minus_stage_before" in row["attention"]) == (row["stage"] != "I")
    tables = (data / "results" / "tables.md").read_text(encoding="utf-8")
    assert "| VGG-16, the paper's best |  | Danilov et al., their data | 84 |" in tables and "not run here" in tables
    assert "ImageNet, seed 0; 8 X-rays × 2 epochs" in tables

    folder = data / "out" / "efficientnet_lite0" / "0"
    one, two, three = (load_file(folder / stage / "best.safetensors") for stage in stages.STAGES)
    weights = imagenet.guided_body("efficientnet_lite0")
    assert all(torch.equal(one[f"body.{name}"], tensor) for name, tensor in weights.items()), "stage I trains the head"
    assert not torch.equal(one["body.conv_stem.weight"], two["body.conv_stem.weight"])
    assert [bool(state["guidance"]) for state in (one, two, three)] == [False, False, True]
    settings = json.loads((folder / "III" / "settings.json").read_text(encoding="utf-8"))
    assert settings["alpha"] == 1 and settings["direct"] and settings["weight_decay"] == 1e-3 and settings["start"]

    def nothing(*args, **kwargs):
        raise AssertionError("all is finished, and all is measured")

    for name in ("fit", "frozen_features"):
        monkeypatch.setattr(stages, name, nothing)
    run(guided, *command(data))
    assert json.loads((data / "results" / "results.json").read_text(encoding="utf-8")) == rows
    monkeypatch.setattr(guided, "read_runs", lambda *a: [row | {"seed": 1} for row in rows[:1]])
    run(guided, *command(data, "--report"))
    again = json.loads((data / "results" / "results.json").read_text(encoding="utf-8"))
    assert [row["seed"] for row in again] == [0, 0, 0, 1], "what another machine trained stays in the tables"


def test_without_alpha_and_mask_stage_three_is_stage_two_to_the_digit(data, tmp_path):
    options = dict(size=64, batch=4, epochs=1, steps=2, chosen_on=4, model="efficientnet_lite0_guided")
    recipe = GuidedRecipe(**vars(RECIPES["classify"]["guided"]) | options)
    files = dict(data=str(data), cache=str(data / "cache"), weights=str(data / "weights"), device="cpu")
    net = stages.fresh_network(recipe)
    stages.save_weights(net, tmp_path / "start.safetensors")
    found = []
    for stage in ("II", "III"):
        asked = GuidedRecipe(**vars(recipe) | dict(stage=stage, direct=False, alpha=0.0))
        stages.train_network(asked, Run(**files, out=str(tmp_path / stage)), tmp_path / "start.safetensors")
        found.append(load_file(tmp_path / stage / "best.safetensors"))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
    start = load_file(tmp_path / "start.safetensors")
    assert not torch.equal(found[0]["body.conv_stem.weight"], start["body.conv_stem.weight"]), "something was learnt"

    batch = torch.rand(2, 1, 64, 64), torch.ones(2, 1, 64, 64), torch.eye(3)[:2]
    net.eval()
    plain, half, whole = (stages.objective(replace(recipe, alpha=a), net, *batch).item() for a in (0.0, 0.5, 1.0))
    with torch.no_grad():
        assert plain == class_loss(net(batch[0]), batch[2], GUIDED).item()
    assert half - plain == pytest.approx((whole - plain) / 2, rel=1e-4) and 0 < whole - plain < 1


def test_frozen_features_are_computed_once_and_gone_on_with(data, tmp_path):
    recipe = GuidedRecipe(
        **vars(RECIPES["classify"]["guided"]) | dict(size=64, precision="no", model="efficientnet_lite0_guided")
    )
    place = Run(str(data), cache=str(tmp_path), weights=str(data / "weights"), device="cpu")
    net, dataset = stages.fresh_network(recipe).eval(), stages.xrays(recipe, place, "val")
    found = stages.frozen_features(recipe, place, net, dataset, "val")
    with torch.inference_mode():
        expected = torch.cat([net.forward_features(image[None]).mean((2, 3)) for image, *_ in dataset])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    (path,) = tmp_path.glob("*efficientnet_lite0_guided*.npy")
    kept = np.load(path, mmap_mode="r+")
    kept[0], kept[1] = 7, np.nan  # as if a kill had come before the second
    kept.flush()
    again = stages.frozen_features(recipe, place, net, dataset, "val")
    assert (again[0] == 7).all(), "what is there is not computed again"
    np.testing.assert_allclose(again[1:], expected[1:], rtol=1e-4, atol=1e-5)
