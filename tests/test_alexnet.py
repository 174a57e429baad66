"""AlexNet with attention: the equations against slow arithmetic, its two ways to answer, its training."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from manet_core import create_classifier
from manet_core.networks.registry import spec
from manet_core.tasks import get_task
from train.classify import class_loss

LAYERS = {"alexnet_attn1": [4], "alexnet_attn2": [3, 4], "alexnet_attn3": [2, 3, 4]}


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 1, 99, 99, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", LAYERS)
def test_attention_is_jetleys(name, image):
    """s = ⟨f, g⟩, α = softmax(s), O = Σ α f, all O → 128 ReLU → 1 logit: one place after another."""
    torch.manual_seed(0)
    net = create_classifier(name).eval()
    with torch.inference_mode():
        outputs, x = {}, image
        for number in range(1, 6):
            x = getattr(net, f"conv{number}")(x)
            x = F.max_pool2d(x, 3, 2) if number < 3 else x
            outputs[number] = x
        maps, summed = net.local_attention(image), []
        assert len(maps) == len(LAYERS[name])
        for layer, alpha in zip(LAYERS[name], maps):
            f = net.project[str(layer)](outputs[layer]).double().numpy()
            g = outputs[5].double().numpy().mean((2, 3))
            batch, channels, height, width = f.shape
            expected, total = np.zeros((batch, 1, height, width)), np.zeros((batch, channels))
            for b in range(batch):
                scores = {(i, j): f[b, :, i, j] @ g[b] for i in range(height) for j in range(width)}
                most = max(scores.values())
                whole = sum(np.exp(score - most) for score in scores.values())
                for (i, j), score in scores.items():
                    expected[b, 0, i, j] = np.exp(score - most) / whole
                    total[b] += expected[b, 0, i, j] * f[b, :, i, j]
            np.testing.assert_allclose(alpha, expected, atol=1e-5)
            torch.testing.assert_close(alpha.sum((1, 2, 3)), torch.ones(2))
            summed.append(torch.from_numpy(total).float())
        hidden, _, last = net.head
        assert (hidden.out_features, last.out_features) == (128, 1)
        z = last(hidden(torch.cat(summed, 1)).relu())
        torch.testing.assert_close(net(image), z, rtol=1e-3, atol=1e-4)


def test_the_papers_network_has_57_million_parameters_bn_and_xavier():
    with torch.device("meta"):
        counted = sum(p.numel() for p in create_classifier("alexnet").parameters())
    assert round(counted / 1e6) == 57
    net = create_classifier("alexnet_attn2")
    bound = (6 / (256 * 9 + 256 * 9)) ** 0.5  # Xavier, uniform, of convolution 5
    weight = net.conv5[0].weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert isinstance(net.conv1[1], torch.nn.BatchNorm2d)
    assert spec("alexnet_attn2").size == 299 and create_classifier("alexnet_attn2")(
        torch.zeros(2, 1, 99, 99)
    ).shape == (2, 1)


def test_two_classes_are_the_same_network_and_cross_entropy_is_bce_with_logits(image):
    torch.manual_seed(0)
    one = create_classifier("alexnet_attn2").eval()
    two = create_classifier("alexnet_attn2", num_classes=2).eval()
    two.load_state_dict(one.state_dict())
    with torch.inference_mode():
        z, logits = one(image), two(image)
    torch.testing.assert_close(logits.softmax(1)[:, 1:], z.sigmoid())
    covid = get_task("covid")
    target = torch.tensor(np.stack([covid.target("Normal"), covid.target("COVID-19")]))
    expected = F.binary_cross_entropy_with_logits(z[:, 0], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(class_loss(logits, target, covid), expected)
    assert create_classifier("alexnet_attn3", num_classes=5)(image).shape == (2, 5)


def test_the_mask_is_ignored(image):
    net = create_classifier("alexnet_attn1").eval()
    with torch.inference_mode():
        assert torch.equal(net(image), net(image, torch.rand(2, 1, 99, 99)))
        assert create_classifier("alexnet").eval().local_attention(image) == []
    assert net.attention_maps(torch.ones(1, 1, 99, 99)) == []
