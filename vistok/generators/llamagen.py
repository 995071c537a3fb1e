"""LlamaGen (Sun et al., 2024, arXiv:2406.06525): a decoder-only transformer over a tokenizer's ids.

The condition is a prefix: one row for a class, many for a caption; then come the tokens fed so far.
The order of decoding says which row predicts which position. LlamaGen's is raster; any other that
gives one token a row, and PAR's, is an argument.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vistok.decoding.orders import Order
from vistok.decoding.plans import Pass, Plan
from vistok.errors import UserError
from vistok.generators.base import Generator, GeneratorOutput
from vistok.generators.conditions import CaptionCondition, ClassCondition, Condition
from vistok.heads.categorical import CategoricalHead
from vistok.layers.cache import KVCache
from vistok.layers.norms import RMSNorm
from vistok.layers.positions import sincos_table
from vistok.layers.rotary import rotary_table
from vistok.layers.transformer import Block, swiglu_width
from vistok.models import register_to_config
from vistok.tokens import TokenSpec


@dataclass
class DecodingState:
    """What decoding keeps between passes: keys and values, and each pass's rotary factors."""

    cache: KVCache
    rotary: dict[Pass, Float[Tensor, "2 r d"] | None]

    def reset(self) -> None:
        self.cache.reset()
        if any(fed.slots is not None for fed in self.rotary):
            self.cache.clear()

    def keep(self, batch: int) -> None:
        self.cache.keep(batch)


class LlamaGen(Generator):
    """Args:
    spec: tokens to model; ids of a sequence, grid or video.
    class_names: names of the classes, in the order of their labels.
    order: order in which tokens are learned and decoded; see `vistok.Order`. A model of raster
        order decodes by `zipar(s)`, too.
    dim, depth, num_heads, num_kv_heads: width, blocks and heads of the transformer.
    hidden_dim: width of the feed-forward layers; None is Llama's two thirds of 4 dim.
    dropout: on embeddings, attention and feed-forward outputs, in training.
    condition_dropout: probability with which training replaces a condition by the null condition.
    positions: rotary factors at each layer; or a table added to the embeddings, learned or fixed.
    rope_base: of the rotary frequencies.
    norm: RMS norms, or layer norms with biases.
    norm_eps: of these norms.
    qk_norm: RMS norms of queries and keys over each head, too, with an eps of 1e-6.
    caption_dim: channels of caption features; None for class-conditional models.
    caption_length: rows of a caption.

    The published sizes (dim, depth, num_heads): B 768, 12, 12; L 1024, 24, 16; XL 1280, 36, 20;
    XXL 1536, 48, 24; 3B 3200, 24, 32.
    """

    _no_split_modules: ClassVar = ["Block"]
    kinds = ("ids",)
    learned = ("raster", "diagonal", "random", "par")

    @register_to_config
    def __init__(
        self,
        spec: TokenSpec,
        class_names: list[str],
        order: str = "raster",
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.1,
        condition_dropout: float = 0.1,
        positions: Literal["rotary", "learned", "fixed"] = "rotary",
        rope_base: float = 10000.0,
        norm: Literal["rms", "layer"] = "rms",
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        caption_dim: int | None = None,
        caption_length: int = 120,
    ):
        super().__init__()
        self.check_spec(spec)
        if dim % num_heads or num_heads % (num_kv_heads or num_heads):
            raise UserError(
                f"{type(self).__name__}: dim {dim} must be a multiple of num_heads {num_heads}, "
                f"and that of num_kv_heads {num_kv_heads}"
            )
        self.spec, self.class_names, self.order = spec, tuple(class_names), Order(order)
        self.check_order(self.order, spec)
        self.condition_dropout = condition_dropout
        self.condition = (
            ClassCondition(len(class_names), dim)
            if caption_dim is None
            else CaptionCondition(caption_dim, caption_length, dim)
        )
        self.token_embedding = nn.Embedding(spec.vocab_size, dim)
        num_placeholders = self.plan().num_placeholders
        if num_placeholders:
            self.placeholders = nn.Embedding(num_placeholders, dim)
        self.dropout = nn.Dropout(dropout)
        sizes = (num_heads, num_kv_heads or num_heads, hidden_dim or swiglu_width(dim))
        make_norm = partial(RMSNorm if norm == "rms" else nn.LayerNorm, eps=norm_eps)
        qk = partial(RMSNorm, eps=1e-6) if qk_norm else None
        self.blocks = nn.ModuleList(
            Block(dim, *sizes, dropout, make_norm, qk_norm=qk) for _ in range(depth)
        )
        self.norm = make_norm(dim)
        # Rows without a place (the prefix, placeholders) have zeros for an angle: their keys and
        # queries vanish, and they act through their values alone.
        rotary = rotary_table(spec.shape, dim // num_heads, rope_base)
        self.register_buffer("rotary", rotary if positions == "rotary" else None, persistent=False)
        table = sincos_table(torch.arange(self.condition.rows + spec.num_tokens), dim)
        if positions == "learned":
            self.position_table = nn.Parameter(torch.randn_like(table) * 0.02)
        else:
            table = table if positions == "fixed" else None
            self.register_buffer("position_table", table, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head = CategoricalHead(dim, spec.vocab_size)

    def plan(self, order: Order | None = None) -> Plan:
        order = order or self.order
        if order != self.order and order.trained != str(self.order):
            raise self.refusal(order)
        try:
            return order(self.spec.shape, self.condition.rows)
        except UserError as error:
            raise self.refusal(order, f": {error}") from None

    @property
    def orders(self) -> list[str]:
        zips = self.order.name == "raster" and len(self.spec.shape) == 2
        return [str(self.order), *(["zipar(s)"] if zips else [])]

    def forward(
        self,
        tokens: Int64[Tensor, "b *shape"],
        condition: Condition,
        weight: Float[Tensor, "b"] | None = None,
    ) -> GeneratorOutput:
        """Cross-entropy over all positions, every row at once under the plan's mask; `weight`
        counts some images more than others, or not at all."""
        hidden = self.teacher_forced(tokens, self.some_null(condition))
        loss = self.head.loss(hidden, tokens.flatten(1)).mean(1)
        if weight is None:
            return GeneratorOutput(loss.mean())
        return GeneratorOutput(
            (loss * weight).sum() / weight.sum().clamp(min=1 / tokens[0].numel())
        )

    def teacher_forced(
        self, tokens: Int64[Tensor, "b *shape"], condition: Condition
    ) -> Float[Tensor, "b n d"]:
        """Return the hidden state that predicts each position, in the order of the positions, given
        the true tokens that its pass sees."""
        self.spec.check(tokens, type(self).__name__)
        rows = self.plan().to(tokens.device).training
        mask = None if rows.is_causal else rows.mask
        if mask is not None and tokens.is_cuda:
            mask = rows.block_mask
        real = self.condition.real_rows(condition)
        if real is not None:
            mask = hide_padding(rows.mask, real, rows.rows, len(rows.condition))
        hidden = self.transformer(
            self.embed(tokens.flatten(1), condition, rows),
            self.rotary_rows(rows),
            mask=mask,
            is_causal=mask is None,
        )
        return self.predictive(hidden, rows)[:, rows.predict.argsort()]

    def new_state(self, rows: int, plan: Plan) -> DecodingState:
        plan = plan.to(self.device)
        attention = self.blocks[0].attention
        cache = KVCache(
            len(self.blocks),
            rows,
            attention.num_kv_heads,
            plan.length,
            attention.head_dim,
            self.dtype,
            self.device,
        )
        return DecodingState(cache, {fed: self.rotary_rows(fed) for fed in plan.passes})

    def step(
        self,
        tokens: Int64[Tensor, "b n"],
        condition: Condition,
        fed: Pass,
        state: DecodingState,
    ) -> Float[Tensor, "b s d"]:
        cache = state.cache
        end = cache.filled + fed.rows if fed.sees is None else fed.sees.shape[1]
        mask = fed.mask if fed.sees is None else fed.sees
        if mask is not None and mask.shape[1] < end:
            mask = torch.cat([mask.new_ones(fed.rows, cache.filled), mask], dim=1)
        real = self.condition.real_rows(condition)
        if real is not None:
            mask = hide_padding(mask, real, end, len(fed.condition))
        hidden = self.transformer(
            self.embed(tokens, condition, fed),
            # An adaptive window makes up its passes on the way: no plan holds them.
            state.rotary[fed] if fed in state.rotary else self.rotary_rows(fed),
            mask=mask,
            cache=cache,
            slots=fed.slots,
            end=end,
        )
        if fed.slots is None:
            cache.advance(fed.rows)
        return self.predictive(hidden, fed)

    def compile_decoding(self, **options) -> None:
        # The visible prefix grows by a row a pass: one graph of dynamic length serves them all.
        self.transformer = torch.compile(self.transformer, dynamic=True, **options)

    def embed(
        self, tokens: Int64[Tensor, "b n"], condition: Condition, rows: Pass
    ) -> Float[Tensor, "b r d"]:
        parts = []
        if len(rows.condition):
            self.condition.check(condition)
            parts.append(self.condition(condition))
        if len(rows.tokens):
            parts.append(self.token_embedding(tokens[:, rows.tokens]))
        if len(rows.placeholders):
            parts.append(self.placeholders(rows.placeholders).expand(len(tokens), -1, -1))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self.training:
            x = self.dropout(x)
        if self.position_table is None:
            return x
        placed = torch.cat([rows.condition, self.condition.rows + rows.cells])
        table = self.position_table[placed].to(x.dtype)
        return x + nn.functional.pad(table, (0, 0, 0, len(rows.placeholders)))

    def rotary_rows(self, rows: Pass) -> Float[Tensor, "2 r d"] | None:
        """Rotary factors of the rows: zeros without a place, those of its cell for each token."""
        if self.rotary is None:
            return None
        return nn.functional.pad(
            self.rotary[:, rows.cells], (0, 0, len(rows.condition), len(rows.placeholders))
        )

    def transformer(
        self, x: Float[Tensor, "b r d"], rotary: Tensor | None, **kwargs
    ) -> Float[Tensor, "... b r d"]:
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, layer=layer, **kwargs)
        return x

    def predictive(self, hidden: Float[Tensor, "... b r d"], rows: Pass) -> Float[Tensor, "b s e"]:
        """Return what the head makes each prediction from: here the one row that predicts it."""
        return self.norm(hidden if rows.is_aligned else hidden[:, rows.source[:, 0]])


def hide_padding(
    mask: Bool[Tensor, "r end"] | None, real: Bool[Tensor, "b l"], end: int, own: int
) -> Bool[Tensor, "b 1 _ end"]:
    """Hide those of the first `l` keys that are not `real` from all rows but themselves, which are
    among the first `own` rows of the mask."""
    visible = nn.functional.pad(real, (0, end - real.shape[1]), value=True)[:, None, None]
    if mask is None:
        return visible
    itself = torch.eye(*mask.shape, dtype=torch.bool, device=mask.device)
    itself[own:] = False
    return (mask & visible) | itself
