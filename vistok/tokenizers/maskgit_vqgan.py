"""The VQGAN of MaskGIT (Chang et al., 2022, arXiv:2202.04200): convolutions without attention. Its
codes are what TiTok's first stage predicts and what RAR and MaskGIT generate."""

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.layers.conv import Upsample, group_norm, swish
from vistok.models import register_to_config
from vistok.quantizers import Quantizer
from vistok.tokenizers.base import QuantizedTokenizer


class MaskGITVQGAN(QuantizedTokenizer):
    """Images to a grid of codes, one per square of `2 ** (levels - 1)` pixels.

    The defaults are the published model's, whose quantizer is a `VQ` of 1024 codes of 256 channels
    without l2 normalisation. The weights do not depend on `image_size`, so a loaded model can be
    given another one.

    Args:
        quantizer: the codes of a grid cell, taken from the networks as they are.
        image_size: pixels of a side, or (height, width).
        channels: what the multipliers multiply.
        channel_multipliers: width of each level, from full resolution down; each but the last
            halves the resolution.
        num_res_blocks: residual blocks per level and in the middle.
    """

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | Sequence[int] = 256,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        factor = 2 ** (len(channel_multipliers) - 1)
        if height % factor or width % factor:
            raise UserError(
                f"MaskGITVQGAN: image_size {height}x{width} must be divisible by {factor}, the "
                f"side of a code for {len(channel_multipliers)} levels"
            )
        self.image_size = (height, width)
        self.spec = quantizer.spec((height // factor, width // factor))
        widths = [channels * m for m in channel_multipliers]
        self.encoder = Encoder(widths, quantizer.in_dim, num_res_blocks, channels)
        self.quantizer = quantizer
        self.decoder = Decoder(widths, quantizer.dim, num_res_blocks)

    def to_latents(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b gh gw d"]:
        return self.encoder(images).permute(0, 2, 3, 1)

    def to_images(self, latents: Float[Tensor, "b gh gw d"]) -> Float[Tensor, "b 3 h w"]:
        # Channels stay last in memory through all layers, which is what convolutions want.
        return self.decoder(latents.permute(0, 3, 1, 2))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions without bias, each after GroupNorm and swish, added to the input.

    Where the widths differ, the projection of the published weights is of the convolutions' result
    and not of the input, so that nothing bypasses them.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = (
            nn.Conv2d(out_channels, out_channels, 1, bias=False)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        return h.add_(x) if self.nin_shortcut is None else self.nin_shortcut(h).add_(h)


class Encoder(nn.Module):
    """Images to features, by `widths` from full resolution down."""

    def __init__(
        self, widths: Sequence[int], out_channels: int, num_res_blocks: int, stem_width: int
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(3, stem_width, 3, padding=1, bias=False)
        befores = [stem_width, *widths[:-1]]
        self.levels = nn.ModuleList(
            _blocks(before, width, num_res_blocks)
            for before, width in zip(befores, widths, strict=True)
        )
        self.mid = _blocks(widths[-1], widths[-1], num_res_blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 1)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c gh gw"]:
        h = self.conv_in(images)
        for i, blocks in enumerate(self.levels):
            h = blocks(F.avg_pool2d(h, 2) if i > 0 else h)
        return self.conv_out(swish(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features to images. The levels are numbered from full resolution down and run upwards."""

    def __init__(self, widths: Sequence[int], in_channels: int, num_res_blocks: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = _blocks(widths[-1], widths[-1], num_res_blocks)
        befores = [*widths[1:], widths[-1]]
        self.levels = nn.ModuleList(
            _blocks(before, width, num_res_blocks)
            for before, width in zip(befores, widths, strict=True)
        )
        self.resample = nn.ModuleList(
            Upsample(width) if i > 0 else nn.Identity() for i, width in enumerate(widths)
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, features: Float[Tensor, "b c gh gw"]) -> Float[Tensor, "b 3 h w"]:
        h = self.mid(self.conv_in(features))
        for blocks, resample in zip(reversed(self.levels), reversed(self.resample), strict=True):
            h = resample(blocks(h))
        return self.conv_out(swish(self.norm_out(h)))


def _blocks(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    widths = [in_channels, *[out_channels] * count]
    return nn.Sequential(*(ResidualBlock(a, b) for a, b in itertools.pairwise(widths)))
