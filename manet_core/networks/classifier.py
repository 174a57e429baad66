"""What every classifier of this package has in common, whatever its backbone."""

from torch import Tensor, nn


class Classifier(nn.Module):
    """Mixin: logits = head(features), with the lung mask as an optional second input.

    A backbone supplies `forward_features`, `forward_head` and `last_block`; one
    with mask attention also supplies `attention_maps`. Plain and CBAM networks
    accept a mask and ignore it, so that all have one signature.
    """

    @property
    def last_block(self) -> nn.Module:
        """The module whose output `forward_features` returns: where Grad-CAM and its relatives look."""
        raise TypeError(f"{type(self).__name__} does not define last_block.")

    def attention_maps(self, mask: Tensor) -> list[Tensor]:
        """The mask pyramid, in order of depth: (B, 1, h, w) each, in [0, 1].

        Args:
            mask: (B, 1, H, W) float in [0, 1], of the image's size.

        Returns:
            One map for each layer that pools the mask; [] without mask attention.
        """
        return []

    def forward_features(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of the last block, (B, C, h, w), of an image (B, 1, H, W) in [-1, 1]."""
        raise TypeError(f"{type(self).__name__} does not define forward_features.")

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits (B, num_classes) of the features (B, C, h, w) that `forward_features` returns."""
        raise TypeError(f"{type(self).__name__} does not define forward_head.")

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of an image (B, 1, H, W) in [-1, 1] and a mask (B, 1, H, W) in [0, 1]."""
        return self.forward_head(self.forward_features(image, mask))


class MaskAttentionClassifier(Classifier):
    """Mixin for the `_ma` networks: no mask, no answer."""

    def pyramid(self, mask: Tensor | None):
        """An iterator over `attention_maps(mask)`, which the layers consume in order.

        Raises:
            ValueError: `mask` is None.
        """
        if mask is None:
            raise ValueError("Mask attention needs the lung mask: call net(image, mask).")
        return iter(self.attention_maps(mask))
