"""Guided attention (Danilov et al. 2021): a body pretrained for ImageNet, the paper's head, and the lung mask between.

The bodies are timm's, which is imported when a network is made. The mask
multiplies the body's output features (direct guidance); the paper does so in
its third stage only, so a network of the first two is one with the guidance
switched off. The switch is part of the state dict, so that a file of weights
says itself whether it was trained with guidance.

The second, indirect guidance is a loss and changes nothing here: see `train.gain`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import Classifier

# The paper's bodies, and EfficientNet-Lite0, by timm's names, whose tag is the origin of the ImageNet weights: Keras's,
# where timm has them, as the paper used Keras.
BODIES = {
    "mobilenetv2": "mobilenetv2_100.ra_in1k",
    "densenet121": "densenet121.tv_in1k",
    "efficientnet_b0": "tf_efficientnet_b0.aa_in1k",
    "efficientnet_b1": "tf_efficientnet_b1.aa_in1k",
    "efficientnet_b3": "tf_efficientnet_b3.aa_in1k",
    "efficientnet_b5": "tf_efficientnet_b5.aa_in1k",
    "vgg16": "vgg16.tv_in1k",
    "resnet50v2": "resnetv2_50.a1h_in1k",
    "inception_v3": "inception_v3.tf_in1k",
    "inception_resnet_v2": "inception_resnet_v2.tf_in1k",
    "efficientnet_lite0": "tf_efficientnet_lite0.in1k",
}


class Guided(Classifier):
    """A body, features × mask, and the head: GAP → 128 ELU → dropout 0.10 → 64 ELU → dropout 0.05 → classes.

    Attributes:
        guidance: () bool, a buffer of the state dict. True, as in stage III and unless it is changed: the mask,
            averaged over each cell of the features' grid, multiplies the features. False, as in stages I and II: the
            mask is ignored.
        body: timm's network without its own head.
        head: what turns features into logits.
    """

    def __init__(self, backbone: str, attention: str, num_classes: int, in_channels: int):
        super().__init__()
        import timm

        self.attention = attention
        # VGG's first dense layers, 120 M parameters, are made as small as can be: what they make is no feature here
        smaller = {"mlp_ratio": 1 / 4096} if backbone == "vgg16" else {}
        body = timm.create_model(BODIES[backbone], num_classes=0, global_pool="", in_chans=in_channels, **smaller)
        if backbone == "vgg16":
            body.pre_logits = nn.Identity()
        self.body = body
        mean, std = (torch.tensor(body.pretrained_cfg[key]) for key in ("mean", "std"))
        if in_channels != 3:  # grey is seen as the mean of red, green and blue
            mean, std = mean.mean(), std.mean()
        self.register_buffer("mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(-1, 1, 1), persistent=False)
        self.register_buffer("guidance", torch.tensor(True))
        self.seen = nn.Identity()  # hooks want the features as the head sees them
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(body.num_features, 128),
            nn.ELU(),
            nn.Dropout(0.10),
            nn.Linear(128, 64),
            nn.ELU(),
            nn.Dropout(0.05),
            nn.Linear(64, num_classes),
        )

    @property
    def last_block(self) -> nn.Module:
        return self.seen

    @property
    def finer_block(self) -> nn.Module:
        levels = {level["reduction"]: level["module"] for level in self.body.feature_info}  # the last of each
        return self.body.get_submodule(levels[16])

    def forward_features(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """The body's output features (B, C, h, w), multiplied by the mask if `guidance` is on and a mask is given.

        Args:
            image: (B, in_channels, H, W) float in [−1, 1], brought here to the scale of the body's ImageNet weights.
            mask: (B, 1, H, W) float in [0, 1]; None: as if all were lung.

        Raises:
            ValueError: the mask has another height or width than the image.
        """
        features = self.body.forward_features(((image + 1) / 2 - self.mean) / self.std)
        if mask is not None:
            if mask.shape[-2:] != image.shape[-2:]:
                raise ValueError(
                    f"The mask is {tuple(mask.shape[-2:])} and the image {tuple(image.shape[-2:])}: "
                    "give an image and a mask of the same height and width."
                )
            share = F.adaptive_avg_pool2d(mask.to(features.dtype), features.shape[-2:])
            features = features * torch.where(self.guidance, share, torch.ones_like(share))
        return self.seen(features)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features)
