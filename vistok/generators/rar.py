"""RAR (Yu et al., 2024, arXiv:2411.00776): autoregression learned in random orders, then in one.

Each row is told which position it is to predict, so that one model learns all orders; the share of
images seen in a random one falls to zero along the training. A first row without content and the
class come before the tokens. Class and index of a row, but not what it holds, modulate every block
(Peebles and Xie, 2022, arXiv:2212.09748), so that decoding knows these modulations beforehand.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.decoding.orders import Order
from vistok.decoding.plans import Pass, Plan
from vistok.generators.base import Generator, GeneratorOutput
from vistok.generators.conditions import ClassCondition
from vistok.heads.categorical import CategoricalHead
from vistok.layers.adaln import AdaLNBlock
from vistok.layers.cache import KVCache
from vistok.layers.linear import Linear
from vistok.models import register_to_config
from vistok.tokens import TokenSpec

CONDITION_ROWS = 2
EPS = 1e-6  # of all layer norms
# Modulations are made for so many rows at once, if they stay within so many numbers in all.
AHEAD, MOST_AHEAD = 64, 2**26


class RARBlock(AdaLNBlock):
    """A block that in training modulates itself."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, dropout: float):
        super().__init__(dim, num_heads, hidden_dim, dropout, partial(nn.LayerNorm, eps=EPS))
        self.modulation = Linear(dim, 6 * dim, bias=True)

    def forward(
        self, x: Float[Tensor, "b r d"], by_row: Float[Tensor, "b r d"], **attention
    ) -> Float[Tensor, "b r d"]:
        """`by_row` says what each row is modulated by."""
        return self.modulated(x, self.modulation(by_row), **attention)


@dataclass
class DecodingState:
    """Keys and values, and modulations (depth, rows, classes, 6 d) of the rows from `begin` on;
    `head` holds those of the head. `row` says which class each sequence is of."""

    cache: KVCache
    begin: int = 0
    classes: Int64[Tensor, "u"] | None = None
    row: Int64[Tensor, "b"] | None = None
    blocks: Float[Tensor, "l r u d6"] | None = None
    head: Float[Tensor, "r u d2"] | None = None

    def reset(self) -> None:
        self.cache.reset()
        self.classes = None

    def keep(self, batch: int) -> None:
        self.cache.keep(batch)
        self.classes = None


class RAR(Generator):
    """Args:
    spec: tokens to model; ids of any shape.
    class_names: names of the classes, in the order of their labels.
    dim, depth, num_heads: width, blocks and heads of the transformer.
    hidden_dim: width of the feed-forward layers; None for 4 dim.
    dropout: of attention weights and of attention and feed-forward outputs, in training.
    condition_dropout: probability with which training replaces a class by the null class.
    anneal_start, anneal_end: fractions of the training between which the share of images in a
        random order falls from 1 to 0; the others are in raster order.

    The published sizes (dim, depth, hidden_dim): B 768, 24, 3072; L 1024, 24, 4096; XL 1280, 32,
    5120; XXL 1408, 40, 6144.

    Decodes in any order of one token a pass, of which training ends with raster. The published
    settings of sampling are spelt so in a `Decoding`: guidance w with power p as
    `power_cosine(1,w,p)`, where a power of 0 is a constant w; the temperature as it is.
    """

    _no_split_modules: ClassVar = ["RARBlock"]

    @register_to_config
    def __init__(
        self,
        spec: TokenSpec,
        class_names: list[str],
        dim: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        hidden_dim: int | None = None,
        dropout: float = 0.1,
        condition_dropout: float = 0.1,
        anneal_start: float = 0.5,
        anneal_end: float = 0.75,
    ):
        super().__init__()
        self.check_spec(spec)
        self.check_heads(dim, num_heads)
        self.spec, self.class_names = spec, tuple(class_names)
        self.condition_dropout = condition_dropout
        self.anneal_start, self.anneal_end = anneal_start, anneal_end
        # A tensor, for a number would have torch.compile start anew whenever it changes.
        self.register_buffer("random_share", torch.ones(()), persistent=False)
        n = spec.num_tokens
        self.condition = ClassCondition(len(class_names), dim)
        self.token_embedding = nn.Embedding(spec.vocab_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embedding = nn.Parameter(torch.randn(CONDITION_ROWS + n, dim) * 0.02)
        self.target_embedding = nn.Parameter(torch.randn(n, dim) * 0.02)
        # The last token of an order predicts nothing and is not fed.
        self.index_embedding = nn.Parameter(torch.randn(CONDITION_ROWS + n - 1, dim) * 0.02)
        self.blocks = nn.ModuleList(
            RARBlock(dim, num_heads, hidden_dim or 4 * dim, dropout) for _ in range(depth)
        )
        self.head_modulation = Linear(dim, 2 * dim, bias=True)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # Unmodulated, a block begins as the identity.
                std = 0.0 if name.endswith("modulation") else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.head = CategoricalHead(dim, spec.vocab_size, bias=True)

    def plan(self, order: Order | None = None) -> Plan:
        order = order or Order("raster")
        if not any(fitting.startswith(order.name) for fitting in self.orders):
            raise self.refusal(order)
        return order(self.spec.shape, CONDITION_ROWS)

    @property
    def orders(self) -> list[str]:
        grid = ["diagonal"] if len(self.spec.shape) == 2 else []
        return ["raster", *grid, "random(seed)"]

    def set_progress(self, fraction: float) -> None:
        """Set the share of images in a random order to that of the fraction of the training."""
        if self.anneal_start < fraction < self.anneal_end:
            share = (self.anneal_end - fraction) / (self.anneal_end - self.anneal_start)
        else:
            share = float(fraction <= self.anneal_start)
        self.random_share.fill_(share)

    def random_orders(self, batch: int) -> Int64[Tensor, "{batch} n"]:
        """Return an order for each image: a random one for `random_share` of them, or raster."""
        n, device = self.spec.num_tokens, self.random_share.device
        shuffled = torch.rand(batch, n, device=device).argsort(dim=1)
        is_random = torch.rand(batch, 1, device=device) < self.random_share
        return torch.where(is_random, shuffled, torch.arange(n, device=device))

    def forward(
        self, tokens: Int64[Tensor, "b *shape"], condition: Int64[Tensor, "b"]
    ) -> GeneratorOutput:
        """Cross-entropy over all positions; outside training in raster order."""
        condition = self.some_null(condition)
        orders = self.random_orders(len(tokens)) if self.training else None
        hidden = self.teacher_forced(tokens, condition, orders)
        target = tokens.flatten(1)
        if orders is not None:
            target = target.gather(1, orders)
        return GeneratorOutput(self.head.loss(hidden, target).mean())

    def teacher_forced(
        self,
        tokens: Int64[Tensor, "b *shape"],
        condition: Int64[Tensor, "b"],
        orders: Int64[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Return the hidden states that predict each image's tokens, in its order (None: as they
        are numbered), given those before."""
        self.spec.check(tokens, type(self).__name__)
        if orders is None:
            orders = torch.arange(self.spec.num_tokens, device=tokens.device)[None]
        fed = tokens.flatten(1).gather(1, orders.expand(len(tokens), -1))[:, :-1]
        x = self.embed(fed, orders[:, :-1], orders, condition)
        by_row = F.silu(self.condition(condition) + self.index_embedding)
        for block in self.blocks:
            x = block(x, by_row, is_causal=True)
        return self.predictive(x[:, 1:], self.head_modulation(by_row[:, 1:]))

    def embed(
        self,
        tokens: Int64[Tensor, "b t"],
        cells: Int64[Tensor, "*any t"],
        targets: Int64[Tensor, "*any s"],
        condition: Int64[Tensor, "b"] | None,
    ) -> Float[Tensor, "b r d"]:
        """Return the rows of a class, if any, and of tokens at `cells`, of which the last ones are
        to predict the positions `targets`."""
        x = self.token_embedding(tokens) + self.position_embedding[CONDITION_ROWS + cells]
        if condition is not None:
            first = torch.cat(
                [self.cls_token.expand(len(condition), -1, -1), self.condition(condition)], dim=1
            )
            x = torch.cat([first + self.position_embedding[:CONDITION_ROWS], x], dim=1)
        targets = self.target_embedding[targets]
        return x + F.pad(targets, (0, 0, x.shape[1] - targets.shape[-2], 0))

    def predictive(
        self, hidden: Float[Tensor, "b s d"], modulation: Float[Tensor, "b s d2"]
    ) -> Float[Tensor, "b s d"]:
        """Return what the head makes predictions from; scale comes before shift here."""
        scale, shift = modulation.chunk(2, dim=-1)
        return F.layer_norm(hidden, hidden.shape[-1:], eps=EPS) * (1 + scale) + shift

    def new_state(self, rows: int, plan: Plan) -> DecodingState:
        attention = self.blocks[0].attention
        sizes = (attention.num_heads, plan.length, attention.head_dim)
        return DecodingState(KVCache(len(self.blocks), rows, *sizes, self.dtype, self.device))

    def step(
        self,
        tokens: Int64[Tensor, "b n"],
        condition: Int64[Tensor, "b"],
        fed: Pass,
        state: DecodingState,
    ) -> Float[Tensor, "b 1 d"]:
        begins = len(fed.condition) > 0
        blocks, head = self.modulations(condition, fed.rows, state)
        hidden = self.transformer(
            self.embed(
                tokens[:, fed.tokens], fed.cells, fed.predict, condition if begins else None
            ),
            blocks,
            mask=fed.mask,
            cache=state.cache,
        )
        state.cache.advance(fed.rows)
        return self.predictive(hidden[:, -1:], head[:, -1:])

    def modulations(
        self, condition: Int64[Tensor, "b"], rows: int, state: DecodingState
    ) -> tuple[Float[Tensor, "l b r d6"], Float[Tensor, "b r d2"]]:
        """Return the modulations of the next rows of each block and of the head. They are made for
        many rows at a time and for each class once: those of the null class serve all images."""
        index = state.cache.filled
        if state.classes is None:
            state.classes, state.row = condition.unique(return_inverse=True)
            state.blocks = None
        if state.blocks is None or index + rows > state.begin + state.blocks.shape[1]:
            width = self.blocks[0].modulation.out_features
            fitting = MOST_AHEAD // (len(self.blocks) * len(state.classes) * width)
            ahead = slice(index, index + min(max(fitting, CONDITION_ROWS), AHEAD))
            by_row = F.silu(self.index_embedding[ahead, None] + self.condition(state.classes)[:, 0])
            state.blocks = torch.stack([block.modulation(by_row) for block in self.blocks])
            state.head, state.begin = self.head_modulation(by_row), index
        at = slice(index - state.begin, index - state.begin + rows)
        blocks = state.blocks[:, at].index_select(2, state.row).transpose(1, 2)
        return blocks, state.head[at].index_select(1, state.row).transpose(0, 1)

    def transformer(
        self, x: Float[Tensor, "b r d"], modulations: Float[Tensor, "l b r d6"], **attention
    ) -> Float[Tensor, "b r d"]:
        for layer, block in enumerate(self.blocks):
            x = block.modulated(x, modulations[layer], layer=layer, **attention)
        return x

    def compile_decoding(self, **options) -> None:
        # The visible prefix grows by a row a pass: one graph of dynamic length serves them all.
        self.transformer = torch.compile(self.transformer, dynamic=True, **options)
