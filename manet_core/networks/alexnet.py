"""AlexNet with attention (Li, Ma, Yan 2021): plain, and with attention after one, two or three of its convolutions.

The attention is Jetley's (Learn to pay attention, ICLR 2018). With local features f_i at the places i of a layer,
projected to the width of g, and a global feature g:

    s_i = ⟨f_i, g⟩,   α = softmax(s),   O = Σ α_i f_i

where α, of sum 1, is the attention map of the layer. The O of all layers are concatenated and classified.
"""

import torch
from torch import Tensor, nn

from .classifier import Classifier

CHANNELS = (64, 192, 384, 256, 256)  # of torchvision's AlexNet ("one weird trick", Krizhevsky 2014)
LAYERS = {"": (), "attn1": (4,), "attn2": (3, 4), "attn3": (2, 3, 4)}  # convolutions whose outputs are attended to


class AlexNet(Classifier):
    """AlexNet with batch norm, Xavier-initialised; its five convolutions are `conv1` to `conv5`.

    It is shown the whole X-ray; a mask is accepted and ignored. The paper gives g as the last convolution's output:
    here its mean over all places, as ⟨f_i, g⟩ needs one vector.

    Args:
        attention: "", or "attn1", "attn2", "attn3": after convolution 4, 3 and 4, or 2, 3 and 4.
        num_classes: 1, the paper's: the logit z of the second of two classes. 2: (−z/2, z/2) of the same network,
            whose softmax is (1 − sigmoid(z), sigmoid(z)). More: as many logits.
        in_channels: channels of the image.
    """

    def __init__(self, attention: str, num_classes: int, in_channels: int):
        super().__init__()
        self.attention, self.two = attention, num_classes == 2
        outputs = 1 if self.two else num_classes
        inputs = (in_channels, *CHANNELS)
        for number, (kernel, stride, padding) in enumerate([(11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1)]):
            block = nn.Sequential(
                nn.Conv2d(inputs[number], inputs[number + 1], kernel, stride, padding, bias=False),
                nn.BatchNorm2d(inputs[number + 1]),
                nn.ReLU(inplace=True),
            )
            setattr(self, f"conv{number + 1}", block)
        self.pool = nn.MaxPool2d(3, 2)
        width = CHANNELS[-1]
        self.layers = LAYERS[attention]
        self.project = nn.ModuleDict(
            {str(layer): nn.Conv2d(CHANNELS[layer - 1], width, 1, bias=False) for layer in self.layers}
        )
        if self.layers:
            self.head = nn.Sequential(
                nn.Linear(width * len(self.layers), 128), nn.ReLU(inplace=True), nn.Linear(128, outputs)
            )
        else:
            self.head = nn.Sequential(
                self.pool, nn.AdaptiveAvgPool2d(6), nn.Flatten(),
                nn.Dropout(), nn.Linear(width * 36, 4096), nn.ReLU(inplace=True),
                nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
                nn.Linear(4096, outputs),
            )  # fmt: skip
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.joined = nn.Identity()  # what `forward_features` returns passes here, so that heatmaps can hook it

    @property
    def last_block(self) -> nn.Module:
        return self.joined

    @property
    def finer_block(self) -> nn.Module:
        return self.conv2

    def walk(self, x: Tensor | None, m):
        """Features (B, 256 (1 + L), h, w) of an image (B, C, H, W) in [-1, 1].

        First the last convolution's output, then the projected local features of each of the L attended layers, all
        on one grid: those of convolution 2 are taken behind the pooling that follows it.
        """
        if x is None:
            return None, m
        local = []
        for number in range(1, 6):
            x = getattr(self, f"conv{number}")(x)
            if number in (1, 2):
                x = self.pool(x)
            if number in self.layers:
                local.append(self.project[str(number)](x))
        return self.joined(torch.cat([x, *local], 1)), m

    def attend(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """α (B, 1, h, w), of sum 1, and O (B, 256) of each attended layer, from what `forward_features` returns."""
        last, *local = features.split(CHANNELS[-1], 1)
        g = last.mean((2, 3))
        maps, summed = [], []
        for f in local:
            alpha = torch.einsum("bchw,bc->bhw", f, g).flatten(1).softmax(1).view(-1, 1, *f.shape[-2:])
            maps.append(alpha)
            summed.append((alpha * f).sum((2, 3)))
        return maps, summed

    def local_attention(self, image: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The attention maps of an image (B, C, H, W) in [-1, 1]: (B, 1, h, w) a layer, of sum 1; [] without any."""
        return self.attend(self.forward_features(image, mask))[0]

    def forward_head(self, features: Tensor) -> Tensor:
        z = self.head(torch.cat(self.attend(features)[1], 1) if self.layers else features)
        return torch.cat([-z / 2, z / 2], 1) if self.two else z
