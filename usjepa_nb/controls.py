"""What learns from labels, end to end: the ViT with its probe, and a small U-Net. Both are objectives (see `pretrain`).

From random weights the ViT is the control that the paper compares with; from pre-trained ones it is fine-tuning.
"""

from __future__ import annotations

from torch import Generator, Tensor, nn

from usjepa_nb.augment import augment, standardise
from usjepa_nb.probe import CLASSES, SegmentationProbe, encode, segmentation_loss
from usjepa_nb.profile import Profile
from usjepa_nb.vit import Encoder


class EndToEnd(nn.Module):
    """Cross-entropy on augmented labelled clips; a subclass says how `logits` come from a clip."""

    @property
    def features(self) -> Encoder | None:
        """The encoder, for the monitors; a U-Net has none."""
        return self._modules.get("encoder")

    def logits(self, grey: Tensor) -> Tensor:
        """Grey clips 0…255 [B, T, H, W] -> [B, classes, T, H, W]."""
        raise NotImplementedError

    def forward(self, batch: tuple[Tensor, Tensor], generator: Generator) -> dict[str, Tensor]:
        grey, masks = augment(batch[0], generator, batch[1])
        return {"loss": segmentation_loss(self.logits(grey), masks)}

    def after_step(self, step: int) -> None:
        """Nothing follows a step."""


class Supervised(EndToEnd):
    """Encoder and probe trained together."""

    def __init__(self, p: Profile, frames: int, encoder: Encoder):
        super().__init__()
        self.p, self.encoder = p, encoder
        self.probe = SegmentationProbe(p.grid(frames), p.tubelet_size, p.width, p.heads, p.probe_width)

    def logits(self, grey: Tensor) -> Tensor:
        return self.probe(*encode(self.encoder, grey, self.p.sector_aware))


class UNet(EndToEnd):
    """MONAI's residual U-Net, frame by frame: what an engineer would try before any pre-training."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64, 128)):
        super().__init__()
        from monai.networks.nets import UNet as Network  # imported late: it takes seconds

        self.net = Network(2, 1, CLASSES, channels, strides=(2,) * (len(channels) - 1), num_res_units=2)

    def logits(self, grey: Tensor) -> Tensor:
        B, T = grey.shape[:2]
        frames = standardise(grey).transpose(1, 2).flatten(0, 1)  # [B·T, 1, H, W]
        return self.net(frames).view(B, T, CLASSES, *grey.shape[2:]).transpose(1, 2)
