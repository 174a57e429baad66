"""Grad-CAM through the head alone against pytorch-grad-cam on the whole network."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from manet_core import create_classifier, list_models
from manet_core.explain.gradcam import grad_cam, scale_maps
from train.benchmark import BindMask


@pytest.mark.parametrize("name", list_models())
def test_equals_pytorch_grad_cam(name):
    torch.manual_seed(0)
    net = create_classifier(name).eval()
    image = torch.randn(1, 1, 96, 96)  # Inception v3 needs at least 75
    mask = (torch.rand(1, 1, 96, 96) > 0.3).float()
    with torch.inference_mode():
        features = net.forward_features(image, mask)
    logits, maps = grad_cam(net, features)
    heatmaps = scale_maps(maps, 96)
    with GradCAM(BindMask(net, mask), [net.last_block]) as cam:
        for k in range(5):
            expected = cam(image.clone().requires_grad_(), [ClassifierOutputTarget(k)])[0]
            np.testing.assert_allclose(heatmaps[k], expected, atol=1e-4)
            torch.testing.assert_close(logits, cam.outputs[0].detach(), rtol=1e-4, atol=1e-5)


def test_one_forward_pass_of_the_trunk_and_no_gradient_left_behind():
    net = create_classifier("resnet34").eval()
    calls = []
    net.conv1.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        features = net.forward_features(torch.randn(1, 1, 64, 64))
    grad_cam(net, features)
    assert len(calls) == 1
    assert all(p.grad is None for p in net.parameters())


def test_an_empty_map_stays_zero_and_others_span_the_unit_range():
    maps = torch.zeros(2, 3, 3)
    maps[1, 1, 1] = 7
    heatmaps = scale_maps(maps, 30)
    assert heatmaps.dtype == np.float32 and heatmaps.shape == (2, 30, 30)
    assert not heatmaps[0].any()
    assert heatmaps[1].min() == 0 and heatmaps[1].max() == pytest.approx(1, abs=1e-5)
