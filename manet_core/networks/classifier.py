"""What every classifier of this package has in common, whatever its backbone."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .attention import CBAM, AttentionMap, NoMap


class Classifier(nn.Module):
    """Mixin: logits = head(features), with the lung mask as an optional second input.

    A backbone supplies `walk`, `forward_head` and `last_block`, and sets `attention`
    to one of the registry's `ATTENTIONS`. Plain and CBAM networks accept a mask and
    ignore it, so that all have one signature.
    """

    attention: str = ""

    @property
    def last_block(self) -> nn.Module:
        """The module whose output `forward_features` returns: where Grad-CAM and its relatives look."""
        raise TypeError(f"{type(self).__name__} does not define last_block.")

    @property
    def finer_block(self) -> nn.Module:
        """The last module whose output has twice the resolution of `last_block`'s, for finer heatmaps."""
        raise TypeError(f"{type(self).__name__} does not define finer_block.")

    def walk(self, x: Tensor | None, m: AttentionMap | NoMap) -> tuple[Tensor | None, AttentionMap | NoMap]:
        """Lead an image and the mask's map through all layers up to the last features.

        Each layer that pools or convolves pools the map (`m.pool`); where the equation multiplies, the map beside the
        features does (`m.attend`). Both features and pyramid come from this one walk.

        Args:
            x: image (B, C, H, W) float in [-1, 1]; None: the map walks alone, which costs no convolution.
            m: the map of the mask (B, 1, H, W).

        Returns:
            Features (B, C', h, w) of the last block, None without an image; and the map beside them.
        """
        raise TypeError(f"{type(self).__name__} does not define walk.")

    def attention_maps(self, mask: Tensor) -> list[Tensor]:
        """The mask pyramid, in order of depth: (B, 1, h, w) each, in [0, 1], of the mask's dtype.

        Args:
            mask: (B, 1, H, W) float in [0, 1], of the image's size.

        Returns:
            One map for each layer that pools the mask; [] without mask attention.
        """
        if self.attention not in ("ma", "nma"):
            return []
        return self.walk(None, AttentionMap(mask, self.attention == "nma"))[1].pyramid()

    def forward_features(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of the last block, (B, C, h, w), of an image (B, 1, H, W) in [-1, 1].

        Raises:
            ValueError: a network with mask attention got no mask, or one of another height or width.
        """
        if self.attention not in ("ma", "nma"):
            return self.walk(image, NoMap())[0]
        if mask is None:
            raise ValueError("Mask attention needs the lung mask: call net(image, mask).")
        return self.walk(image, AttentionMap(mask, self.attention == "nma"))[0]

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits (B, num_classes) of the features (B, C, h, w) that `forward_features` returns."""
        raise TypeError(f"{type(self).__name__} does not define forward_head.")

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of an image (B, 1, H, W) in [-1, 1] and a mask (B, 1, H, W) in [0, 1].

        Raises:
            ValueError: as `forward_features`.
        """
        return self.forward_head(self.forward_features(image, mask))

    def cbams(self) -> Iterator[tuple[CBAM, list[nn.BatchNorm2d]]]:
        """Each CBAM, with the batch norms that make what it weighs; here the last one of its own block."""
        for block in self.modules():
            if isinstance(getattr(block, "cbam", None), CBAM):
                yield block.cbam, [layer for layer in block.children() if isinstance(layer, nn.BatchNorm2d)][-1:]

    @torch.no_grad()
    def start_cbam_as_identity(self) -> None:
        """Let every CBAM begin as the identity: for CBAM that is put into a network trained without it.

        A new CBAM's two gates are about one half each: they would weaken what they weigh to a quarter, and undo what
        was learnt. Here they become exactly one half, and the batch norms before them four times as large, which is
        exact in floating point. Call it once, after the weights without CBAM are loaded; it does nothing to a network
        that has none.
        """
        for cbam, norms in self.cbams():
            channel, spatial = cbam
            channel.mlp[-1].weight.zero_()
            spatial.conv.weight.zero_()
            for norm in norms:
                norm.weight.mul_(4)
                norm.bias.mul_(4)
