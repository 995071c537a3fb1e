"""MAR (Li et al., 2024, arXiv:2406.11838): masked autoregression over vectors of numbers, without
a codebook.

As in MAE (He et al., 2021, arXiv:2111.06377) an encoder sees the known tokens alone, behind slots
that the class fills, and a decoder all positions. Each unknown one gets a hidden state, from which
a head models the vector: a diffusion (MAR), a flow, or its digits one by one (TokenBridge:
Wang et al., 2025, arXiv:2503.16430). Decoding is `vistok.decoding.decode_random`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from vistok.decoding.orders import Order
from vistok.decoding.plans import RandomPlan
from vistok.errors import IncompatibleTokensError, UserError
from vistok.generators.base import Generator, GeneratorOutput
from vistok.generators.conditions import ClassCondition
from vistok.heads import DiffusionHead, ValueHead
from vistok.layers.patches import from_patches, to_patches
from vistok.layers.vit import TransformerBlock, take_rows
from vistok.models import register_to_config
from vistok.quantizers import DimensionWise
from vistok.tokens import TokenSpec

DEVIATION = 0.25  # of the mask ratio
TABLES = ("encoder_position", "decoder_position", "output_position")


class MAR(Generator):
    """Args:
    spec: tokens to model; latents, or digits that stand for numbers, of any shape.
    class_names: names of the classes, in the order of their labels.
    head: what models a vector given its hidden state; None for `DiffusionHead()`.
    dim, depth, num_heads: width, blocks and heads of the encoder.
    decoder_dim, decoder_depth, decoder_num_heads: of the decoder; None for those of the encoder.
    mlp_ratio: width of the feed-forward layers over that of their part.
    buffer: slots that the class fills.
    patch_size: side of the squares of a grid that are modelled as one vector.
    dropout: of attention weights, of attention outputs and in feed-forward layers, in training.
    condition_dropout: probability with which training replaces a class by the null class.
    mask_ratio_min: least share of tokens that are masked in training.
    norm_eps: of all layer norms.

    The published sizes:

    | | dim | depth | num_heads | head: width, depth |
    |---|---|---|---|---|
    | MAR-B | 768 | 12 | 12 | DiffusionHead: 1024, 6 |
    | MAR-L | 1024 | 16 | 16 | DiffusionHead: 1280, 8 |
    | MAR-H | 1280 | 20 | 16 | DiffusionHead: 1536, 12 |
    | TokenBridge-L | 1024 | 16 | 16 | DimensionWiseHead: 1024, 4 |
    | TokenBridge-H | 1280 | 20 | 16 | DimensionWiseHead: 1024, 6 |

    The published settings of sampling are spelt so in a `Decoding`; MAR's are 256 iterations,
    guidance 2.9, 3.0 and 3.2 of linear schedule for B, L and H, and 100 steps, or the temperature
    0.95 without guidance:

    | published | here |
    |---|---|
    | num_iter n | plan mar(n) |
    | cfg w, linear | guidance linear(1,w) |
    | cfg w, constant | guidance w |
    | temperature T | temperature T |
    | num_sampling_steps S | steps S |
    | DiSA from u to l steps | plan mar(64), steps linear(u,l), as linear(50,5), sampler ddpm(950) |
    | DiSA, cosine or two-stage | steps cosine(u,l) or two_stage(u,l), sampler ddpm(950) |
    """

    kinds = ("latents", "factorised")
    _no_split_modules: ClassVar = ["TransformerBlock"]

    @register_to_config
    def __init__(
        self,
        spec: TokenSpec,
        class_names: list[str],
        head: ValueHead | None = None,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        buffer: int = 64,
        patch_size: int = 1,
        dropout: float = 0.1,
        condition_dropout: float = 0.1,
        mask_ratio_min: float = 0.7,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.check_spec(spec)
        decoder_dim, decoder_num_heads = decoder_dim or dim, decoder_num_heads or num_heads
        self.check_heads(dim, num_heads)
        self.check_heads(decoder_dim, decoder_num_heads)
        if patch_size > 1 and (len(spec.shape) != 2 or any(n % patch_size for n in spec.shape)):
            raise UserError(f"MAR: patch_size {patch_size} must divide a grid evenly, not {spec}")
        if not (buffer >= 1 and 0 <= mask_ratio_min <= 1):
            raise UserError(
                f"MAR: buffer {buffer} must be at least 1, and mask_ratio_min {mask_ratio_min} "
                "from 0 to 1"
            )
        self.spec, self.class_names = spec, tuple(class_names)
        self.buffer, self.patch_size = buffer, patch_size
        self.condition_dropout, self.mask_ratio_min = condition_dropout, mask_ratio_min
        self.digits = DimensionWise.of(spec) if spec.kind == "factorised" else None
        n, values = self.decoded.num_tokens, self.decoded.dim

        def blocks(width: int, count: int, heads: int) -> nn.ModuleList:
            sizes = {"hidden_width": round(mlp_ratio * width), "dropout": dropout}
            return nn.ModuleList(
                TransformerBlock(width, heads, norm_eps=norm_eps, **sizes) for _ in range(count)
            )

        self.condition = ClassCondition(len(class_names), dim)
        self.encoder_embed = nn.Linear(values, dim)
        self.encoder_position = nn.Parameter(torch.empty(buffer + n, dim))
        self.embed_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.encoder_blocks = blocks(dim, depth, num_heads)
        self.encoder_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_dim))
        self.decoder_position = nn.Parameter(torch.empty(buffer + n, decoder_dim))
        self.decoder_blocks = blocks(decoder_dim, decoder_depth or depth, decoder_num_heads)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=norm_eps)
        self.output_position = nn.Parameter(torch.empty(n, decoder_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.condition.weight, self.mask_token, *map(self.get_parameter, TABLES)):
            nn.init.normal_(table, std=0.02)
        modelled = self.decoded
        if self.digits is not None:
            levels = spec.levels * patch_size**2
            modelled = TokenSpec.factorised(modelled.shape, levels, values=spec.values)
        self.head = (head or DiffusionHead()).fitted(decoder_dim, modelled)

    def check_spec(self, spec: TokenSpec) -> None:
        super().check_spec(spec)
        if spec.kind == "factorised" and spec.values is None:
            raise IncompatibleTokensError(
                f"MAR models digits that stand for numbers, not {spec}: choose a tokenizer whose "
                "quantizer is DimensionWise"
            )

    @property
    def decoded(self) -> TokenSpec:
        """Vectors of numbers, one for each position or square of positions."""
        shape = tuple(n // self.patch_size for n in self.spec.shape)
        return TokenSpec.latents(shape, self.spec.value_shape[0] * self.patch_size**2)

    def plan(self, order: Order | None = None) -> RandomPlan:
        order = order or Order("mar(64)")
        if order.name != "mar":
            raise self.refusal(order)
        return order(self.decoded.shape)

    @property
    def orders(self) -> list[str]:
        return ["mar(64)", "mar(steps)"]

    def values(self, tokens: Tensor) -> Float[Tensor, "b n c"]:
        """Return the vectors of tokens (B, *spec.tensor_shape); those of squares hold each channel
        row by row. `finish` is the inverse."""
        self.spec.check(tokens, type(self).__name__)
        if self.digits is not None:
            tokens = self.digits.decode(tokens)
        if self.patch_size == 1:
            return tokens.flatten(1, -2)
        patches = to_patches(tokens.permute(0, 3, 1, 2), self.patch_size)
        return patches.unflatten(2, (self.patch_size**2, -1)).mT.flatten(2)

    def finish(self, decoded: Float[Tensor, "b *shape c"]) -> Tensor:
        if self.patch_size > 1:
            patches = decoded.flatten(1, 2).unflatten(2, (-1, self.patch_size**2)).mT.flatten(2)
            grid = from_patches(patches, self.decoded.shape, self.patch_size)
            decoded = grid.permute(0, 2, 3, 1)
        return decoded if self.digits is None else self.digits.quantise(decoded)

    def forward(self, tokens: Tensor, condition: Int64[Tensor, "b"]) -> GeneratorOutput:
        """Mask random positions, of all images as many, and predict these."""
        values = self.values(tokens)
        order = torch.rand(values.shape[:2], device=values.device).argsort(dim=1)
        # Drawn by the host, for it decides how many rows there are.
        ratio = mask_ratios(torch.rand((), dtype=torch.float64), self.mask_ratio_min).item()
        count = max(1, math.ceil(values.shape[1] * ratio))
        return self.loss(values, self.some_null(condition), order, count)

    def loss(
        self,
        values: Float[Tensor, "b n c"],
        condition: Int64[Tensor, "b"],
        order: Int64[Tensor, "b n"],
        count: int,
    ) -> GeneratorOutput:
        """The head's loss of the first `count` positions of each image's `order`, given the others;
        the head is asked for these alone."""
        masked, known = order[:, :count], order[:, count:]
        hidden = self.hidden(values, condition, known, masked)
        return GeneratorOutput(self.head.loss(hidden, take_rows(values, masked)).mean())

    def hidden(
        self,
        tokens: Float[Tensor, "b n c"],
        condition: Int64[Tensor, "b"],
        known: Int64[Tensor, "b k"],
        wanted: Int64[Tensor, "b s"],
    ) -> Float[Tensor, "b s d"]:
        """Return the hidden states of the `wanted` positions, given the vectors of the `known`
        ones."""
        encoded = self.encode(tokens, self.condition(condition), known)
        return self.decode(encoded, known, wanted)

    def encode(
        self,
        values: Float[Tensor, "b n c"],
        slots: Float[Tensor, "b _ e"],
        known: Int64[Tensor, "b k"],
    ) -> Float[Tensor, "b r e"]:
        """Return the encoder's rows of the slots and of the `known` positions. `slots` (B, 1 or
        buffer, E) is what all slots hold, or each one."""
        before, after = self.encoder_position.split([self.buffer, len(self.output_position)])
        # Not under autocast: what an untrained head draws is beyond the range of half precision.
        with torch.autocast(values.device.type, enabled=False):
            rows = take_rows(values, known).to(self.encoder_embed.weight.dtype)
            rows = self.encoder_embed(rows) + after[known]
            x = self.embed_norm(torch.cat([slots + before, rows], dim=1))
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(
        self,
        encoded: Float[Tensor, "b r e"],
        known: Int64[Tensor, "b k"],
        wanted: Int64[Tensor, "b s"],
    ) -> Float[Tensor, "b s d"]:
        """Return the decoder's rows of the `wanted` positions, to which alone its last block adds
        anything."""
        slots, seen = self.decoder_embed(encoded).tensor_split([self.buffer], dim=1)
        x = self.mask_token.to(seen.dtype).expand(len(seen), len(self.output_position), -1)
        x = x.scatter(1, known[:, :, None].expand_as(seen), seen)
        x = torch.cat([slots, x], dim=1) + self.decoder_position
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = block(x)
        x = last(x, rows=self.buffer + wanted)
        return self.decoder_norm(x) + self.output_position[wanted]

    def resized(self, shape: Sequence[int]) -> "MAR":
        """Return a copy for tokens of another grid (h, w), between whose positions those of this
        one are interpolated (Harmon: Wu et al., 2025, arXiv:2503.21979)."""
        spec = replace(self.spec, shape=tuple(shape))
        if len(spec.shape) != 2 or len(self.spec.shape) != 2:
            raise UserError(f"MAR: only grids are resized, not {self.spec} to {spec}")
        other = MAR.from_config({**self.arguments, "spec": spec})
        state = self.state_dict()
        for name in TABLES:
            state[name] = resized_table(state[name], self.decoded.shape, other.decoded.shape)
        other.load_state_dict(state)
        return other.to(self.output_position).train(self.training)

    def compile_decoding(self, **options) -> None:
        # Known positions grow and wanted ones vary: one graph of dynamic sizes serves all passes.
        self.hidden = torch.compile(self.hidden, dynamic=True, **options)


def mask_ratios(u: Float64[Tensor, "*b"], least: float) -> Float64[Tensor, "*b"]:
    """Return the quantiles `u` of the share of masked tokens: a normal distribution about 1, cut
    off below `least` and above 1."""
    below = torch.special.ndtr(u.new_tensor((least - 1) / DEVIATION))
    return 1 + DEVIATION * torch.special.ndtri(below + u * (0.5 - below))


def resized_table(
    table: Float[Tensor, "r d"], grid: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "r2 d"]:
    """Return the vectors of the positions of a `new` grid, bilinearly between those of `grid`;
    rows before them, those of slots, stay."""
    slots, positions = table.tensor_split([len(table) - math.prod(grid)])
    image = positions.unflatten(0, grid).permute(2, 0, 1)[None]
    image = F.interpolate(image, new, mode="bilinear", align_corners=False)
    return torch.cat([slots, image[0].flatten(1).mT])
