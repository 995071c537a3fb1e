"""The KL autoencoder of latent diffusion (Rombach et al., 2021, arXiv:2112.10752, section 3.1), in
diffusers' form: also MAR's KL-16 (Li et al., 2024, arXiv:2406.11838) and those of SD3 and FLUX."""

import math
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Float32
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.layers.constant import Constant
from vistok.models import Component, register_to_config
from vistok.quantizers import Gaussian, Quantizer
from vistok.quantizers.gaussian import LOG_VARIANCE
from vistok.tokenizers.base import QuantizedTokenizer, TokenizerOutput


class KLAutoencoder(Component):
    """Images to maps of latents of about unit variance, and back. Float32 under autocast.

    Levels count from full resolution, 0, down. Latents z of the network are (z - shift_factor) *
    scaling_factor outside.

    Args:
        latent_channels: of the map.
        block_channels: width of each level, of which each but the last halves the map.
        layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
        norm_groups: of the group norms.
        scaling_factor: what latents are multiplied by, a number or one per channel.
        shift_factor: what is taken off them before, a number or one per channel.
        encoder_attention: levels of the encoder with attention after each residual block.
        decoder_attention: those of the decoder.
        mid_attention: whether there is attention between the encoder's last level and the latents,
            and between these and the decoder's first.
        quant_conv: whether a last linear map makes the moments.
        post_quant_conv: whether a first linear map takes the latents.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_groups: int = 32,
        scaling_factor: float | Sequence[float] = 1.0,
        shift_factor: float | Sequence[float] = 0.0,
        encoder_attention: Sequence[int] = (),
        decoder_attention: Sequence[int] = (),
        mid_attention: bool = True,
        quant_conv: bool = True,
        post_quant_conv: bool = True,
    ):
        super().__init__()
        levels = range(len(block_channels))
        beyond = {*encoder_attention, *decoder_attention} - set(levels)
        if beyond:
            raise UserError(
                f"KLAutoencoder: attention at levels {sorted(beyond)}, expected 0 to {levels[-1]}"
            )
        self.latent_channels = latent_channels
        self.factor = 2 ** levels[-1]
        self.scaling_factor = _each("scaling_factor", scaling_factor, latent_channels)
        self.shift_factor = _each("shift_factor", shift_factor, latent_channels)
        if min(self.scaling_factor) <= 0:
            raise UserError(f"KLAutoencoder: scaling_factor {scaling_factor} must be positive")
        self.scale = Constant(self.scaling_factor)
        self.shift = Constant(self.shift_factor)
        self.log_scale = Constant([math.log(scale) for scale in self.scaling_factor])
        self.vae = AutoencoderKL(
            down_block_types=["Attn" * (k in encoder_attention) + DOWN for k in levels],
            up_block_types=["Attn" * (k in decoder_attention) + UP for k in reversed(levels)],
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_groups,
            mid_block_add_attention=mid_attention,
            use_quant_conv=quant_conv,
            use_post_quant_conv=post_quant_conv,
        )

    def moments(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b m h2 w2"]:
        """Return means and log-variances, unscaled, of images in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            images = 2 * images.to(self.dtype) - 1
            return self.vae.encode(images).latent_dist.parameters

    def scaled(self, moments: Float[Tensor, "b m h2 w2"]) -> Float32[Tensor, "b m h2 w2"]:
        """Return the moments of the scaled latents."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        mean = (mean - _channels(self.shift)) * _channels(self.scale)
        log_variance = log_variance.clamp(*LOG_VARIANCE) + 2 * _channels(self.log_scale)
        return torch.cat([mean, log_variance], dim=1)

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the scaled means of images in [0, 1]."""
        mean, _ = self.scaled(self.moments(images)).chunk(2, dim=1)
        return mean.to(self.dtype)

    def decode(self, latents: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        """Return images of scale [0, 1], not clamped."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float() / _channels(self.scale) + _channels(self.shift)
            return (self.vae.decode(latents.to(self.dtype)).sample + 1) / 2

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.decoder.conv_in.weight.dtype


class KLTokenizer(QuantizedTokenizer):
    """Images to the scaled latents of the autoencoder, one per square of pixels, or to levels of
    them; what other tokenizers draw in, trained on its own.

    The deviation of the latents is in the `usage` of `forward`; `vistok latents` measures it over a
    data set, and `rescaled` divides by it.

    Args:
        quantizer: the bottleneck, of as many channels as the autoencoder's latents: a `Gaussian`,
            or a `DimensionWise`, which stands in for it after training (see `quantised`).
        vae: the autoencoder.
        image_size: pixels of a side, or (height, width).
    """

    @register_to_config
    def __init__(
        self, quantizer: Quantizer, vae: KLAutoencoder, image_size: int | Sequence[int] = 256
    ):
        super().__init__()
        if not isinstance(quantizer, Gaussian):
            raise UserError(
                f"KLTokenizer: {type(quantizer).__name__} makes no latents of the autoencoder's "
                "means and variances; expected Gaussian or DimensionWise"
            )
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
        return self.vae.scaled(self.vae.moments(images)).permute(0, 2, 3, 1)

    def to_images(self, latents: Float[Tensor, "b gh gw d"]) -> Float[Tensor, "b 3 h w"]:
        return self.vae.decode(latents.permute(0, 3, 1, 2))

    def forward(
        self, images: Float[Tensor, "b 3 h w"], text: Float[Tensor, "b l c"] | None = None
    ) -> TokenizerOutput:
        result = super().forward(images)
        result.usage["deviation"] = self.quantizer.decode(result.tokens).std()
        return result

    def rescaled(
        self, deviation: float | Sequence[float], mean: float | Sequence[float] = 0.0
    ) -> "KLTokenizer":
        """Return the same tokenizer with latents less `mean` and over `deviation`, numbers or one
        per channel: those measured, for unit variance."""
        means = _each("mean", mean, self.vae.latent_channels)
        deviations = _each("deviation", deviation, self.vae.latent_channels)
        if min(deviations) <= 0:
            raise UserError(f"KLTokenizer: deviation {deviation} must be positive")
        now = self.vae.scaling_factor
        scales = [s / d for s, d in zip(now, deviations, strict=True)]
        shifts = [t + m / s for t, m, s in zip(self.vae.shift_factor, means, now, strict=True)]
        changes = {"scaling_factor": _shortest(scales), "shift_factor": _shortest(shifts)}
        return self.changed(vae=KLAutoencoder.from_config({**self.vae.arguments, **changes}))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.vae.vae.decoder.conv_out.weight


DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"  # diffusers' names of levels


def _each(name: str, numbers: float | Sequence[float], channels: int) -> list[float]:
    """Return one number per channel."""
    found = list(numbers) if isinstance(numbers, Sequence) else [numbers] * channels
    if len(found) != channels:
        raise UserError(f"{name} {numbers}: expected one number or {channels}, one per channel")
    return [float(number) for number in found]


def _shortest(numbers: Sequence[float]) -> float | list[float]:
    """Return equal numbers as one; the inverse of `_each`."""
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def _channels(constant: Constant) -> Float32[Tensor, "c 1 1"]:
    return constant()[:, None, None]
