"""Controls. What learns from labels end to end, the ViT with its probe and a small U-Net (objectives, see `pretrain`),
and a ViT that learned from ImageNet and sees one frame at a time (never trained here).

From random weights the ViT is the control that the paper compares with; from pre-trained ones it is fine-tuning.
"""

from __future__ import annotations

import timm
from torch import Generator, Tensor, nn

from usjepa_nb.augment import MEAN, STD, augment, standardise
from usjepa_nb.objectives import Objective
from usjepa_nb.probe import CLASSES, SegmentationProbe, encode, seen_tokens, segmentation_loss
from usjepa_nb.profile import Profile
from usjepa_nb.vit import Encoder, gather
from usjepa_nb.weights import WeightsError


class EndToEnd(Objective):
    """Cross-entropy on augmented labelled clips; a subclass says how `logits` come from a clip."""

    @property
    def features(self) -> Encoder | None:
        """The encoder, for the monitors; a U-Net has none."""
        return self._modules.get("encoder")

    def logits(self, grey: Tensor) -> Tensor:
        """Grey clips 0…255 [B, T, H, W] -> [B, classes, T, H, W]."""
        raise NotImplementedError

    def prepare(self, batch: tuple[Tensor, Tensor], generator: Generator) -> tuple[Tensor, Tensor]:
        """Clips and masks, uint8 [B, T, H, W] each -> one augmented view of both."""
        return augment(batch[0], generator, batch[1])

    def losses(self, prepared: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        grey, masks = prepared
        return {"loss": segmentation_loss(self.logits(grey), masks)}


class Supervised(EndToEnd):
    """Encoder and probe trained together."""

    def __init__(self, p: Profile, frames: int, encoder: Encoder):
        super().__init__()
        self.p, self.encoder = p, encoder
        self.probe = SegmentationProbe(p.grid(frames), p.tubelet_size, p.width, p.heads, p.probe_width)

    def logits(self, grey: Tensor) -> Tensor:
        return self.probe(*encode(self.encoder, grey, self.p.sector_aware))

    def prepare(self, batch: tuple[Tensor, Tensor], generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """As of every `EndToEnd`, and the tokens that the encoder is shown, on the host."""
        grey, masks = super().prepare(batch, generator)
        return grey, masks, seen_tokens(self.encoder, grey, self.p.sector_aware).cpu()

    def losses(self, prepared: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        grey, masks, seen = prepared
        return {"loss": self.probe.loss(*encode(self.encoder, grey, self.p.sector_aware, seen), masks)}


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


class FrameEncoder(nn.Module):
    """timm's ViT-S/16, trained on ImageNet (augreg, Steiner et al. 2022), on every frame; a tubelet's frames averaged.

    Patch embedding and positions are resized by timm to the profile's patch and image size. It sees the whole frame,
    also outside the sector, and nothing of the time between frames.

    Raises:
        WeightsError: the weights are neither in the cache nor to be had from the network.
    """

    MODEL = "vit_small_patch16_224.augreg_in1k"

    def __init__(self, p: Profile, frames: int, pretrained: bool = True):
        super().__init__()
        self.grid, self.tubelet = p.grid(frames), p.tubelet_size
        try:
            self.net = timm.create_model(self.MODEL, pretrained, img_size=p.size, patch_size=p.patch, in_chans=1,
                                         num_classes=0)
        except (OSError, RuntimeError, ValueError) as e:  # whatever the hub and its transport raise
            reason = (str(e) or type(e).__name__).splitlines()[0][:120]
            raise WeightsError(f"{self.MODEL}: its weights could not be had ({reason}); connect to the network, or "
                               "fill the cache of huggingface_hub, or leave imagenet out of the grid") from e
        self.width = self.net.embed_dim
        self.mean, self.std = (self.net.pretrained_cfg[k][0] for k in ("mean", "std"))  # of its photographs: .5, .5

    def forward(self, x: Tensor, keep: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Standardised clips [B, 1, T, H, W] -> features of the tokens `keep` [B, K] (all when None), [B, K, D]."""
        frames = ((x * STD + MEAN - self.mean) / self.std).transpose(1, 2).flatten(0, 1)
        tokens = self.net.forward_features(frames)[:, self.net.num_prefix_tokens:]  # [B·T, y·x, D]
        z = tokens.view(len(x), self.grid[0], self.tubelet[0], -1, self.width).mean(2).flatten(1, 2)
        return z if keep is None else gather(z, keep)


class ImageNet(nn.Module):
    """The frozen control around it."""

    def __init__(self, p: Profile, frames: int):
        super().__init__()
        self.encoder = FrameEncoder(p, frames)
