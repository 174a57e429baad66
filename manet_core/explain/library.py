"""The explainers of pytorch-grad-cam, which put the picture through the whole network.

They hook into the network while they run: one thread at a time may use it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from .progress import report


class BindMask(nn.Module):
    """A network of image and mask as one of the image alone."""

    def __init__(self, net: nn.Module, mask: Tensor):
        super().__init__()
        self.net, self.mask = net, mask

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 1, H, W), which share the mask (1, 1, H, W)."""
        return self.net(image, self.mask.expand(len(image), -1, -1, -1))


class AskedOnce(nn.Module):
    """A network that is shown the same pictures for every class: it need see them once.

    Args:
        model: of the image alone.
        anew: how many calls, the first ones for a class, reach the network every time all the same.

    Attributes:
        turn: calls for the present class so far; to be set to 0 before the next one.
    """

    def __init__(self, model: nn.Module, anew: int = 0):
        super().__init__()
        self.model, self.anew, self.answers, self.turn = model, anew, [], 0

    def forward(self, image: Tensor) -> Tensor:
        """What the network says of `image`, or said of it when asked for an earlier class."""
        turn, self.turn = self.turn - self.anew, self.turn + 1
        if turn < 0:
            return self.model(image)
        if turn == len(self.answers):
            self.answers.append(self.model(image))
        return self.answers[turn]


def _steps(batches: range) -> Iterator[int]:
    """Stands in for the progress bar that Score-CAM draws on standard error for every class."""
    for done, batch in enumerate(batches):
        yield batch
        report((done + 1) / len(batches))


def explain_with(method: str) -> Callable:
    """An explainer's function that uses the class `method` of pytorch_grad_cam at the last block."""
    return partial(_explain, method)


def _explain(method: str, net: nn.Module, image: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    import pytorch_grad_cam  # not before: it takes seconds, and the default does without
    from pytorch_grad_cam import score_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    score_cam.tqdm = SimpleNamespace(tqdm=_steps)

    class Raw(getattr(pytorch_grad_cam, method)):
        """Keeps the map as it is before the library scales and enlarges it."""

        def get_cam_image(self, *args, **kwargs) -> np.ndarray:
            self.raw = super().get_cam_image(*args, **kwargs)
            return self.raw

    with torch.inference_mode(False), torch.enable_grad():
        image = image.clone().requires_grad_()
        model = AskedOnce(BindMask(net, mask.clone()), anew=1)  # the picture itself, whose features the hooks must see
        cam = Raw(model, [net.last_block])
        maps, classes = [], 1
        try:
            while len(maps) < classes:
                model.turn = 0
                cam(image, [ClassifierOutputTarget(len(maps))])
                maps.append(torch.from_numpy(cam.raw[0]).relu())
                classes = cam.outputs.shape[1]
        finally:
            cam.activations_and_grads.release()
        return cam.outputs[0].detach(), torch.stack(maps)
