"""The adversaries of VQGAN (Esser et al., 2021, arXiv:2012.09841), LlamaGen (Sun et al., 2024,
arXiv:2406.06525) and TiTok (Yu et al., 2024, arXiv:2406.07550), and the losses of both sides."""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError

DiscriminatorForm = Literal["hinge", "vanilla", "non-saturating"]
GeneratorForm = Literal["hinge", "non-saturating"]


class Discriminator(nn.Module):
    """Images in [0, 1] to logits, higher for real."""

    def check_images(self, images: Float[Tensor, "b 3 h w"]) -> None:
        """Raise `UserError` for images of a size that it cannot judge."""

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b *logits"]:
        raise NotImplementedError


class PatchDiscriminator(Discriminator):
    """Judges overlapping patches, one logit each (Isola et al., 2016, arXiv:1611.07004).

    Args:
        channels: width after the first convolution; it doubles up to eightfold.
        num_layers: convolutions that halve the resolution.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        super().__init__()
        self.min_side = 3 * 2**num_layers
        widths = [channels * min(2**n, 8) for n in range(num_layers + 1)]
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, num_layers + 1):
            stride = 2 if n < num_layers else 1
            layers += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[n]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    def check_images(self, images: Float[Tensor, "b 3 h w"]) -> None:
        if min(images.shape[-2:]) < self.min_side:
            raise UserError(
                f"PatchDiscriminator: got images {tuple(images.shape)}, expected sides of at least "
                f"{self.min_side} pixels; fewer num_layers judge smaller ones"
            )

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 ph pw"]:
        return self.main(2 * images - 1)


class StyleGANDiscriminator(Discriminator):
    """Judges whole images of one size by residual blocks down to 4x4 (Karras et al., 2020,
    arXiv:1912.04958), without their equalised learning rate and minibatch statistics.

    Args:
        image_size: pixels of a side, a power of two.
        max_channels: width at 32x32 and below; it halves with each doubling of the side from there.
    """

    def __init__(self, image_size: int = 256, max_channels: int = 512):
        super().__init__()
        if image_size < 4 or image_size & (image_size - 1):
            raise UserError(
                f"StyleGANDiscriminator: image_size {image_size} must be a power of two from 4"
            )
        self.image_size = image_size
        sides = [image_size >> n for n in range(int(math.log2(image_size)) - 1)]  # ..., 8, 4
        widths = [min(max_channels, 32 * max_channels // side) for side in sides]
        self.blocks = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1),
            nn.LeakyReLU(0.2),
            *(HalvingBlock(wide, narrow) for wide, narrow in pairwise(widths)),
        )
        self.final_conv = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 3, padding=1), nn.LeakyReLU(0.2)
        )
        self.final_linear = nn.Sequential(
            nn.Linear(16 * widths[-1], widths[-1]), nn.LeakyReLU(0.2), nn.Linear(widths[-1], 1)
        )

    def check_images(self, images: Float[Tensor, "b 3 h w"]) -> None:
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"StyleGANDiscriminator: got images {tuple(images.shape)}, its image_size is "
                f"{self.image_size}"
            )

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1"]:
        return self.final_linear(self.final_conv(self.blocks(2 * images - 1)).flatten(1))


class HalvingBlock(nn.Module):
    """Three convolutions, of which the last, behind a blur, halves the side, beside a 1x1 one."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, out_channels, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.downsample = nn.Sequential(
            Blur(), nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class Blur(nn.Module):
    """Each channel by the outer product of (1, 2, 1) / 4 with itself; borders are mirrored."""

    def __init__(self):
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        kernel = torch.outer(self.f, self.f) / self.f.sum().square()
        return _blurred(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel)


class TiTokDiscriminator(Discriminator):
    """Judges images of any size on a grid of 16x16 overlapping regions.

    Args:
        channels: width of the first stage, a multiple of 32; each further stage doubles it.
        num_stages: convolutions, each of which a blur halves.
    """

    def __init__(self, channels: int = 128, num_stages: int = 3):
        super().__init__()
        if channels < 32 or channels % 32:
            raise UserError(
                f"TiTokDiscriminator: {channels} channels, expected a multiple of 32, the groups "
                "of its normalisation"
            )
        if num_stages < 1:
            raise UserError(f"TiTokDiscriminator: num_stages {num_stages}, expected 1 or more")
        widths = [channels, *(channels * 2**n for n in range(num_stages))]
        self.block_in = nn.Sequential(nn.Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(0.1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1),
                HalvingBlur(),
                nn.GroupNorm(32, after),
                nn.LeakyReLU(0.1),
            )
            for before, after in pairwise(widths)
        )
        self.pool = nn.AdaptiveMaxPool2d(16)
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(widths[-1], 1, 5, padding=2),
        )

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 16 16"]:
        x = self.block_in(images)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(self.pool(x))


class HalvingBlur(nn.Module):
    """Every other pixel of each channel blurred by the outer product of (1, 3, 3, 1) / 8 with
    itself. Borders are zeros: one line on each side, and a second one right or below odd sides."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", (torch.outer(taps, taps) / 64)[None, None])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        height, width = x.shape[-2:]
        padded = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        return _blurred(padded, self.kernel[0, 0], stride=2)


def _blurred(x: Float[Tensor, "b c h w"], kernel: Float[Tensor, "k k"], stride: int = 1) -> Tensor:
    """Return each channel convolved with the one kernel."""
    channels = x.shape[1]
    kernels = kernel.to(x.dtype).expand(channels, 1, *kernel.shape)
    return F.conv2d(x, kernels, stride=stride, groups=channels)


def generator_loss(
    fake: Float[Tensor, "*logits"], form: GeneratorForm = "hinge"
) -> Float[Tensor, ""]:
    """Return the loss that raises the logits of fake images.

    `non-saturating` is LlamaGen's, whose cross-entropy has logits and targets exchanged: a constant
    above `hinge`, with the same gradient.
    """
    fake = fake.float()
    return -fake.mean() if form == "hinge" else _exchanged_cross_entropy(fake, 1.0)


def discriminator_loss(
    real: Float[Tensor, "*logits"],
    fake: Float[Tensor, "*logits"],
    form: DiscriminatorForm = "hinge",
) -> Float[Tensor, ""]:
    """Return the mean of the losses of real and fake logits.

    `non-saturating` is LlamaGen's, whose cross-entropy has logits and targets exchanged: the term
    of fake logits is constant, so that they teach nothing. No published model used it.
    """
    real, fake = real.float(), fake.float()
    if form == "non-saturating":
        terms = _exchanged_cross_entropy(real, 1.0), _exchanged_cross_entropy(fake, 0.0)
    elif form == "hinge":
        terms = F.relu(1 - real).mean(), F.relu(1 + fake).mean()
    else:
        terms = F.softplus(-real).mean(), F.softplus(fake).mean()
    return 0.5 * sum(terms)


def adaptive_weight(
    loss: Float[Tensor, ""], adversarial: Float[Tensor, ""], last_layer: nn.Parameter
) -> Float[Tensor, ""]:
    """Return the weight at which the adversary's gradient at the last layer is as long as that of
    the other losses (Esser et al., 2021, eq. 7)."""
    wanted, given = (
        torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm()
        for term in (loss, adversarial)
    )
    return (wanted / (given + 1e-4)).clamp(0, 1e4).detach()


def _exchanged_cross_entropy(logits: Tensor, constant: float) -> Float[Tensor, ""]:
    """Return the binary cross-entropy of a constant logit against the logits as its targets."""
    return F.binary_cross_entropy_with_logits(torch.full_like(logits, constant), logits)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
