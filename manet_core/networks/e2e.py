"""MANet end to end: segmenter and classifier in one network, which the paper leaves for later.

Between the two stages of MANet the mask is thresholded and cleaned, so that no gradient of the diagnosis reaches the
segmenter. Here the soft mask, in [0, 1], takes both of the mask's places: it multiplies the X-ray, and it is what mask
attention pools. All steps have a gradient, so that Dice loss on the mask and cross entropy can be trained together.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from ..preprocess import unit_range
from .attention import AttentionMap, NoMap
from .classifier import Classifier
from .registry import create_classifier, create_segmenter

SIZE = 256  # side of the segmenter's square input, pixels: the shipped one's
WIDTH, CONVENTIONS = 16, 2  # of the shipped segmenter


class EndToEnd(Classifier):
    """ResUNet, and a classifier with normalised mask attention, `BACKBONE_nma`, that is given its mask.

    Normalised rather than the paper's attention, as the gradient of the mask comes through its maps: the plain maps
    fade towards the rim wherever a layer pads, and with them the gradient, whatever the mask is. Of the shipped
    networks it is the more accurate besides, and so the better start. The state dict has the names of the two stages
    behind "segmenter." and "classifier.", so that their weights load as they are.

    The segmenter works at 256×256 pixels whatever the image's size, as it was trained at that, and for its cost. The
    mask is then resized to the image.

    Args:
        backbone: of the classifier, one with normalised mask attention.
        attention: "e2e", the only one.
        num_classes: width of the logits.
        in_channels: channels of the image.
    """

    def __init__(self, backbone: str, attention: str, num_classes: int, in_channels: int):
        super().__init__()
        self.attention = attention
        self.segmenter = create_segmenter(in_channels=in_channels, width=WIDTH, conventions=CONVENTIONS)
        self.classifier = create_classifier(f"{backbone}_nma", num_classes, in_channels)

    @property
    def last_block(self) -> nn.Module:
        return self.classifier.last_block

    @property
    def finer_block(self) -> nn.Module:
        return self.classifier.finer_block

    def mask_logits(self, image: Tensor) -> Tensor:
        """Mask logits (B, 2, 256, 256) of an image (B, C, H, W) in [-1, 1], a channel for each convention.

        The first convention, which includes what lies behind heart and diaphragm, is what `predict_mask` shows.
        """
        return self.segmenter(unit_range(_resized((image + 1) / 2, (SIZE, SIZE))), every_convention=True)

    def between(self, mask: Tensor, size: tuple[int, int]) -> Tensor:
        """From the segmenter's mask (B, 1, 256, 256) in [0, 1] to the classifier's (B, 1, *size): soft as it is."""
        return _resized(mask, size)

    def predict_mask(self, image: Tensor) -> Tensor:
        """The lung mask (B, 1, H, W) float in [0, 1] of an image (B, C, H, W) in [-1, 1], as the classifier uses it."""
        return self._mask(self.mask_logits(image), image)

    def walk(self, x: Tensor | None, m: AttentionMap | NoMap) -> tuple[Tensor | None, AttentionMap | NoMap]:
        """The classifier's features of the lungs that the segmenter finds; see `Classifier.walk`.

        The mask that was given is ignored.
        """
        return (None if x is None else self._see(x, self.predict_mask(x))), m

    def forward_head(self, features: Tensor) -> Tensor:
        return self.classifier.forward_head(features)

    def forward(self, image: Tensor, mask: Tensor | None = None, every_convention: bool = False):
        """Logits (B, num_classes) of an image (B, C, H, W) in [-1, 1]; a mask is accepted and ignored.

        With `every_convention` these and, from the same pass, the `mask_logits`.
        """
        masks = self.mask_logits(image)
        logits = self.forward_head(self._see(image, self._mask(masks, image)))
        return (logits, masks) if every_convention else logits

    def _mask(self, logits: Tensor, image: Tensor) -> Tensor:
        return self.between(logits[:, :1].to(image.dtype).sigmoid(), image.shape[-2:])

    def _see(self, image: Tensor, mask: Tensor) -> Tensor:
        """Features of image × mask, min–max scaled to [−1, 1] (MANet, section 3.2), under the mask's attention."""
        lungs = 2 * unit_range((image + 1) / 2 * mask) - 1
        return self.classifier.forward_features(lungs, mask)


def _resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) at `size`: `preprocess.resize` with a gradient."""
    if pictures.shape[-2:] == size:
        return pictures
    shrinks = size[0] < pictures.shape[-2] or size[1] < pictures.shape[-1]
    return F.interpolate(pictures, size, mode="bilinear", antialias=shrinks)
