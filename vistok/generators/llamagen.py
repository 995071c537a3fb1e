"""LlamaGen (Sun et al., 2024, arXiv:2406.06525): a decoder-only transformer over a tokenizer's ids.

The class is a one-row prefix; each row predicts the id of the next position in raster order. Rotary
positions follow the tokens' shape: one axis for sequences, two for grids.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.decoding.plans import Pass, Plan, raster
from vistok.errors import UserError
from vistok.generators.base import Generator, GeneratorOutput
from vistok.heads.categorical import CategoricalHead
from vistok.layers.cache import KVCache
from vistok.layers.norms import RMSNorm
from vistok.layers.rotary import rotary_table
from vistok.layers.transformer import Block, swiglu_width
from vistok.models import register_to_config
from vistok.tokens import TokenSpec


class LlamaGen(Generator):
    """Args:
    spec: tokens to model; ids of a sequence or grid.
    class_names: names of the classes, in the order of their labels.
    dim, depth, num_heads, num_kv_heads: width, blocks and heads of the transformer.
    hidden_dim: width of the feed-forward layers; None is Llama's two thirds of 4 dim.
    dropout: on embeddings, attention and feed-forward outputs, in training.
    condition_dropout: probability with which training replaces a class by the null class.
    """

    _no_split_modules: ClassVar = ["Block"]
    kinds = ("ids",)

    @register_to_config
    def __init__(
        self,
        spec: TokenSpec,
        class_names: list[str],
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.1,
        condition_dropout: float = 0.1,
        rope_base: float = 10000.0,
    ):
        super().__init__()
        self.check_spec(spec)
        if dim % num_heads or num_heads % (num_kv_heads or num_heads):
            raise UserError(
                f"LlamaGen: dim {dim} must be a multiple of num_heads {num_heads}, and that of "
                f"num_kv_heads {num_kv_heads}"
            )
        self.spec, self.class_names = spec, tuple(class_names)
        self.condition_dropout = condition_dropout
        num_kv_heads = num_kv_heads or num_heads
        hidden_dim = hidden_dim or swiglu_width(dim)

        self.class_embedding = nn.Embedding(len(class_names) + 1, dim)  # the last one is null
        self.token_embedding = nn.Embedding(spec.vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, num_kv_heads, hidden_dim, dropout) for _ in range(depth)
        )
        self.norm = RMSNorm(dim, eps=1e-5)
        # Prefix rows hold zeros instead of an angle: their keys vanish, and the prefix acts through
        # its values alone.
        self.register_buffer(
            "rotary", rotary_table(spec.shape, dim // num_heads, rope_base), persistent=False
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head = CategoricalHead(dim, spec.vocab_size)

    def plan(self) -> Plan:
        return raster(self.spec.shape)

    def null_condition(self, condition: Int64[Tensor, "b"]) -> Int64[Tensor, "b"]:
        return torch.full_like(condition, len(self.class_names))

    def forward(
        self, tokens: Int64[Tensor, "b *shape"], condition: Int64[Tensor, "b"]
    ) -> GeneratorOutput:
        """Cross-entropy over all positions, every row at once under the plan's mask."""
        self.spec.check(tokens, type(self).__name__)
        tokens = tokens.flatten(1)
        if self.training:
            dropped = torch.rand(condition.shape, device=condition.device) < self.condition_dropout
            condition = torch.where(dropped, self.null_condition(condition), condition)
        rows = self.plan().to(tokens.device).training
        hidden = self.transformer(
            self.embed(tokens, condition, rows),
            self.positions(rows),
            mask=None if rows.is_causal else rows.mask,
            is_causal=rows.is_causal,
        )
        loss = self.head.loss(rows.gather(self.norm(hidden)), tokens[:, rows.predict])
        return GeneratorOutput(loss.mean())

    def new_state(self, rows: int, plan: Plan) -> KVCache:
        attention = self.blocks[0].attention
        return KVCache(
            len(self.blocks),
            rows,
            attention.num_kv_heads,
            plan.rows,
            attention.head_dim,
            self.dtype,
            self.device,
        )

    def step(
        self,
        tokens: Int64[Tensor, "b n"],
        condition: Int64[Tensor, "b"],
        fed: Pass,
        state: KVCache,
    ) -> Float[Tensor, "b s d"]:
        mask = fed.mask
        if mask is not None and state.filled:
            mask = torch.cat([mask.new_ones(fed.rows, state.filled), mask], dim=1)
        hidden = self.transformer(
            self.embed(tokens, condition, fed), self.positions(fed), mask=mask, cache=state
        )
        state.advance(fed.rows)
        return self.norm(fed.gather(hidden))

    def compile_decoding(self, **options) -> None:
        # The visible prefix grows by a row a pass: one graph of dynamic length serves them all.
        self.transformer = torch.compile(self.transformer, dynamic=True, **options)

    def embed(
        self, tokens: Int64[Tensor, "b n"], condition: Int64[Tensor, "b"], rows: Pass
    ) -> Float[Tensor, "b r d"]:
        parts = []
        if len(rows.condition):
            parts.append(self.class_embedding(condition)[:, None])
        if len(rows.tokens):
            parts.append(self.token_embedding(tokens[:, rows.tokens]))
        return self.dropout(torch.cat(parts, dim=1))

    def positions(self, rows: Pass) -> Float[Tensor, "r pairs 2"]:
        """Rotary entries of the rows: zeros for the prefix, its own cell for each token."""
        prefix = self.rotary.new_zeros(len(rows.condition), *self.rotary.shape[1:])
        return torch.cat([prefix, self.rotary[rows.tokens]])

    def transformer(self, x: Float[Tensor, "b r d"], rotary: Tensor, **kwargs) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, layer=layer, **kwargs)
        return x
