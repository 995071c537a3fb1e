"""LARP, videos as tokens without a place (Wang et al., 2024, arXiv:2410.21264): learned queries
read a clip into tokens, queries of its patches write it from them."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError, suggestion
from vistok.layers.positions import sincos_table
from vistok.layers.vit import TransformerBlock
from vistok.models import register_to_config
from vistok.quantizers import Quantizer
from vistok.tokenizers.base import QuantizedTokenizer


class LARP(QuantizedTokenizer):
    """Videos (B, 3, T, H, W) in [0, 1] to `prod(token_shape)` codes, each about the whole clip.

    Query k is declared to be the k-th cell, in raster order, of the grid `token_shape`, for
    generators that decode a grid (NAR: He et al., 2025, arXiv:2503.10696); the tokenizer itself
    knows no such grid. Any other shape of as many tokens serves the same weights.

    The defaults are the published sizes, with `StochasticVQ(8192, 16)`: 16 frames of 128x128
    pixels, 1024 tokens, 172 M trained parameters.

    Reconstruction and quantizer losses come from here. The rest of the published objective belongs
    to a training loop: L1 and LPIPS of single frames, 0.3 of an adversarial loss, 0.1 of the
    quantizer's losses, and 0.06 of the cross entropy of a small autoregressive prior over the
    codes, which is left behind after training.

    Args:
        quantizer: the codes of a token.
        frames: of a video.
        image_size: pixels of a frame's side, or (height, width).
        patch_size: (frames, height, width) of the encoder's patches.
        decoder_patch_size: the same for the decoder; None for the encoder's.
        token_shape: of the tokens; its product is the number of queries.
        encoder_width: width of the encoder's transformer, a multiple of 4.
        encoder_depth: its blocks.
        encoder_heads: its attention heads.
        decoder_width: width of the decoder's transformer, a multiple of 4.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        learned: which of the tables `encoder_patch`, `encoder_latent_query`, `decoder_latent` and
            `decoder_patch_query` are trained; the others are fixed sines and cosines.
        typed: to which of them one trained vector is added, the same for all rows, which tells
            the rows of the sequence from those of the queries.
        latent_base: base of the frequencies in fixed tables of queries and latents.
    """

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer,
        frames: int = 16,
        image_size: int | Sequence[int] = 128,
        patch_size: Sequence[int] = (4, 8, 8),
        decoder_patch_size: Sequence[int] | None = None,
        token_shape: Sequence[int] = (4, 16, 16),
        encoder_width: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_width: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        learned: Sequence[str] = ("encoder_latent_query",),
        typed: Sequence[str] = ("decoder_patch_query",),
        latent_base: float = 10000.0,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.frames, self.image_size = frames, (height, width)
        self.spec = quantizer.spec(token_shape)
        grid = self._grid(patch_size)
        self.decoder_patch_size = tuple(decoder_patch_size or patch_size)
        self.decoder_grid = self._grid(self.decoder_patch_size)
        queries = torch.arange(self.spec.num_tokens)
        fixed = {
            "encoder_patch": sincos_grid(grid, encoder_width),
            "encoder_latent_query": sincos_table(queries, encoder_width, latent_base),
            "decoder_latent": sincos_table(queries, decoder_width, latent_base),
            "decoder_patch_query": sincos_grid(self.decoder_grid, decoder_width),
        }
        for name in (*learned, *typed):
            if name not in fixed:
                raise UserError(
                    f"LARP: no table '{name}'{suggestion(name, fixed)}; expected one of "
                    f"{', '.join(fixed)}"
                )
        self.tables = nn.ModuleDict(
            {name: EmbeddingTable(fixed[name], name in learned, name in typed) for name in fixed}
        )
        self.patch_embed = nn.Conv3d(3, encoder_width, tuple(patch_size), stride=tuple(patch_size))
        self.encoder = QueryTransformer(encoder_width, encoder_depth, encoder_heads)
        self.proj_out = nn.Linear(encoder_width, quantizer.in_dim)
        self.proj_in = nn.Linear(quantizer.dim, decoder_width)
        self.decoder = QueryTransformer(decoder_width, decoder_depth, decoder_heads)
        self.norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.head = nn.Linear(decoder_width, 3 * math.prod(self.decoder_patch_size))
        self.apply(_initialise)
        self.quantizer = quantizer

    def to_latents(self, videos: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b *positions d"]:
        patches = self.patch_embed(videos).flatten(2).transpose(1, 2)
        patches = patches + self._table("encoder_patch")
        queries = self._table("encoder_latent_query")
        return self.proj_out(self.encoder(patches, queries)).unflatten(1, self.spec.shape)

    def to_images(self, latents: Float[Tensor, "b *positions d"]) -> Float[Tensor, "b 3 t h w"]:
        latents = self.proj_in(latents.flatten(1, -2)) + self._table("decoder_latent")
        patches = self.decoder(latents, self._table("decoder_patch_query"))
        # B (GT GH GW) (PT PH PW 3) -> B 3 (GT PT) (GH PH) (GW PW)
        pixels = self.head(self.norm(patches)).unflatten(2, (*self.decoder_patch_size, 3))
        pixels = pixels.unflatten(1, self.decoder_grid).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return pixels.reshape(-1, *self.input_shape)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.head.weight

    def _table(self, name: str) -> Float[Tensor, "n w"]:
        # Fixed tables stay in float32 when a checkpoint is loaded in half precision.
        return self.tables[name]().to(self.last_layer.dtype)

    def _grid(self, patch_size: Sequence[int]) -> tuple[int, int, int]:
        """Return how many patches fill a video in time, height and width."""
        size = (self.frames, *self.image_size)
        if len(patch_size) != 3 or any(
            n % patch for n, patch in zip(size, patch_size, strict=True)
        ):
            raise UserError(
                f"LARP: {self.frames} frames of {size[1]}x{size[2]} pixels must be divisible by a "
                f"patch's (frames, height, width), got {tuple(patch_size)}"
            )
        return tuple(n // patch for n, patch in zip(size, patch_size, strict=True))


class EmbeddingTable(nn.Module):
    """One row per member of a sequence, `fixed` or `learned`; `typed` adds one vector to all."""

    def __init__(self, fixed: Float[Tensor, "n w"], learned: bool, typed: bool):
        super().__init__()
        if learned:
            self.rows = nn.Parameter(torch.randn_like(fixed) * 0.02)
        else:
            self.register_buffer("rows", fixed, persistent=False)
        self.type_embed = nn.Parameter(torch.randn_like(fixed[:1]) * 0.02) if typed else None

    def forward(self) -> Float[Tensor, "n w"]:
        return self.rows if self.type_embed is None else self.rows + self.type_embed


class QueryTransformer(nn.Module):
    """Answers queries about a sequence, both of which attend to both in every block."""

    def __init__(self, width: int, depth: int, num_heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, qkv_bias=False) for _ in range(depth)
        )

    def forward(
        self, context: Float[Tensor, "b n w"], queries: Float[Tensor, "k w"]
    ) -> Float[Tensor, "b k w"]:
        x = torch.cat([context, queries.expand(len(context), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, context.shape[1] :]


def sincos_grid(grid: tuple[int, int, int], width: int) -> Float[Tensor, "n w"]:
    """Return the fixed table of the cells (frame, row, column) of a grid, columns fastest: the
    column's sines and cosines in the first half and the row's in the second, plus the frame's."""
    if width % 4:
        raise UserError(f"LARP: width {width} must be divisible by 4, for its position tables")
    frames, rows, columns = (torch.arange(n) for n in grid)
    frame, row, column = torch.cartesian_prod(frames, rows, columns).unbind(1)
    place = torch.cat([sincos_table(column, width // 2), sincos_table(row, width // 2)], dim=1)
    return place + sincos_table(frame, width)


def _initialise(module: nn.Module) -> None:
    """Xavier for every matrix, the patch embedding included; biases zero."""
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
