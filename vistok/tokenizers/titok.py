"""TiTok, images as short 1-D sequences (Yu et al., 2024, arXiv:2406.07550), in single-stage form
(Kim et al., 2025, arXiv:2501.07730): the decoder regresses pixels. The latter's TA-TiTok, which
decodes with the help of a caption, and tokens of any length are options."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.layers import conv
from vistok.layers.positions import learned_table, sincos_grid
from vistok.layers.vit import SelfAttention, TransformerBlock
from vistok.models import register_to_config
from vistok.quantizers import Quantizer
from vistok.tokenizers.retok import pooled_grids
from vistok.tokenizers.sequence import SequenceTokenizer, TailDrop


class TiTok(SequenceTokenizer):
    """Images to `num_latent_tokens` tokens, none of which has a place in the image.

    The published sizes (width, depth, heads) are small 512, 8, 8; base 768, 12, 12;
    large 1024, 24, 16.

    Args:
        quantizer: the codes of a latent token, or `Gaussian` for continuous ones.
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
        text_length: rows of the text features that the decoder reads beside the tokens (TA-TiTok);
            None for a decoder without text.
        text_dim: channels of these features.
        tail_drop: how many tokens training keeps, see `TailDrop`; every prefix decodes then. None
            for tokens that decode as a whole.
        start: first weights: `published`, or, for little data and narrow models, `grid`, by which
            latents begin with places in the image; see `ViT.start_on_grid`.
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
        text_length: int | None = None,
        text_dim: int = 768,
        tail_drop: str | None = None,
        start: Literal["published", "grid"] = "published",
    ):
        super().__init__()
        decoder_patch_size = decoder_patch_size or patch_size
        for whole, size, part, count in (
            ("image_size", image_size, "patch_size", patch_size),
            ("image_size", image_size, "decoder_patch_size", decoder_patch_size),
            ("encoder_width", encoder_width, "encoder_heads", encoder_heads),
            ("decoder_width", decoder_width, "decoder_heads", decoder_heads),
        ):
            if size % count:
                raise UserError(
                    f"{type(self).__name__}: {whole} {size} must be divisible by {part} {count}"
                )
        if start == "grid" and num_latent_tokens & (num_latent_tokens - 1):
            raise UserError(
                f"{type(self).__name__}: start grid needs num_latent_tokens to be a power of two, "
                f"not {num_latent_tokens}"
            )
        self.image_size = (image_size, image_size)
        self.spec = quantizer.spec((num_latent_tokens,), ordered=tail_drop is not None)
        self.tail_drop = TailDrop(tail_drop, num_latent_tokens) if tail_drop else None
        self.text_shape = None if text_length is None else (text_length, text_dim)
        self.latent_tokens = learned_table(num_latent_tokens, encoder_width)
        self.encoder = Encoder(
            _patch_embedding(encoder_width, patch_size, stem_channels, stem_blocks),
            quantizer.in_dim,
            width=encoder_width,
            depth=encoder_depth,
            num_heads=encoder_heads,
            num_patches=(image_size // patch_size) ** 2,
            num_latents=num_latent_tokens,
        )
        self.decoder = Decoder(
            quantizer.dim,
            _pixel_head(decoder_width, decoder_patch_size, stem_channels, stem_blocks),
            self.text_shape,
            width=decoder_width,
            depth=decoder_depth,
            num_heads=decoder_heads,
            num_patches=(image_size // decoder_patch_size) ** 2,
            num_latents=num_latent_tokens,
        )
        self.apply(initialise)
        if start == "grid":
            self.encoder.start_on_grid(ordered=tail_drop is not None)
            self.decoder.start_on_grid(ordered=tail_drop is not None)
        self.quantizer = quantizer

    def to_latents(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k d"]:
        return self.encoder.proj_out(self.encoder(images, self.latent_tokens))

    def to_images(
        self,
        latents: Float[Tensor, "b k d"],
        kept: Bool[Tensor, "b k"] | None = None,
        text: Float[Tensor, "b l c"] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        return self.decoder(latents, kept, text)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.head.conv_out.weight


class ViT(nn.Module):
    """The transformer over [class token, patches row by row, latents, more] on either side."""

    def __init__(self, width: int, depth: int, num_heads: int, num_patches: int, num_latents: int):
        super().__init__()
        self.num_patches = num_patches
        self.class_embedding = learned_table(1, width)
        self.positional_embedding = learned_table(1 + num_patches, width)
        self.latent_token_positional_embedding = learned_table(num_latents, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)

    def transform(
        self,
        patches: Float[Tensor, "b n w"],
        latents: Float[Tensor, "b k w"],
        rows: slice,
        more: Float[Tensor, "b l w"] | None = None,
        kept: Bool[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b m w"]:
        """Return `rows` of the sequence after the last block and the last norm. Of the latents, all
        but the `kept` ones are ignored, which is the same as leaving them out."""
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        grid = torch.cat([class_token, patches], dim=1) + self.positional_embedding
        latents = latents + self.latent_token_positional_embedding[: latents.shape[1]]
        parts = [grid, latents] if more is None else [grid, latents, more]
        x = self.ln_pre(torch.cat(parts, dim=1))
        visible = None
        if kept is not None:
            first = grid.shape[1]
            after = x.shape[1] - first - kept.shape[1]
            visible = F.pad(kept, (first, after), value=True)
        *blocks, last = self.transformer
        for block in blocks:
            x = block(x, visible=visible)
        return self.ln_post(last(x, rows, visible))

    @torch.no_grad()
    def start_on_grid(self, ordered: bool) -> None:
        """Give patches and latents places, so that attention finds the way between them: patches
        have sines and cosines (after mimetic initialisation: Trockman and Kolter, 2023,
        arXiv:2305.09828), a latent the mean of those of an area. Areas tile the image once, or
        where latents are `ordered` once on each level, coarse to fine.

        Without it a small model has to find out which latent is to hold what, and draws the mean
        colour for tens of thousands of images. Weights keep the scale of their input here, where
        the published N(0, 0.02) of a narrow layer hardly passes anything on.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        num_latents, width = self.latent_token_positional_embedding.shape
        side = math.isqrt(self.num_patches)
        places = sincos_grid(side, side, width).permute(2, 0, 1)
        places = places - places.mean((1, 2), keepdim=True)
        levels = pooled_grids(num_latents) if ordered else pooled_grids(2 * num_latents)[-1:]
        areas = [F.adaptive_avg_pool2d(places, level).flatten(1) for level in levels]
        self.positional_embedding[1:] = places.flatten(1).T
        self.latent_token_positional_embedding.copy_(torch.cat(areas, dim=1).T)


class Encoder(ViT):
    """Reads an image into the latent tokens; `proj_out` is left to the tokenizer."""

    def __init__(self, patch_embed: nn.Module, dim: int, width: int, **transformer: int):
        super().__init__(width, **transformer)
        self.patch_embed = patch_embed
        self.proj_out = nn.Linear(width, dim)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], latent_tokens: Float[Tensor, "k width"]
    ) -> Float[Tensor, "b k width"]:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        latents = latent_tokens.expand(len(images), -1, -1)
        return self.transform(patches, latents, slice(1 + self.num_patches, None))


class Decoder(ViT):
    """Fills a grid of copies of one mask token from the latents, and from text where
    `text_shape`, its (length, channels), is given."""

    def __init__(
        self,
        dim: int,
        head: nn.Module,
        text_shape: tuple[int, int] | None,
        width: int,
        **transformer: int,
    ):
        super().__init__(width, **transformer)
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = learned_table(1, width)
        self.reads_text = text_shape is not None
        if text_shape is not None:
            length, channels = text_shape
            self.text_guidance_proj = nn.Linear(channels, width)
            self.text_guidance_positional_embedding = learned_table(length, width)
        self.head = head

    def forward(
        self,
        latents: Float[Tensor, "b k d"],
        kept: Bool[Tensor, "b k"] | None = None,
        text: Float[Tensor, "b l c"] | None = None,
    ) -> Float[Tensor, "b out h w"]:
        masked = self.mask_token.expand(len(latents), self.num_patches, -1)
        latents = self.decoder_embed(latents)
        guidance = None
        if self.reads_text:
            guidance = self.text_guidance_proj(text.to(latents.dtype))
            guidance = guidance + self.text_guidance_positional_embedding
        rows = slice(1, 1 + self.num_patches)
        patches = self.transform(masked, latents, rows, guidance, kept)
        side = math.isqrt(self.num_patches)
        return self.head(patches.transpose(1, 2).unflatten(2, (side, side)))


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


def initialise(module: nn.Module) -> None:
    """Weights N(0, 0.02) and biases zero, except the attention's input projections: Xavier."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, SelfAttention):
        nn.init.xavier_uniform_(module.in_proj.weight)
