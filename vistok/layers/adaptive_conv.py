"""The convolutional decoder of GigaTok (Xiong et al., 2025, arXiv:2504.08736): VQGAN's, with
adaptive group norms and with resolution made from channels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.layers.conv import Decoder, group_norm


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift are linear in the deviation and the mean of each channel of
    another grid (as in AdaIN: Huang and Belongie, 2017, arXiv:1703.06868)."""

    def __init__(self, style_channels: int, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups, affine=False)
        self.gamma = nn.Linear(style_channels, channels)
        self.beta = nn.Linear(style_channels, channels)

    def forward(
        self, x: Float[Tensor, "b c h w"], style: Float[Tensor, "b s gh gw"]
    ) -> Float[Tensor, "b c h w"]:
        variance, mean = torch.var_mean(style.float().flatten(2), dim=2)
        scale = self.gamma((variance + 1e-6).sqrt().to(style.dtype))
        shift = self.beta(mean.to(style.dtype))
        return self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class AdaptiveDecoder(Decoder):
    """`Decoder` with an adaptive norm before each level, of the statistics of its input grid."""

    def __init__(
        self,
        widths: Sequence[int],
        in_channels: int,
        num_res_blocks: int,
        attention: bool,
        dropout: float,
        patch_size: int,
        groups: int,
        upsample: type[nn.Module],
    ):
        super().__init__(
            widths, in_channels, num_res_blocks, attention, dropout, patch_size, groups, upsample
        )
        self.adaptive = nn.ModuleList(
            AdaptiveGroupNorm(in_channels, level.res[0].conv1.in_channels, groups)
            for level in self.conv_blocks
        )

    def forward(self, features: Float[Tensor, "b c gh gw"]) -> Float[Tensor, "b 3 h w"]:
        h = self.mid(self.conv_in(features))
        for norm, level in zip(self.adaptive, self.conv_blocks, strict=True):
            h = level(norm(h, features))
        return self.to_pixels(h)


class DepthToSpace(nn.Module):
    """Double height and width by a convolution to four times the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        # Published weights order the channels as (y, x, channel); pixel_shuffle wants (y, x) last.
        return F.pixel_shuffle(self.conv(x).unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)
