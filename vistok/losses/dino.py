"""The adversary on frozen DINO features of StyleGAN-T (Sauer et al., 2023, arXiv:2301.09515), with
which VAR's authors train tokenizers, and the augmentation of all it sees (Zhao et al., 2020,
arXiv:2006.10738)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vistok.errors import UserError
from vistok.losses.adversarial import Discriminator
from vistok.losses.alignment import Teacher


class DINODiscriminator(Discriminator):
    """Judges each patch at several depths of a frozen vision transformer, by small heads that run
    along the patches. In training it sees augmented images.

    Args:
        path: directory or Hub repository of the transformer; published is DINO ViT-S/16.
        image_size: pixels of a side to which images are brought; None for the transformer's own.
        depths: blocks, from 0, behind which a head judges; another one judges the embedding.
        kernel_size: of the heads, in patches.
        cutout: side of the square that augmentation blots out, as a share of the image's; 0 for
            images that are not augmented.
    """

    def __init__(
        self,
        path: str = "facebook/dino-vits16",
        image_size: int | None = None,
        depths: Sequence[int] = (2, 5, 8, 11),
        kernel_size: int = 9,
        cutout: float = 0.2,
    ):
        super().__init__()
        self.teacher = Teacher(path, image_size)
        self.states = [0, *(depth + 1 for depth in depths)]
        blocks = self.teacher.net.config.num_hidden_layers
        if not 0 < max(self.states) <= blocks:
            raise UserError(
                f"DINODiscriminator: {path} has {blocks} blocks, of which depths {list(depths)} "
                "are not all"
            )
        self.cutout = cutout
        self.heads = nn.ModuleList(FeatureHead(self.teacher.dim, kernel_size) for _ in self.states)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        if self.training and self.cutout:
            images = augmented(images, self.cutout)
        with torch.autocast(images.device.type, enabled=False):
            features = self.features(images.float())
        # Class and register tokens come before the patches.
        patches = self.teacher.grid**2
        return torch.cat(
            [
                head(state[:, -patches:].transpose(1, 2))
                for head, state in zip(self.heads, features, strict=True)
            ],
            dim=1,
        )

    def features(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b l d"]]:
        """Return what the heads judge; its gradient reaches the images."""
        teacher, size = self.teacher, (self.teacher.image_size,) * 2
        resized = F.interpolate(images, size, mode="bicubic", antialias=True)
        seen = (resized - teacher.mean) / teacher.std
        asked = teacher.options | {"output_hidden_states": True}
        states = teacher.net(pixel_values=seen, **asked).hidden_states
        return [states[state] for state in self.states]


class FeatureHead(nn.Module):
    """Features of patches in a row to a logit for each."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.inward = normed_conv(channels, 1)
        self.along = normed_conv(channels, kernel_size)
        self.logit = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, features: Float[Tensor, "b d l"]) -> Float[Tensor, "b l"]:
        x = self.inward(features)
        return self.logit((self.along(x) + x) / 2**0.5).squeeze(1)


def normed_conv(channels: int, kernel_size: int) -> nn.Sequential:
    """Return a convolution of bounded gain (Miyato et al., 2018, arXiv:1802.05957), closed to a
    ring, with batch normalisation."""
    conv = nn.Conv1d(
        channels, channels, kernel_size, padding=kernel_size // 2, padding_mode="circular"
    )
    return nn.Sequential(spectral_norm(conv), nn.BatchNorm1d(channels), nn.LeakyReLU(0.2))


def augmented(
    images: Float[Tensor, "b 3 h w"], cutout: float, shift: float = 0.125
) -> Float[Tensor, "b 3 h w"]:
    """Return images of [0, 1], each of another brightness, saturation and contrast, shifted by up
    to a share of its sides over zeros, without a square; all of it can be differentiated."""
    by = torch.rand(3, len(images), 1, 1, 1, device=images.device)
    x = images + by[0] / 2 - 0.25
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * by[1]
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (by[2] + 0.5)
    return _shifted(x, shift) * ~_squares(x, cutout)[:, None]


def _shifted(images: Float[Tensor, "b c h w"], share: float) -> Float[Tensor, "b c h w"]:
    grid = []
    for axis in (2, 3):
        side = images.shape[axis]
        most = int(side * share + 0.5)
        start = torch.randint(-most, most + 1, (len(images), 1), device=images.device)
        grid.append(torch.arange(side, device=images.device) + start)
    rows, columns = grid
    inside = _inside(rows, images.shape[2])[:, :, None] & _inside(columns, images.shape[3])[:, None]
    rows, columns = rows.clamp(0, images.shape[2] - 1), columns.clamp(0, images.shape[3] - 1)
    number = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 1, 2) * inside[:, None]


def _inside(places: Int64[Tensor, "b n"], side: int) -> Bool[Tensor, "b n"]:
    return (places >= 0) & (places < side)


def _squares(images: Float[Tensor, "b c h w"], share: float) -> Bool[Tensor, "b h w"]:
    """Return where each image has its square, which may reach over the border."""
    near = []
    for axis in (2, 3):
        side = images.shape[axis]
        middle = torch.randint(0, side + 1, (len(images), 1), device=images.device)
        near.append((torch.arange(side, device=images.device) - middle).abs() * 2 < side * share)
    rows, columns = near
    return rows[:, :, None] & columns[:, None]
