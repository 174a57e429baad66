"""Networks as ONNX graphs give what PyTorch gives."""

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from torch import nn

from manet_core import create_classifier, create_segmenter
from manet_core.networks.graph import OPSET, UnknownOperation, to_onnx
from train import export


def run_onnx(model, *inputs) -> np.ndarray:
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {known.name: x.numpy() for known, x in zip(session.get_inputs(), inputs)})[0]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("efficientnet_lite0_nma", 64),
        ("efficientnet_lite0_cbam", 64),
        ("resnet34_nma", 64),
        ("resnet50_cbam", 64),
        ("inception_v3_nma", 96),
        ("alexnet_attn2", 96),
        ("resunet", 64),
    ],
)
def test_each_family_as_a_graph(name, size):
    torch.manual_seed(0)
    net = create_segmenter(width=4) if name == "resunet" else create_classifier(name)
    for layer in net.modules():  # a new network's features vanish, or explode, on the way
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            layer.momentum = 1.0
    inputs = [torch.rand(3, 1, size, size) * 2 - 1, torch.rand(3, 1, size, size)][: 1 if name == "resunet" else 2]
    with torch.no_grad():
        net.train()(*(x.clone() for x in inputs))
        net.eval()
        function = net if name == "resunet" else net.forward_features
        expected = function(*inputs).numpy()
    model = to_onnx(function, {key: (1, size, size) for key in ("image", "mask")[: len(inputs)]}, ["out"])
    onnx.checker.check_model(model)
    assert model.opset_import[0].version == OPSET and model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert np.abs(expected).max() > 0
    for rows in (slice(0, 3), slice(1, 2)):
        found = run_onnx(model, *(x[rows] for x in inputs))
        np.testing.assert_allclose(found, expected[rows], atol=1e-3 * np.abs(expected).max())


def test_what_is_not_known_is_refused():
    for function in (lambda x: x.softmax(1), lambda x: x[:, 0], lambda x: nn.functional.pad(x, (1, 1))):
        with pytest.raises(UnknownOperation):
            to_onnx(function, {"image": (1, 8, 8)}, ["out"])


def test_all_weights_become_onnx_files(random_weights, run, tmp_path, capsys):
    run(export, "--onnx", tmp_path / "onnx", "--weights", random_weights)
    assert sorted(path.stem for path in (tmp_path / "onnx").iterdir()) == [
        "efficientnet_lite0",
        "efficientnet_lite0_cbam",
        "efficientnet_lite0_ma",
        "resunet",
    ]
    assert capsys.readouterr().out.count("opset 18") == 4
    assert all(difference < 1e-4 for _, difference in export.write_onnx(random_weights, tmp_path / "again"))
