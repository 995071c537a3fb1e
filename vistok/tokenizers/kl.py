"""The KL autoencoder of latent diffusion (Rombach et al., 2021, arXiv:2112.10752, section 3.1), in
diffusers' form."""

import math
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.models import Component, register_to_config
from vistok.quantizers import Gaussian
from vistok.tokenizers.base import QuantizedTokenizer, TokenizerOutput


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


class KLTokenizer(QuantizedTokenizer):
    """Images to the scaled latents of the autoencoder, one per square of pixels; what other
    tokenizers draw in, trained on its own.

    The deviation of the latents is in the `usage` of `forward`: one over it is the `scaling_factor`
    to go on with.

    Args:
        quantizer: the bottleneck, of as many channels as the autoencoder's latents.
        vae: the autoencoder.
        image_size: pixels of a side, or (height, width).
    """

    @register_to_config
    def __init__(
        self, quantizer: Gaussian, vae: KLAutoencoder, image_size: int | Sequence[int] = 256
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % vae.factor or width % vae.factor or quantizer.dim != vae.latent_channels:
            raise UserError(
                f"KLTokenizer: image_size {height}x{width} must be divisible by {vae.factor}, and "
                f"the quantizer have the autoencoder's {vae.latent_channels} channels, not "
                f"{quantizer.dim}"
            )
        self.image_size = (height, width)
        self.spec = quantizer.spec((height // vae.factor, width // vae.factor))
        self.quantizer = quantizer
        self.vae = vae

    def to_latents(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b gh gw m"]:
        mean, log_variance = self.vae.moments(images).chunk(2, dim=1)
        scale = self.vae.scaling_factor
        moments = torch.cat([mean * scale, log_variance + 2 * math.log(scale)], dim=1)
        return moments.permute(0, 2, 3, 1)

    def to_images(self, latents: Float[Tensor, "b gh gw d"]) -> Float[Tensor, "b 3 h w"]:
        return self.vae.decode(latents.permute(0, 3, 1, 2))

    def forward(
        self, images: Float[Tensor, "b 3 h w"], text: Float[Tensor, "b l c"] | None = None
    ) -> TokenizerOutput:
        result = super().forward(images)
        result.usage["deviation"] = result.tokens.std()
        return result

    @property
    def last_layer(self) -> nn.Parameter:
        return self.vae.vae.decoder.conv_out.weight
