"""Findings learnt beside the classes: what is drawn, what is lost, what is kept."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from manet_core import create_classifier
from manet_core.tasks import MANET, NIH14
from train import classify, findings
from train.classify import class_loss
from train.data import lung_pictures
from train.recipe import Recipe, Run

SMALL = ["--size", 64, "--batch", 8, "--device", "cpu", "--workers", 0]
of_class = partial(class_loss, task=MANET, smoothing=0.05)


@pytest.fixture
def with_findings(phantoms, tmp_path):
    """A data root: the phantoms, of which 26 to 31 are there for their findings alone."""
    index = pd.read_csv(phantoms / "index.csv", dtype=str, keep_default_na=False)
    index[["image", "mask"]] = index[["image", "mask"]].map(lambda name: str(phantoms / name) if name else name)
    index["findings"] = ""
    index.loc[index.index[-6:], "source"] = "kermany"
    index.loc[index.index[-6:], ["split", "label", "findings"]] = ["pretrain", "Other finding", "Mass|Effusion"]
    index.loc[index.index[-2:], "findings"] = "No Finding"
    root = tmp_path / "data"
    root.mkdir()
    index.to_csv(root / "index.csv", index=False)
    return root


@pytest.mark.parametrize("name", ["efficientnet_lite0_cbam", "resnet34", "inception_v3_ma", "vgg16"])
def test_the_further_outputs_are_there_in_training_alone(name):
    net = create_classifier(name).eval()
    image, mask = torch.rand(2, 1, 96, 96) * 2 - 1, torch.ones(2, 1, 96, 96)
    before, names = net(image, mask), list(net.state_dict())
    findings.add_outputs(net)
    assert torch.equal(net(image, mask), before), "its own logits stay as they are"
    assert net.train()(image, mask).shape == (2, 5 + 14)
    assert list(findings.kept(net.state_dict())) == names and len(net.state_dict()) == len(names) + 2


def test_the_further_outputs_start_from_a_network_that_knows_the_findings():
    start = create_classifier("efficientnet_lite0", num_classes=14).state_dict()
    net = create_classifier("efficientnet_lite0")
    findings.add_outputs(net, start)
    assert torch.equal(net.state_dict()["classifier.further.weight"], start["classifier.weight"])
    other = create_classifier("efficientnet_lite0")
    findings.add_outputs(other, create_classifier("efficientnet_lite0").state_dict())
    assert other.state_dict()["classifier.further.weight"].shape == (14, 1280), "of five classes there is none to take"


def test_the_loss_asks_each_xray_what_is_known_of_it():
    """Four X-rays for their class, two for their findings: (4 · L_class + 2 · 4 · BCE) / 6."""
    torch.manual_seed(0)
    logits, target = torch.randn(6, 19), torch.full((6, 19), torch.nan)
    target[:4, :5] = torch.eye(5)[:4]
    target[4:] = 0
    target[4, 5 + 3] = 1
    p = logits[4:, 5:].double().sigmoid()
    y = target[4:, 5:].double()
    bce = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    own = of_class(logits[:4, :5], target[:4, :5])
    assert findings.joint_loss(logits, target, of_class).item() == pytest.approx(float(4 * own + 2 * 4 * bce) / 6)
    for some, expected in ((slice(0, 4), own), (slice(4, 6), 4 * bce)):
        assert findings.joint_loss(logits[some], target[some], of_class).item() == pytest.approx(float(expected))
    logits.requires_grad_()
    findings.joint_loss(logits, target, of_class).backward()
    assert not logits.grad[:4, 5:].any() and not logits.grad[4:, :5].any() and logits.grad.isfinite().all()


def test_findings_have_their_share_of_the_draws(with_findings, random_weights, tmp_path):
    recipe = Recipe(model="efficientnet_lite0", size=64, augment="flip", findings=0.35)
    run = Run(str(with_findings), cache=str(tmp_path / "cache"), weights=str(random_weights))
    own = lung_pictures(recipe, run, "train", task=MANET)
    joined, draw = findings.add_pictures(own, recipe, run, None)
    n = len(own)
    assert len(joined) == len(draw) == n + 6 and draw.sum().item() == pytest.approx(1)
    assert draw[:n].sum().item() == pytest.approx(0.65) and draw[:n].unique().numel() == 1
    assert (draw[n:] / draw[n]).tolist() == pytest.approx([1, 1, 1, 1, 0.3, 0.3])
    assert (
        joined[0][2].shape == (19,) and np.array_equal(joined[0][2][:5], own[0][2]) and np.isnan(joined[0][2][5:]).all()
    )
    present = [NIH14.classes[k] for k in np.flatnonzero(joined[n][2][5:])]
    assert not joined[n][2][:5].any() and present == ["Effusion", "Mass"] and not joined[n + 5][2].any()


def test_a_training_with_findings_keeps_the_classes_alone(with_findings, random_weights, run, tmp_path):
    common = ["--data", with_findings, "--cache", tmp_path / "cache", *SMALL, "--weights", random_weights]
    common += ["--recipe", "broad", "--working", 80, "--model", "efficientnet_lite0", "--findings", 0.35]
    run(classify, *common, "--epochs", 1, "--out", tmp_path / "once")
    kept = load_file(tmp_path / "once" / "best.safetensors")
    create_classifier("efficientnet_lite0").load_state_dict(kept)
    state = torch.load(tmp_path / "once" / "last.ckpt", weights_only=True)
    net = create_classifier("efficientnet_lite0")
    findings.add_outputs(net)
    net.load_state_dict(state["net"])  # what resumes has all of it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--findings", 1], "a share between 0 and 1"),
        (["--findings", 0.3, "--task", "nih14", "--select", "auroc"], "beside a task with one answer"),
        (["--findings", 0.3, "--sources", "shenzhen"], "findings in the index, and there are none"),
    ],
)
def test_findings_that_cannot_be_learnt_are_refused(options, message, with_findings, random_weights, run, tmp_path):
    common = ["--data", with_findings, "--cache", tmp_path / "cache", *SMALL, "--weights", random_weights]
    with pytest.raises(SystemExit, match=message):
        run(classify, *common, "--recipe", "broad", "--model", "efficientnet_lite0", *options, "--out", tmp_path / "r")
