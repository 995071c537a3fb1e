"""The convolutional grid tokenizer of LlamaGen (Sun et al., 2024, arXiv:2406.06525, section 2.1)
and of VAR (Tian et al., 2024, arXiv:2404.02905, section 3.2), which is VQGAN's autoencoder (Esser
et al., 2021, arXiv:2012.09841) around any quantizer."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.layers.conv import Decoder, Encoder
from vistok.models import register_to_config
from vistok.quantizers import Quantizer
from vistok.tokenizers.base import QuantizedTokenizer


class ConvTokenizer(QuantizedTokenizer):
    """Images to a grid of codes, one per square of `patch_size * 2 ** (levels - 1)` pixels.

    The defaults are LlamaGen's VQ-16; VQ-8 has multipliers (1, 2, 2, 4). VAR's has a `MultiScale`
    quantizer, 160 channels, 32 z_channels and kernels of 3. The weights do not depend on
    `image_size`, so a loaded model can be given another one.

    Args:
        quantizer: the codes of a grid cell.
        image_size: pixels of a side, or (height, width).
        channels: width of the encoder's first convolution, and what the multipliers multiply.
        channel_multipliers: width of each level of the encoder, from full resolution down; each
            level but the last halves the resolution.
        decoder_channel_multipliers: the same for the decoder; None for the encoder's.
        num_res_blocks: residual blocks per level; the decoder has one more.
        z_channels: width between the networks and the quantizer's projections.
        attention: self-attention at the deepest level and in the middle.
        dropout: rate inside residual blocks.
        patch_size: side of the squares of pixels that become channels before the first level, to
            save the work at full resolution; 1 in the published models.
        kernel_size: of the projections to and from the quantizer.
        groups: of the group norms.
    """

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | Sequence[int] = 256,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_channel_multipliers: Sequence[int] | None = None,
        num_res_blocks: int = 2,
        z_channels: int = 256,
        attention: bool = True,
        dropout: float = 0.0,
        patch_size: int = 1,
        kernel_size: int = 1,
        groups: int = 32,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        factor = patch_size * 2 ** (len(channel_multipliers) - 1)
        if height % factor or width % factor:
            raise UserError(
                f"ConvTokenizer: image_size {height}x{width} must be divisible by {factor}, the "
                f"side of a code for patch_size {patch_size} and {len(channel_multipliers)} levels"
            )
        decoder_multipliers = decoder_channel_multipliers or channel_multipliers
        if len(decoder_multipliers) != len(channel_multipliers):
            raise UserError(
                f"ConvTokenizer: {len(decoder_multipliers)} decoder_channel_multipliers for "
                f"{len(channel_multipliers)} channel_multipliers: the counts must be equal"
            )
        self.image_size = (height, width)
        self.spec = quantizer.spec((height // factor, width // factor))
        shared = (z_channels, num_res_blocks, attention, dropout, patch_size)
        encoder_widths = [channels * m for m in channel_multipliers]
        self.encoder = Encoder(encoder_widths, *shared, channels, groups)
        kernel = {"kernel_size": kernel_size, "padding": kernel_size // 2}
        self.quant_conv = nn.Conv2d(z_channels, quantizer.in_dim, **kernel)
        self.quantizer = quantizer
        self.post_quant_conv = nn.Conv2d(quantizer.dim, z_channels, **kernel)
        self.decoder = Decoder([channels * m for m in decoder_multipliers], *shared, groups)

    def to_latents(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b gh gw d"]:
        return self.quant_conv(self.encoder(2 * images - 1)).permute(0, 2, 3, 1)

    def to_images(self, latents: Float[Tensor, "b gh gw d"]) -> Float[Tensor, "b 3 h w"]:
        return (self.decoder(self.post_quant_conv(latents.permute(0, 3, 1, 2))) + 1) / 2

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight
