"""ReToK, flexible 1-D tokens with redundant padding (2026, official code of zfu006/ReTok), on the
hybrid tokenizer of GigaTok (Xiong et al., 2025, arXiv:2504.08736), which it is without the padding:
a convolutional encoder, queries that read its grid into a sequence, and the way back."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.layers import conv
from vistok.layers.adaptive_conv import AdaptiveDecoder, DepthToSpace
from vistok.layers.positions import learned_table
from vistok.models import register_to_config
from vistok.quantizers import Quantizer
from vistok.tokenizers.base import TokenizerOutput
from vistok.tokenizers.sequence import Lengths, SequenceTokenizer, TailDrop

QueryInit = Literal["multi-level", "mean", "learned"]
CellInit = Literal["first", "multi-level"]
FeatureLoss = Literal["mse", "cosine"]


class ReTok(SequenceTokenizer):
    """Images to `num_latent_tokens` codes, of which any first ones decode where `tail_drop` is
    given.

    The encoder makes `num_redundant` tokens more, and training drops its tail from all of them: so
    the last of the tokens that count are kept far more often than a tail of their own would be. The
    redundant ones are thrown away afterwards. Without them this is GigaTok.

    The published sizes (width, depth, heads) are tiny 256, 4, 4; small 512, 6, 8; base 768, 12, 12;
    large 1024, 24, 16; xl 1280, 36, 20; xxl 1536, 48, 24. ReTok-S-B has a small encoder and a base
    decoder.

    Args:
        quantizer: the codes of a token.
        image_size: pixels of a side, or (height, width).
        num_latent_tokens: length of the token sequence.
        num_redundant: tokens beyond it, in training and for the encoder's attention.
        tail_drop: what training keeps of all of these; see `TailDrop`. None to keep
            `num_latent_tokens`, which then decode as a whole only.
        query_init: what the encoder's queries start from: means of the grid at rising resolution
            (the number of tokens must be a power of two, and redundant queries repeat the last of
            the others); the mean of the whole grid; or learned rows.
        cell_init: what the decoder's queries, the cells of its grid, start from: the first token,
            as published; or, for few data, the sum of the tokens that `query_init` multi-level
            makes of their place, so that tokens and cells need not first find each other.
        channels: width of the convolutional encoder's first layer, and what the multipliers
            multiply.
        channel_multipliers: width of each level of the encoder, from full resolution down; each
            level but the last halves the resolution.
        decoder_channel_multipliers: the same for the decoder; None for the encoder's.
        num_res_blocks: residual blocks per level; the decoder has one more.
        z_channels: width between the parts.
        latent_std: spread of the latents of new weights, for quantizers that fixed levels bound, as
            FSQ, which would round all of them to one code; None, as published, for others.
        groups: of the group norms.
        patch_size: side of the squares of pixels that become channels before the first level, to
            save the work at full resolution; 1 in the published models.
        adaptive_gn: normalise each level of the decoder by the statistics of its input grid.
        d2s_up: the decoder's resolution rises by depth to space; otherwise by nearest neighbours.
        encoder_width: width of the transformer from grid to tokens.
        encoder_depth: its layers.
        encoder_heads: its attention heads.
        decoder_width: width of the transformer from tokens to grid.
        decoder_depth: its layers.
        decoder_heads: its attention heads.
        alignment_dim: channels of the features to be aligned with a teacher's; None for none.
        distill_depth: the decoder layer, counted from 1, after which they are read off.
        feature_loss: distance of the decoder's grid from the encoder's.
        feature_weight: its weight in training; 0 for none.
    """

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | Sequence[int] = 256,
        num_latent_tokens: int = 256,
        num_redundant: int = 224,
        tail_drop: str | None = None,
        query_init: QueryInit = "multi-level",
        cell_init: CellInit = "first",
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_channel_multipliers: Sequence[int] | None = None,
        num_res_blocks: int = 2,
        z_channels: int = 256,
        latent_std: float | None = None,
        groups: int = 32,
        patch_size: int = 1,
        adaptive_gn: bool = True,
        d2s_up: bool = True,
        encoder_width: int = 512,
        encoder_depth: int = 6,
        encoder_heads: int = 8,
        decoder_width: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        alignment_dim: int | None = None,
        distill_depth: int = 3,
        feature_loss: FeatureLoss = "mse",
        feature_weight: float = 1.0,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        factor = patch_size * 2 ** (len(channel_multipliers) - 1)
        decoder_multipliers = decoder_channel_multipliers or channel_multipliers
        if height % factor or width % factor:
            raise UserError(
                f"ReTok: image_size {height}x{width} must be divisible by {factor}, the side of a "
                f"cell for patch_size {patch_size} and {len(channel_multipliers)} levels"
            )
        if len(decoder_multipliers) != len(channel_multipliers):
            raise UserError(
                f"ReTok: {len(decoder_multipliers)} decoder_channel_multipliers for "
                f"{len(channel_multipliers)} channel_multipliers: the counts must be equal"
            )
        if alignment_dim is not None and not 1 <= distill_depth <= decoder_depth:
            raise UserError(
                f"ReTok: distill_depth {distill_depth} must lie within 1 to decoder_depth "
                f"{decoder_depth}"
            )
        self.image_size = (height, width)
        self.num_latent_tokens = num_latent_tokens
        self.feature_loss, self.feature_weight = feature_loss, feature_weight
        self.spec = quantizer.spec((num_latent_tokens,), ordered=tail_drop is not None)
        if tail_drop is not None:
            self.tail_drop = TailDrop(tail_drop, num_latent_tokens + num_redundant)
        grid = (height // factor, width // factor)
        shared = (z_channels, num_res_blocks, False, 0.0, patch_size)
        self.encoder = conv.Encoder(
            [channels * m for m in channel_multipliers], *shared, channels, groups
        )
        self.to_tokens = GridToTokens(
            z_channels, encoder_width, encoder_depth, encoder_heads, grid,
            num_latent_tokens, num_redundant, query_init,
        )  # fmt: skip
        self.to_grid = TokensToGrid(
            z_channels, decoder_width, decoder_depth, decoder_heads, grid,
            num_latent_tokens, num_redundant, cell_init, alignment_dim, distill_depth,
        )  # fmt: skip
        decoder = AdaptiveDecoder if adaptive_gn else conv.Decoder
        self.decoder = decoder(
            [channels * m for m in decoder_multipliers],
            *shared,
            groups,
            DepthToSpace if d2s_up else conv.Upsample,
        )
        self.apply(_initialise)
        self.quant_proj = nn.Linear(z_channels, quantizer.in_dim)
        if latent_std is not None:
            features_std = 0.02 * encoder_width**0.5  # of a linear map of normalised rows
            nn.init.normal_(self.quant_proj.weight, 0, latent_std / features_std / z_channels**0.5)
        self.quantizer = quantizer
        self.post_quant_proj = nn.Linear(quantizer.dim, z_channels)

    def encode(self, images: Float[Tensor, "b 3 h w"], redundant: bool = False) -> Tensor:
        """Return the tokens; with `redundant` also those that are thrown away otherwise."""
        tokens = super().encode(images)
        return tokens if redundant else tokens[:, : self.num_latent_tokens]

    def statistics(self, images: Float[Tensor, "b 3 h w"]) -> Tensor:
        return super().statistics(images)[:, : self.num_latent_tokens]

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        text: Float[Tensor, "b l c"] | None = None,
        lengths: Lengths | None = None,
    ) -> TokenizerOutput:
        """`lengths` are the tokens to keep, redundant ones included; by default those that
        `tail_drop` draws in training, and without it all but the redundant ones."""
        self.check_images(images)
        features = self.to_features(images.to(self.last_layer.dtype))
        latents = self.quant_proj(self.to_tokens(features))
        result = self.quantizer(latents)
        quantised, kept, share = self.drop_tail(result.quantised, lengths)
        if share is None:
            quantised = quantised[:, : self.num_latent_tokens]
        grid, aligned = self.to_decoder_features(quantised.to(features.dtype), kept)
        losses = dict(result.losses)
        if self.feature_weight > 0:
            losses["feature"] = self.feature_weight * self.feature_distance(features, grid)
        return TokenizerOutput(
            reconstruction=self.to_pixels(grid).float(),
            tokens=result.ids[:, : self.num_latent_tokens],
            losses=losses,
            usage=result.statistics,
            latents=latents.detach(),
            features=aligned,
            kept=share,
        )

    def to_features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c gh gw"]:
        """Return the convolutional encoder's grid."""
        return self.encoder(2 * images - 1)

    def to_latents(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Return the latents of all tokens, redundant ones included."""
        return self.quant_proj(self.to_tokens(self.to_features(images)))

    def to_decoder_features(
        self, latents: Float[Tensor, "b k d"], kept: Bool[Tensor, "b k"] | None = None
    ) -> tuple[Float[Tensor, "b c gh gw"], Float[Tensor, "b gh gw a"] | None]:
        """Return the grid for the convolutional decoder, and the features to be aligned."""
        return self.to_grid(self.post_quant_proj(latents), kept)

    def to_pixels(self, features: Float[Tensor, "b c gh gw"]) -> Float[Tensor, "b 3 h w"]:
        """Return images of scale [0, 1], not clamped, from the convolutional decoder."""
        return (self.decoder(features) + 1) / 2

    def to_images(
        self,
        latents: Float[Tensor, "b k d"],
        kept: Bool[Tensor, "b k"] | None = None,
        text: Float[Tensor, "b l c"] | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        return self.to_pixels(self.to_decoder_features(latents, kept)[0])

    def feature_distance(
        self, encoded: Float[Tensor, "b c gh gw"], decoded: Float[Tensor, "b c gh gw"]
    ) -> Float[Tensor, ""]:
        """Return how far the decoder's grid is from the encoder's, which is taken as given."""
        encoded, decoded = encoded.detach().float(), decoded.float()
        if self.feature_loss == "mse":
            return F.mse_loss(decoded, encoded)
        return 1 - F.cosine_similarity(encoded, decoded, dim=1).mean()

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight


class QueryLayer(nn.Module):
    """Queries attend to each other, then to a memory, then pass a feed-forward layer (DETR: Carion
    et al., 2020, arXiv:2005.12872). Positions are added where rows are compared, not to values."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm3 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(
        self,
        queries: Float[Tensor, "b q w"],
        keys: Float[Tensor, "b m w"],
        memory: Float[Tensor, "b m w"],
        query_positions: Float[Tensor, "q w"],
        hidden: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b q w"]:
        """`keys` are the memory with its positions; `hidden` marks rows that none attends to."""
        h = self.norm1(queries)
        placed = h + query_positions
        queries = queries + self.self_attn(placed, placed, h, need_weights=False)[0]
        placed = self.norm2(queries) + query_positions
        queries = queries + self.cross_attn(placed, keys, memory, hidden, need_weights=False)[0]
        return queries + self.linear2(F.gelu(self.linear1(self.norm3(queries))))


class QueryTransformer(nn.Module):
    """Queries that read a memory, either with a learned table of positions."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        depth: int,
        heads: int,
        num_memory: int,
        num_queries: int,
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"ReTok: width {width} must be a multiple of {heads} heads")
        self.ln_pre = nn.LayerNorm(in_channels)
        self.embed = nn.Linear(in_channels, width)
        self.memory_positions = learned_table(num_memory, width)
        self.query_positions = learned_table(num_queries, width)
        self.layers = nn.ModuleList(QueryLayer(width, heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)

    def read(
        self,
        memory: Float[Tensor, "b m w"],
        queries: Float[Tensor, "b q w"],
        layers: nn.ModuleList,
        kept: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b q w"]:
        """Return the queries after `layers`; `kept` marks the rows of memory that count."""
        keys = memory + self.memory_positions[: memory.shape[1]]
        hidden = None if kept is None else ~kept
        for layer in layers:
            queries = layer(queries, keys, memory, self.query_positions, hidden)
        return queries


class GridToTokens(QueryTransformer):
    """Reads the encoder's grid into one row per token, redundant tokens last."""

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        num_tokens: int,
        num_redundant: int,
        query_init: QueryInit,
    ):
        total = num_tokens + num_redundant
        super().__init__(channels, width, depth, heads, grid[0] * grid[1], total)
        if query_init == "multi-level":
            _check_levels(num_tokens, num_redundant, grid)
        self.query_init, self.num_tokens, self.num_redundant = query_init, num_tokens, num_redundant
        if query_init == "learned":
            self.queries = learned_table(total, width)
        else:
            self.global_proj = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, channels)

    def forward(self, features: Float[Tensor, "b c gh gw"]) -> Float[Tensor, "b n c"]:
        memory = self.embed(self.ln_pre(features.flatten(2).transpose(1, 2)))
        queries = self.initial_queries(memory, features.shape[2:])
        return self.proj_out(self.ln_post(self.read(memory, queries, self.layers)))

    def initial_queries(
        self, memory: Float[Tensor, "b m w"], grid: tuple[int, int]
    ) -> Float[Tensor, "b n w"]:
        if self.query_init == "learned":
            return self.queries.expand(len(memory), -1, -1)
        if self.query_init == "mean":
            pooled = memory.mean(1, keepdim=True).expand(-1, self.num_tokens, -1)
        else:
            cells = memory.transpose(1, 2).unflatten(2, grid)
            means = [
                F.avg_pool2d(cells, (grid[0] // rows, grid[1] // columns)).flatten(2)
                for rows, columns in pooled_grids(self.num_tokens)
            ]
            pooled = torch.cat(means, dim=2).transpose(1, 2)
        repeated = pooled[:, self.num_tokens - self.num_redundant :]
        return self.global_proj(torch.cat([pooled, repeated], dim=1))


class TokensToGrid(QueryTransformer):
    """Reads the tokens back into a grid."""

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        num_tokens: int,
        num_redundant: int,
        cell_init: CellInit,
        alignment_dim: int | None,
        distill_depth: int,
    ):
        total = num_tokens + num_redundant
        super().__init__(channels, width, depth, heads, total, grid[0] * grid[1])
        if cell_init == "multi-level":
            _check_levels(num_tokens, num_redundant, grid)
        self.grid, self.num_tokens = grid, num_tokens
        self.cell_init, self.distill_depth = cell_init, distill_depth
        self.alignment = None
        if alignment_dim is not None:
            self.alignment = nn.Sequential(
                nn.Linear(width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, alignment_dim),
            )
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(
        self, tokens: Float[Tensor, "b k c"], kept: Bool[Tensor, "b k"] | None = None
    ) -> tuple[Float[Tensor, "b c gh gw"], Float[Tensor, "b gh gw a"] | None]:
        memory = self.embed(self.ln_pre(tokens))
        cells = self.initial_cells(memory, kept)
        early, late = self.layers[: self.distill_depth], self.layers[self.distill_depth :]
        cells = self.read(memory, cells, early, kept)
        aligned = None
        if self.alignment is not None:
            aligned = self.alignment(cells).unflatten(1, self.grid)
        cells = self.ln_post(self.read(memory, cells, late, kept))
        return self.conv_out(cells.transpose(1, 2).unflatten(2, self.grid)), aligned

    def initial_cells(
        self, memory: Float[Tensor, "b k w"], kept: Bool[Tensor, "b k"] | None
    ) -> Float[Tensor, "b m w"]:
        if self.cell_init == "first":
            return memory[:, :1].expand(-1, len(self.query_positions), -1)
        if kept is not None:
            memory = memory * kept[:, :, None]
        missing = self.num_tokens - memory.shape[1]  # none, or some redundant ones to leave out
        tokens = F.pad(memory, (0, 0, 0, missing)).transpose(1, 2)
        grids = pooled_grids(self.num_tokens)
        means = tokens.split([rows * columns for rows, columns in grids], dim=2)
        cells = sum(
            F.interpolate(mean.unflatten(2, size), self.grid)
            for mean, size in zip(means, grids, strict=True)
        )
        return cells.flatten(2).transpose(1, 2)


def pooled_grids(num_tokens: int) -> list[tuple[int, int]]:
    """Return rows and columns of the grids, coarse to fine, whose cells are `num_tokens`, a power
    of two, in all: (1, 1) twice, (1, 2), (2, 2), (2, 4), ..."""
    levels = range(num_tokens.bit_length() - 1)
    return [(1, 1), *((2 ** (level // 2), 2 ** ((level + 1) // 2)) for level in levels)]


def _check_levels(num_tokens: int, num_redundant: int, grid: tuple[int, int]) -> None:
    if num_tokens < 1 or num_tokens & (num_tokens - 1) or num_redundant > num_tokens:
        raise UserError(
            f"ReTok: {num_tokens} tokens and {num_redundant} redundant ones: query_init "
            "multi-level needs a power of two, and no more redundant tokens than that"
        )
    rows, columns = pooled_grids(num_tokens)[-1]
    if grid[0] % rows or grid[1] % columns:
        raise UserError(
            f"ReTok: a grid of {grid[0]}x{grid[1]} cells cannot be pooled to {rows}x{columns}, as "
            f"{num_tokens} tokens of query_init multi-level need"
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
