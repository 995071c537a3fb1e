"""VAR (Tian et al., 2024, arXiv:2404.02905): a whole scale of tokens a pass, coarse to fine.

The tokens of a scale add to those before: what is known of an image is always one map, the sum of
the scales so far. Its means over the areas of the next scale are what that scale is predicted from,
all positions at once; rows see their own scale and the coarser ones. The first scale is predicted
from the class, which also modulates every block (Peebles and Xie, 2022, arXiv:2212.09748).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.decoding.plans import Pass, Plan
from vistok.generators.base import GeneratorOutput
from vistok.generators.conditions import ClassCondition
from vistok.generators.next_scale import NextScale
from vistok.heads.categorical import CategoricalHead
from vistok.layers.cache import KVCache
from vistok.layers.cosine_transformer import CosineBlock, Modulation, modulated
from vistok.layers.linear import Linear
from vistok.models import register_to_config
from vistok.quantizers.multi_scale import MultiScale
from vistok.tokens import TokenSpec


@dataclass
class DecodingState:
    """Keys and values, what modulates each block and the head, and the map: the sum of the scales
    that are decoded, before the one that was predicted last. Of that `rows` rows were fed, which
    give way to those of a correction."""

    cache: KVCache
    scale: int = -1
    rows: int = 0
    total: Float[Tensor, "b h w c"] | None = None
    blocks: Sequence[Modulation] | None = None
    head: Modulation | None = None

    def reset(self) -> None:
        self.cache.reset()
        self.scale, self.rows = -1, 0
        self.total = self.blocks = self.head = None

    def keep(self, batch: int) -> None:
        self.cache.keep(batch)
        if self.blocks is not None:
            self.blocks = [tuple(part[:batch] for part in block) for block in self.blocks]
            self.head = tuple(part[:batch] for part in self.head)


class VAR(NextScale):
    """Args:
    spec: tokens to model; ids of scales.
    class_names: names of the classes, in the order of their labels.
    codes: the tokenizer's quantizer, which says what tokens add to the map; None until
        `take_codes`.
    dim, depth, num_heads: width, blocks and heads of the transformer.
    hidden_dim: width of the feed-forward layers; None for 4 dim.
    cosine: attention by cosines of queries and keys, sharpened by a learned factor of each head.
    shared_modulation: one modulation for all blocks, to which each adds a table of its own.
    drop_path: probability with which training leaves out a branch of the last block; it grows
        evenly from 0 at the first.
    condition_dropout: probability with which training replaces a class by the null class.
    gate_gain: factor of the gates at the start.
    norm_eps: of all norms.

    The published sizes, with heads of 64 channels, a width of 64 times the depth, and a drop path
    of depth / 240, but of 0.15 for d36-s:

    | | dim | depth | gate_gain | shared_modulation |
    |---|---|---|---|---|
    | d16 | 1024 | 16 | 1e-3 | false |
    | d20 | 1280 | 20 | 1e-3 | false |
    | d24 | 1536 | 24 | 1e-4 | false |
    | d30 | 1920 | 30 | 1e-5 | false |
    | d36-s, of 512 pixels | 2304 | 36 | 5e-6 | true |

    The published settings of sampling are spelt so in a `Decoding`:

    | published | here |
    |---|---|
    | cfg w (1.5 for the published scores, 4 for pictures) | guidance linear(1,1+w) |
    | top_k 900, top_p 0.96 (0.95 for pictures) | as they are; 0 there is 1 for top_p here |
    | more_smooth | `vistok.generators.smooth.Smooth` |
    """

    _no_split_modules: ClassVar = ["CosineBlock"]

    @register_to_config
    def __init__(
        self,
        spec: TokenSpec,
        class_names: list[str],
        codes: MultiScale | None = None,
        dim: int = 1024,
        depth: int = 16,
        num_heads: int = 16,
        hidden_dim: int | None = None,
        cosine: bool = True,
        shared_modulation: bool = False,
        drop_path: float = 1 / 15,
        condition_dropout: float = 0.1,
        gate_gain: float = 1e-3,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.check_spec(spec)
        self.check_heads(dim, num_heads)
        self.spec, self.class_names, self.eps = spec, tuple(class_names), norm_eps
        self.condition_dropout = condition_dropout
        self.sizes = [height * width for height, width in spec.shape]
        self.ends = [0, *accumulate(self.sizes)]
        self.condition = ClassCondition(len(class_names), dim)
        self.start = nn.Parameter(torch.empty(self.sizes[0], dim))
        self.position = nn.Parameter(torch.empty(spec.num_tokens, dim))
        self.level = nn.Embedding(len(self.sizes), dim)
        self.register_buffer("level_of", self.plan().rank_of_position, persistent=False)
        sizes = (num_heads, hidden_dim or 4 * dim, cosine, shared_modulation)
        self.blocks = nn.ModuleList(
            CosineBlock(dim, *sizes, drop_path * layer / max(1, depth - 1), norm_eps)
            for layer in range(depth)
        )
        self.modulation = Linear(dim, 6 * dim, bias=True) if shared_modulation else None
        self.head_modulation = Linear(dim, 2 * dim, bias=True)
        self._initialise(gate_gain)
        self.head = CategoricalHead(dim, spec.vocab_size, bias=True)
        if codes is not None:
            self.adopt(codes)

    def code_layers(self, dim: int) -> Linear:
        embed = Linear(dim, self.position.shape[1], bias=True)
        self._draw(embed)
        return embed

    def forward(
        self, tokens: Int64[Tensor, "b *shape"], condition: Int64[Tensor, "b"]
    ) -> GeneratorOutput:
        """Cross-entropy over all positions, which count alike whatever their scale."""
        hidden = self.teacher_forced(tokens, self.some_null(condition))
        return GeneratorOutput(self.head.loss(hidden, tokens).mean())

    def teacher_forced(
        self, tokens: Int64[Tensor, "b *shape"], condition: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b n d"]:
        """Return the hidden state that predicts each position, given the true scales before."""
        self.spec.check(tokens, type(self).__name__)
        joint = self.plan().to(tokens.device).joint
        mask = joint.block_mask if tokens.is_cuda else joint.mask
        by, modulation = self.conditioned(condition)
        x = torch.cat([self.first_rows(condition), self.rows(self.told(tokens))], dim=1)
        hidden = self.transformer(x, [by] * len(self.blocks), mask=mask)
        return self.predictive(hidden, modulation)

    @torch.no_grad()
    def told(self, tokens: Int64[Tensor, "b n"]) -> Float[Tensor, "b _ c"]:
        """Return what each scale but the first is predicted from: means of the sum of the scales
        before over its areas."""
        codes, total, means = self.known_codes, 0, []
        with torch.autocast(tokens.device.type, enabled=False):
            for scale, grid in enumerate(codes.codes(tokens)[:-1]):
                total = total + codes.added(grid, scale)
                means.append(codes.shrunk(total, scale + 1).flatten(1, 2))
        return torch.cat(means, dim=1)

    def first_rows(self, condition: Int64[Tensor, "b"]) -> Float[Tensor, "b _ d"]:
        """Return the rows of the first scale, which hold the class."""
        return self.condition(condition) + self.start + self.places(0, len(self.start))

    def rows(
        self, means: Float[Tensor, "b r c"], begin: int | None = None
    ) -> Float[Tensor, "b r d"]:
        """Return the rows of positions from `begin` on, by default from the second scale on."""
        begin = self.sizes[0] if begin is None else begin
        embedded = self.code_embed(means.to(self.dtype))
        return embedded + self.places(begin, begin + means.shape[1])

    def places(self, begin: int, end: int) -> Float[Tensor, "r d"]:
        """Return what tells positions apart, and the scale of each."""
        return self.position[begin:end] + self.level(self.level_of[begin:end])

    def conditioned(
        self, condition: Int64[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b 1 *six d"], Modulation]:
        """Return what blocks are modulated by, and the modulation of the head: factor and shift."""
        by = self.condition(condition)
        scale, shift = self.head_modulation(F.silu(by)).chunk(2, dim=-1)
        if self.modulation is not None:
            by = self.modulation(F.silu(by)).unflatten(-1, (6, -1))
        return by, (1 + scale, shift)

    def transformer(
        self, x: Float[Tensor, "b r d"], by: Sequence[Tensor | Modulation], **attention
    ) -> Float[Tensor, "b r d"]:
        for layer, block in enumerate(self.blocks):
            x = block(x, by[layer], layer=layer, **attention)
        return x

    def predictive(
        self, hidden: Float[Tensor, "b r d"], modulation: Modulation
    ) -> Float[Tensor, "b r d"]:
        """Return what the head makes predictions from."""
        return modulated(hidden, *modulation, self.eps)

    def new_state(self, rows: int, plan: Plan) -> DecodingState:
        attention = self.blocks[0].attention
        length = sum(len(fed.predict) for fed in plan.sets)
        sizes = (attention.num_heads, length, attention.head_dim)
        return DecodingState(KVCache(len(self.blocks), rows, *sizes, self.dtype, self.device))

    def step(
        self,
        tokens: Tensor,
        condition: Int64[Tensor, "b"],
        fed: Pass,
        state: DecodingState,
    ) -> Float[Tensor, "b s d"]:
        """`tokens` may be codes (B, N, c) in place of ids (B, N)."""
        if not fed.correction:
            state.cache.advance(state.rows)
            state.scale, state.rows = state.scale + 1, len(fed.predict)
        if state.blocks is None:
            by, state.head = self.conditioned(condition)
            state.blocks = [block.modulate(by) for block in self.blocks]
        if len(fed.tokens):
            x = self.rows(self.next_told(tokens[:, fed.tokens], fed, state), self.ends[state.scale])
        else:
            x = self.first_rows(condition)
        hidden = self.transformer(x, state.blocks, cache=state.cache)
        return self.predictive(hidden, state.head)

    def next_told(self, tokens: Tensor, fed: Pass, state: DecodingState) -> Float[Tensor, "b r c"]:
        """Return what a pass tells its rows: the means of the map with the scale that is fed. The
        map keeps those that will not be corrected."""
        codes = self.known_codes
        scale = state.scale if fed.correction else state.scale - 1
        with torch.autocast(tokens.device.type, enabled=False):
            vectors = tokens if tokens.ndim == 3 else codes.quantizer.decode(tokens)
            added = codes.added(vectors.unflatten(1, codes.scales[scale]), scale)
            total = added if state.total is None else state.total[: len(tokens)] + added
            if not fed.correction:
                state.total = total
            return codes.shrunk(total, state.scale).flatten(1, 2)

    def _initialise(self, gate_gain: float) -> None:
        for module in self.modules():
            self._draw(module)
        for table in (self.start, self.position):
            nn.init.trunc_normal_(table, std=self._std)
        with torch.no_grad():
            self.head_modulation.weight.mul_(0.5)
            makers = [self.modulation, *(block.modulation for block in self.blocks)]
            tables = [block.modulation_table for block in self.blocks]
            for weight in [m.weight for m in makers if m] + [t for t in tables if t is not None]:
                gates = len(weight) // 3
                weight[:gates].mul_(gate_gain)
                weight[gates:].mul_(0.5)
            for block in self.blocks:
                for weight in (block.attention.out.weight, block.fc2.weight):
                    weight.div_((2 * len(self.blocks)) ** 0.5)

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=self._std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def _std(self) -> float:
        return (3 * self.position.shape[1]) ** -0.5
