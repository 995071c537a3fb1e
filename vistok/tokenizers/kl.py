"""The KL autoencoder of latent diffusion (Rombach et al., 2021, arXiv:2112.10752, section 3.1), in
diffusers' form."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from vistok.models import Component, register_to_config


class KLAutoencoder(Component):
    """Images to maps of latents of about unit variance, and back. Float32 under autocast.

    Args:
        latent_channels: of the map.
        block_channels: width of each level, from full resolution down; each but the last halves it.
        layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
        norm_groups: of the group norms.
        scaling_factor: what latents are multiplied by.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_groups: int = 32,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        levels = len(block_channels)
        self.latent_channels = latent_channels
        self.scaling_factor = scaling_factor
        self.factor = 2 ** (levels - 1)
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_groups,
        )

    def moments(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b m h2 w2"]:
        """Return means and log-variances, unscaled, of images in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            images = 2 * images.to(self.dtype) - 1
            return self.vae.encode(images).latent_dist.parameters

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the scaled means of images in [0, 1]."""
        mean, _ = self.moments(images).chunk(2, dim=1)
        return mean * self.scaling_factor

    def decode(self, latents: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        """Return images of scale [0, 1], not clamped."""
        with torch.autocast(latents.device.type, enabled=False):
            return (self.vae.decode(latents.to(self.dtype) / self.scaling_factor).sample + 1) / 2

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.post_quant_conv.weight.dtype
