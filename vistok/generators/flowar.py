"""FlowAR (Ren et al., 2024, arXiv:2412.15205): latents from coarse to fine, scale by scale, each of
which flows from noise as a whole.

A scale is a square of means over areas of the latents. The trunk is fed the class in place of the
first and, in that of each other, what the scale before tells of it; it sees all scales so far and
all positions of a scale at once. What a head draws the tokens of a scale from is one hidden state
for each; that of FlowAR draws them jointly.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.decoding.orders import Order
from vistok.decoding.plans import Pass, Plan
from vistok.generators.base import Generator, GeneratorOutput
from vistok.generators.conditions import ClassCondition
from vistok.heads import FlowTransformerHead, ValueHead
from vistok.layers.gated_transformer import gated_width
from vistok.layers.gated_trunk import Caches, GatedTrunk
from vistok.layers.linear import Linear
from vistok.layers.pyramid import pyramid, pyramid_coordinates, upscaled
from vistok.models import register_to_config
from vistok.tokens import TokenSpec


@dataclass
class DecodingState:
    """Keys and values, and what the classes modulate each block by."""

    cache: Caches
    modulations: list[Float[Tensor, "b 1 6 d"]] | None = None

    def reset(self) -> None:
        self.cache.reset()
        self.modulations = None

    def keep(self, batch: int) -> None:
        self.cache.keep(batch)
        self.modulations = self.modulations and [m[:batch] for m in self.modulations]


class FlowAR(Generator):
    """Args:
    spec: tokens to model; latents of a square grid.
    class_names: names of the classes, in the order of their labels.
    head: what models the tokens of a scale given their hidden states; None for
        `FlowTransformerHead()`.
    scales: positions a side of each scale, the last those of the grid.
    dim: width of the trunk.
    depth, num_heads: blocks and heads of its first half.
    decoder_depth, decoder_num_heads: of its second half; None for those of the first.
    hidden_dim: width of the feed-forward layers; None for 8/3 dim.
    dropout: of attention weights and of attention and feed-forward outputs, in training.
    condition_dropout: probability with which training replaces a class by the null class.

    The published sizes:

    | | dim | depth | num_heads | head: width, depth, cross |
    |---|---|---|---|---|
    | S | 768 | 6 | 12 | 1024, 2, false |
    | L | 1024 | 8 | 16 | 1024, 12, true |
    | H | 1536 | 15 | 16 | 1536, 12, true |

    The published settings of sampling are spelt so in a `Decoding`:

    | published | here |
    |---|---|
    | cfg w (S 4.2; L, H 2.4) | guidance linear(1,w) |
    | guidance g (S, L 0.9; H 0.7) | sampler flowar(g) |
    | num_steps n (S, L 25; H 50) | steps n |
    | DiSA from u to l steps | steps linear(u,l), as linear(25,15) |
    """

    kinds = ("latents",)
    learned = ("scales",)
    _no_split_modules: ClassVar = ["GatedBlock"]

    @register_to_config
    def __init__(
        self,
        spec: TokenSpec,
        class_names: list[str],
        head: ValueHead | None = None,
        scales: Sequence[int] = (1, 2, 4, 8, 16),
        dim: int = 768,
        depth: int = 6,
        num_heads: int = 12,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.1,
        condition_dropout: float = 0.1,
    ):
        super().__init__()
        self.check_spec(spec)
        decoder_num_heads = decoder_num_heads or num_heads
        self.check_heads(dim, num_heads)
        self.check_heads(dim, decoder_num_heads)
        self.spec, self.class_names, self.scales = spec, tuple(class_names), tuple(scales)
        self.order = Order(f"scales({','.join(map(str, scales))})")
        self.check_order(self.order, spec)
        self.sizes = [len(fed.predict) for fed in self.plan().passes]
        self.condition_dropout = condition_dropout
        self.condition = ClassCondition(len(class_names), dim)
        self.latent_embed = Linear(spec.dim, dim, bias=True)
        self.trunk = GatedTrunk(
            dim,
            (depth, num_heads),
            (decoder_depth or depth, decoder_num_heads),
            hidden_dim or gated_width(dim),
            dropout,
            pyramid_coordinates(self.scales),
        )
        self.output_position = nn.Parameter(torch.randn(sum(self.sizes), dim) * 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.condition.weight, std=0.02)
        self.head = (head or FlowTransformerHead()).fitted(dim, self.decoded)

    @property
    def decoded(self) -> TokenSpec:
        """All scales, one after another."""
        return TokenSpec.latents(tuple((side, side) for side in self.scales), self.spec.dim)

    def finish(self, decoded: Float[Tensor, "b n c"]) -> Float[Tensor, "b h w c"]:
        """Return the last scale, which is the grid."""
        return decoded[:, -self.sizes[-1] :].unflatten(1, self.spec.shape)

    def plan(self, order: Order | None = None) -> Plan:
        if order not in (None, self.order):
            raise self.refusal(order)
        return self.order(self.spec.shape)

    @property
    def orders(self) -> list[str]:
        return [str(self.order)]

    def forward(
        self, tokens: Float[Tensor, "b h w c"], condition: Int64[Tensor, "b"]
    ) -> GeneratorOutput:
        """The head's loss at all positions of all scales, given the true scales before."""
        self.spec.check(tokens, type(self).__name__)
        scales = pyramid(tokens, self.scales).split(self.sizes, dim=1)
        hidden = self.teacher_forced(scales, self.some_null(condition))
        return self.summed(map(self.head.loss, hidden, scales))

    def summed(self, losses: Iterable[Float[Tensor, "b _"]]) -> GeneratorOutput:
        """Return the loss of the tokens of each scale as one: the sum over those of an image, over
        the number of those of the last scale."""
        return GeneratorOutput(torch.cat([*losses], dim=1).sum(1).mean() / self.sizes[-1])

    def teacher_forced(
        self, scales: Sequence[Float[Tensor, "b _ c"]], condition: Int64[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b _ d"], ...]:
        """Return the hidden states of the positions of each scale, given the scales before."""
        fed = zip((None, *scales[:-1]), self.scales, strict=True)
        x = torch.cat([self.rows(condition, before, side) for before, side in fed], dim=1)
        rank = self.plan().to(x.device).rank_of_position
        places = torch.arange(len(rank), device=x.device)
        hidden = self.trunk(x, places, self.condition(condition), mask=rank <= rank[:, None])
        return (hidden + self.output_position).split(self.sizes, dim=1)

    def rows(
        self,
        condition: Int64[Tensor, "b"],
        before: Float[Tensor, "b _ c"] | None,
        side: int,
    ) -> Float[Tensor, "b {side*side} d"]:
        """Return what the trunk is fed at the positions of a scale: the class or, after the first,
        what the scale `before` tells of it."""
        if before is None:
            return self.condition(condition).expand(-1, side * side, -1)
        # Not under autocast: what an untrained head draws is beyond the range of half precision.
        with torch.autocast(before.device.type, enabled=False):
            return self.latent_embed(upscaled(before, side, self.scales[-1]).to(self.dtype))

    def new_state(self, rows: int, plan: Plan) -> DecodingState:
        return DecodingState(self.trunk.new_caches(rows, sum(self.sizes)))

    def step(
        self,
        tokens: Float[Tensor, "b n c"],
        condition: Int64[Tensor, "b"],
        fed: Pass,
        state: DecodingState,
    ) -> Float[Tensor, "b s d"]:
        places = fed.predict
        before = tokens[:, fed.tokens] if len(fed.tokens) else None
        if state.modulations is None:
            state.modulations = self.trunk.modulations(self.condition(condition))
        x = self.rows(condition, before, isqrt(len(places)))
        hidden = self.trunk(x, places, state.modulations, caches=state.cache)
        state.cache.advance(len(places))
        return hidden + self.output_position[places]

    def compile_decoding(self, **options) -> None:
        # The head is called at every step of every scale, the trunk once a scale. Scales differ in
        # size, and the null half comes and goes: one graph of dynamic sizes serves them all.
        self.head.compile(dynamic=True, **options)
