"""TiTok, images as short 1-D sequences (Yu et al., 2024, arXiv:2406.07550), in single-stage form
(Kim et al., 2025, arXiv:2501.07730): the decoder regresses pixels."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.layers import conv
from vistok.layers.vit import SelfAttention, TransformerBlock
from vistok.models import register_to_config
from vistok.quantizers import Quantizer
from vistok.tokenizers.base import QuantizedTokenizer
from vistok.tokens import TokenSpec


class TiTok(QuantizedTokenizer):
    """Images to `num_latent_tokens` codes, none of which has a place in the image.

    The published sizes (width, depth, heads) are small 512, 8, 8; base 768, 12, 12;
    large 1024, 24, 16.

    Args:
        quantizer: the codes of a latent token.
        image_size: pixels of a side.
        patch_size: side of the encoder's patches.
        num_latent_tokens: length of the token sequence.
        encoder_width: width of the encoder's transformer.
        encoder_depth: its blocks.
        encoder_heads: its attention heads.
        decoder_width: width of the decoder's transformer.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        decoder_patch_size: side of the decoder's patches; None for the encoder's.
        stem_channels: width of convolutional networks on the grid of patches (Xiao et al., 2021,
            arXiv:2106.14881) in place of the linear patch embedding and pixel head, for little
            data; None in the published models.
        stem_blocks: residual blocks of these networks.
    """

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 32,
        encoder_width: int = 512,
        encoder_depth: int = 8,
        encoder_heads: int = 8,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 8,
        decoder_patch_size: int | None = None,
        stem_channels: int | None = None,
        stem_blocks: int = 2,
    ):
        super().__init__()
        decoder_patch_size = decoder_patch_size or patch_size
        for name, patch in (("patch_size", patch_size), ("decoder_patch_size", decoder_patch_size)):
            if image_size % patch:
                raise UserError(
                    f"TiTok: image_size {image_size} must be divisible by {name} {patch}"
                )
        self.image_size = (image_size, image_size)
        self.spec = TokenSpec.ids((num_latent_tokens,), quantizer.vocab_size)
        self.latent_tokens = _embedding(num_latent_tokens, encoder_width)
        self.encoder = Encoder(
            _patch_embedding(encoder_width, patch_size, stem_channels, stem_blocks),
            quantizer.dim,
            width=encoder_width,
            depth=encoder_depth,
            num_heads=encoder_heads,
            num_patches=(image_size // patch_size) ** 2,
            num_latents=num_latent_tokens,
        )
        self.decoder = Decoder(
            quantizer.dim,
            _pixel_head(decoder_width, decoder_patch_size, stem_channels, stem_blocks),
            width=decoder_width,
            depth=decoder_depth,
            num_heads=decoder_heads,
            num_patches=(image_size // decoder_patch_size) ** 2,
            num_latents=num_latent_tokens,
        )
        self.apply(_initialise)
        self.quantizer = quantizer

    def to_latents(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k d"]:
        return self.encoder(images, self.latent_tokens)

    def to_images(self, latents: Float[Tensor, "b k d"]) -> Float[Tensor, "b 3 h w"]:
        return self.decoder(latents)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.head.conv_out.weight


class ViT(nn.Module):
    """The transformer over [class token, patches row by row, latents] on either side."""

    def __init__(self, width: int, depth: int, num_heads: int, num_patches: int, num_latents: int):
        super().__init__()
        self.num_patches = num_patches
        self.class_embedding = _embedding(1, width)
        self.positional_embedding = _embedding(1 + num_patches, width)
        self.latent_token_positional_embedding = _embedding(num_latents, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)

    def transform(
        self, patches: Float[Tensor, "b n w"], latents: Float[Tensor, "b k w"]
    ) -> tuple[Float[Tensor, "b n w"], Float[Tensor, "b k w"]]:
        """Return the patch rows and the latent rows after the last block."""
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        grid = torch.cat([class_token, patches], dim=1) + self.positional_embedding
        latents = latents + self.latent_token_positional_embedding
        x = self.ln_pre(torch.cat([grid, latents], dim=1))
        for block in self.transformer:
            x = block(x)
        return x[:, 1 : 1 + self.num_patches], x[:, 1 + self.num_patches :]


class Encoder(ViT):
    """Reads an image into the latent tokens."""

    def __init__(self, patch_embed: nn.Module, dim: int, width: int, **transformer: int):
        super().__init__(width, **transformer)
        self.patch_embed = patch_embed
        self.proj_out = nn.Linear(width, dim)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], latent_tokens: Float[Tensor, "k width"]
    ) -> Float[Tensor, "b k d"]:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        _, latents = self.transform(patches, latent_tokens.expand(len(images), -1, -1))
        return self.proj_out(self.ln_post(latents))


class Decoder(ViT):
    """Fills a grid of copies of one mask token from the latents."""

    def __init__(self, dim: int, head: nn.Module, width: int, **transformer: int):
        super().__init__(width, **transformer)
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = _embedding(1, width)
        self.head = head

    def forward(self, latents: Float[Tensor, "b k d"]) -> Float[Tensor, "b 3 h w"]:
        masked = self.mask_token.expand(len(latents), self.num_patches, -1)
        patches, _ = self.transform(masked, self.decoder_embed(latents))
        side = math.isqrt(self.num_patches)
        return self.head(self.ln_post(patches).transpose(1, 2).unflatten(2, (side, side)))


class PixelHead(nn.Module):
    """Maps each feature to a square of pixels and smooths the seams by one convolution."""

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(width, 3 * patch_size**2, 1)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, features: Float[Tensor, "b c gh gw"]) -> Float[Tensor, "b 3 h w"]:
        # Published weights order a patch's channels as (y, x, colour); pixel_shuffle wants the
        # colour first.
        patches = self.proj(features).unflatten(1, (-1, 3)).transpose(1, 2).flatten(1, 2)
        return self.conv_out(F.pixel_shuffle(patches, self.patch_size))


def _patch_embedding(
    width: int, patch_size: int, stem_channels: int | None, stem_blocks: int
) -> nn.Module:
    if stem_channels is None:
        return nn.Conv2d(3, width, patch_size, stride=patch_size)
    return conv.Encoder([stem_channels], width, stem_blocks, False, patch_size=patch_size)


def _pixel_head(
    width: int, patch_size: int, stem_channels: int | None, stem_blocks: int
) -> nn.Module:
    if stem_channels is None:
        return PixelHead(width, patch_size)
    return conv.Decoder([stem_channels], width, stem_blocks, False, patch_size=patch_size)


def _embedding(length: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(length, width) * width**-0.5)


def _initialise(module: nn.Module) -> None:
    """Weights N(0, 0.02) and biases zero, except the attention's input projections: Xavier."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, SelfAttention):
        nn.init.xavier_uniform_(module.in_proj.weight)
