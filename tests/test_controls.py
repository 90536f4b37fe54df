"""The controls that learn from labels: what they answer, that they learn, and that a U-Net sees one frame at a time."""

import pytest
import torch
from torch import nn

from usjepa_nb.controls import EndToEnd, FrameEncoder, Supervised, UNet
from usjepa_nb.objectives import make_encoder
from usjepa_nb.probe import segmentation_loss
from usjepa_nb.profile import load


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        p = load("smoke")
        return UNet() if kind == "unet" else Supervised(p, p.frames, make_encoder(p, p.frames))


KINDS = pytest.mark.parametrize("kind", ["unet", "supervised"])


def noise(n=2, seed=0):
    return torch.randint(3, 256, (n, 4, 32, 32), generator=generator(seed)).float()


def halves():
    """Bright above (label 1), dark below (label 2)."""
    masks = torch.ones(4, 4, 32, 32, dtype=torch.uint8)
    masks[..., 16:, :] = 2
    return torch.where(masks == 1, 200.0, 40.0), masks


@KINDS
def test_every_pixel_of_every_frame_gets_four_logits(kind):
    logits = made(kind).logits(noise(3))
    assert logits.shape == (3, 4, 4, 32, 32) and logits.isfinite().all()


@KINDS
def test_it_learns_a_toy(kind):
    model, batch = made(kind), halves()
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=5e-3), None
    for step in range(40):
        loss = model(batch, generator(step))["loss"]
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(step)
    assert float(loss.detach()) < 0.5 * first
    with torch.no_grad():
        right = model.eval().logits(batch[0]).argmax(1) == batch[1]
    assert right.float().mean() > 0.8


@KINDS
def test_every_weight_is_trained(kind):
    model = made(kind)
    model((noise(4), noise(4, 1).byte() % 4), generator())["loss"].backward()
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())


def test_the_monitors_watch_the_encoder_and_a_u_net_has_none():
    supervised = made("supervised")
    assert supervised.features is supervised.encoder and made("unet").features is None


def test_a_u_net_sees_each_frame_alone():
    net, grey = made("unet").eval(), noise()
    with torch.no_grad():
        whole = net.logits(grey)
        for b in range(2):
            for t in range(4):
                alone = net.logits(grey[b:b + 1, t:t + 1])[0, :, 0]
                torch.testing.assert_close(whole[b, :, t], alone, atol=1e-4, rtol=1e-4)
    assert (whole[0, :, 0] - whole[0, :, 1]).abs().max() > 0.01  # different frames, different answers


def test_the_vit_sees_all_frames_together():
    model, grey = made("supervised").eval(), noise()
    other = grey.clone()
    other[:, 3] = noise(seed=1)[:, 3]
    with torch.no_grad():
        assert (model.logits(grey) - model.logits(other))[:, :, 0].abs().max() > 1e-5


class Fixed(EndToEnd):
    """Answers the label in its own pixels: grey 60 · label."""

    def __init__(self):
        super().__init__()
        self.scale, self.saw = nn.Parameter(torch.ones(())), []

    def logits(self, grey):
        self.saw.append(grey)
        label = (grey / 60).round().clamp(0, 3).long()
        return self.scale * nn.functional.one_hot(label, 4).movedim(-1, 1).float() * 9


def test_image_and_labels_are_augmented_together():
    masks = torch.zeros(4, 4, 32, 32, dtype=torch.uint8)
    masks[..., 4:28, 4:16], masks[..., 4:28, 16:28] = 3, 1
    model, grey = Fixed(), masks.float() * 60
    out = model((grey, masks), generator(3))
    loss = out["loss"].detach()
    assert out.keys() == {"loss"} and not torch.equal(model.saw[0], grey)
    apart = segmentation_loss(model.logits(model.saw[0]), masks)  # the labels of the image as it was
    assert float(loss) < 0.6 * float(apart.detach())
    assert torch.equal(model((grey, masks), generator(3))["loss"], loss)
    assert not torch.equal(model((grey, masks), generator(4))["loss"], loss)


def test_logits_are_left_to_the_subclass():
    with pytest.raises(NotImplementedError):
        EndToEnd()((noise(), noise().byte()), generator())


def test_the_imagenet_encoder_sees_frames_one_by_one_and_averages_a_tubelet():
    p = load("smoke")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = FrameEncoder(p, 4, pretrained=False).eval()
    (t, y, x), clips = encoder.grid, torch.randn(2, 1, 4, p.size, p.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = encoder(clips)
        # from (grey / 255 - .2) / .2 to the (grey / 255 - .5) / .5 that it learned from
        alone, before = (encoder.net.forward_features((0.2 * clips[1:, :, t] - 0.3) / 0.5)[
            0, encoder.net.num_prefix_tokens:] for t in (3, 2))
        keep = torch.tensor([[3, 0], [5, 1]])
        torch.testing.assert_close(encoder(clips, keep), torch.stack([z[0, [3, 0]], z[1, [5, 1]]]))
    assert z.shape == (2, t * y * x, encoder.width) and p.tubelet == 2
    torch.testing.assert_close(z[1].view(t, y * x, -1)[-1], (alone + before) / 2, atol=1e-4, rtol=1e-4)
