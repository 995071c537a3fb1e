"""The convolutional encoder and decoder of VQGAN (Esser et al., 2021, arXiv:2012.09841)."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FEW_PLACES = 512  # below which making the kernel of `Upsample` costs more than it saves


def group_norm(channels: int, groups: int = 32, affine: bool = True) -> nn.GroupNorm:
    """Group normalisation in so many groups, or the most below that both they and the width
    allow."""
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=1e-6, affine=affine)


def swish(normed: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return the swish of what nothing else reads, in its place where no gradient needs it."""
    return F.silu(normed, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and swish, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, groups: int = 32):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, without position encoding."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        normed = self.norm(x)
        # B C H W -> B 1 HW C
        q, k, v = (
            project(normed).flatten(2).transpose(1, 2).unsqueeze(1)
            for project in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width; the padding lies right and below only, as published weights need."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest neighbours, then convolve.

    A CPU that wants no gradient does both in one transposed convolution, which multiplies 16 times
    per channel and place where the other way multiplies 36 times.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if plain or not x.is_cpu or x.shape[-2] * x.shape[-1] < FEW_PLACES:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        kernel = self.conv.weight.transpose(0, 1).flip(2, 3)
        kernel = sum(F.pad(kernel, (a, 1 - a, b, 1 - b)) for a in (0, 1) for b in (0, 1))
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """The blocks of one resolution, then the step to the next."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        attention: bool,
        dropout: float,
        resample: nn.Module,
        groups: int = 32,
    ):
        super().__init__()
        self.res = nn.ModuleList(
            ResidualBlock(in_channels if j == 0 else out_channels, out_channels, dropout, groups)
            for j in range(num_blocks)
        )
        self.attn = nn.ModuleList(_attention(out_channels, attention, groups) for _ in self.res)
        self.resample = resample

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        for block, attend in zip(self.res, self.attn, strict=True):
            x = attend(block(x))
        return self.resample(x)


class Encoder(nn.Module):
    """Images to a grid of features.

    Args:
        widths: channels of the levels from full resolution down; each level but the last halves it.
        out_channels: channels of the features.
        num_res_blocks: residual blocks per level.
        attention: self-attention after each block of the deepest level and in the middle.
        dropout: rate inside residual blocks.
        patch_size: side of the squares of pixels that become channels before the first level.
        stem_width: channels of the first convolution; None for those of the first level.
        groups: of the group norms.
    """

    def __init__(
        self,
        widths: Sequence[int],
        out_channels: int,
        num_res_blocks: int,
        attention: bool = True,
        dropout: float = 0.0,
        patch_size: int = 1,
        stem_width: int | None = None,
        groups: int = 32,
    ):
        super().__init__()
        last = len(widths) - 1
        stem_width = stem_width or widths[0]
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(3 * patch_size**2, stem_width, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[i - 1] if i > 0 else stem_width,
                width,
                num_res_blocks,
                attention and i == last,
                dropout,
                Downsample(width) if i < last else nn.Identity(),
                groups,
            )
            for i, width in enumerate(widths)
        )
        self.mid = _middle(widths[-1], attention, dropout, groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c gh gw"]:
        h = self.conv_in(F.pixel_unshuffle(images, self.patch_size))
        for level in self.conv_blocks:
            h = level(h)
        return self.conv_out(swish(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """A grid of features to images: the mirror of `Encoder`, from the same arguments but the stem.
    The levels run from the last width to the first, each with one block more. `upsample` makes the
    step between two levels from its number of channels."""

    def __init__(
        self,
        widths: Sequence[int],
        in_channels: int,
        num_res_blocks: int,
        attention: bool = True,
        dropout: float = 0.0,
        patch_size: int = 1,
        groups: int = 32,
        upsample: Callable[[int], nn.Module] = Upsample,
    ):
        super().__init__()
        widths = list(reversed(widths))
        last = len(widths) - 1
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], attention, dropout, groups)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                num_res_blocks + 1,
                attention and i == 0,
                dropout,
                upsample(width) if i < last else nn.Identity(),
                groups,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3 * patch_size**2, 3, padding=1)

    def forward(self, features: Float[Tensor, "b c gh gw"]) -> Float[Tensor, "b 3 h w"]:
        h = self.mid(self.conv_in(features))
        for level in self.conv_blocks:
            h = level(h)
        return self.to_pixels(h)

    def to_pixels(self, h: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Return the images that the last level's output stands for."""
        return F.pixel_shuffle(self.conv_out(swish(self.norm_out(h))), self.patch_size)


def _attention(channels: int, wanted: bool, groups: int) -> nn.Module:
    return AttentionBlock(channels, groups) if wanted else nn.Identity()


def _middle(channels: int, attention: bool, dropout: float, groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels, dropout, groups),
        _attention(channels, attention, groups),
        ResidualBlock(channels, channels, dropout, groups),
    )
