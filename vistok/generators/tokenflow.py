"""TokenFlow's generator (Qu et al., 2024, arXiv:2412.03069, section 3.3): a Llama (Touvron et al.,
2023, arXiv:2307.09288) that predicts the codes of a `MultiScale` quantizer scale by scale.

The condition is a prefix, whose last row predicts the one token of the first scale. Every other
position has a row that is fed what the scales before tell of it, the running sum of their codes
blown up to its scale, and that sees the prefix, the coarser scales and the whole of its own. The
tokens of a scale are drawn independently; a correction feeds their rows the sum with their own
codes and draws them again, knowing each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.decoding.plans import Pass, Plan
from vistok.errors import IncompatibleTokensError, UserError
from vistok.generators.base import GeneratorOutput
from vistok.generators.conditions import (
    CaptionCondition,
    ClassCondition,
    Condition,
    PromptCondition,
)
from vistok.generators.llamagen import hide_padding
from vistok.generators.next_scale import NextScale
from vistok.heads.categorical import CategoricalHead
from vistok.layers.cache import KVCache
from vistok.layers.linear import Linear
from vistok.layers.norms import RMSNorm
from vistok.layers.pyramid import resized
from vistok.layers.rotary import rotary_table
from vistok.layers.transformer import Block, swiglu_width
from vistok.models import register_to_config
from vistok.quantizers import MultiScale
from vistok.tokens import TokenSpec


@dataclass
class DecodingState:
    """Keys and values, and the sum of the codes of the scales before the last one fed, blown up to
    it. The rows of that are not counted yet: those of its corrections take their places for the
    time being, as finer scales see a scale as it was fed at first."""

    cache: KVCache
    sums: Float[Tensor, "b _ _ c"] | None = None
    first: Float[Tensor, "l two b h r d"] | None = None  # while corrections stand in the cache

    def reset(self) -> None:
        self.cache.reset()
        self.sums = self.first = None

    def begin(self, fed: Pass) -> None:
        """Make room for the rows of a pass: in place of the last scale, or behind it."""
        last = self.cache.memory.narrow(4, self.cache.filled, len(fed.tokens))
        if fed.correction == 1:
            self.first = last.clone()
        elif not fed.correction:
            if self.first is not None:
                last.copy_(self.first)
                self.first = None
            self.cache.advance(len(fed.tokens))

    def keep(self, batch: int) -> None:
        self.cache.keep(batch)
        self.sums = None if self.sums is None else self.sums[:batch]


class PostNormBlock(Block):
    """x + norm(attention(x)), then x + norm(feed_forward(x)): the branches are normalised where
    they end."""

    def forward(self, x: Float[Tensor, "b r d"], *args, **kwargs) -> Float[Tensor, "b r d"]:
        x = x + self.attention_norm(self.attention(x, *args, **kwargs))
        return x + self.feed_forward_norm(self.feed_forward(x))


class NextScaleLlama(NextScale):
    """Args:
    spec: tokens to model; ids of scales, of which the first is one token.
    class_names: names of the classes, in the order of their labels.
    codes: the tokenizer's quantizer, which says what tokens stand for; None until `take_codes`.
    dim, depth, num_heads, num_kv_heads: width, blocks and heads of the transformer.
    hidden_dim: width of the feed-forward layers; None is Llama's two thirds of 4 dim.
    dropout: of attention and feed-forward outputs, in training.
    condition_dropout: probability with which training replaces a condition by the null condition.
    rope_base: of the rotary frequencies, along prefix and scales as one sequence.
    norm_eps: of the norms but those of queries and keys, whose eps is 1e-6.
    caption_dim: channels of caption features, for models that read these.
    caption_length: rows of a caption or prompt.
    text_vocab_size: number of ids of text, for models that read these, the last that of padding.
        They learn texts and images as one vocabulary.
    start_ids, end_ids: ids between a prompt and the image, and after the image.
    null_ids: ids of the null prompt.

    The published model, from prompts, of Llama-2-7B's sizes, is sampled with these settings of a
    `Decoding`, of which the guidance is (1 + 7.5 r) from the first scale, r = 0, to the last, 1:

    | published | passes | plan | guidance | top_k | top_p |
    |---|---|---|---|---|---|
    | [600] [0.6] | 9 | next_scale | linear(1,8.5) | 600 | 0.6 |
    | [1200, 1] [0.8, 0] | 17 | next_scale(1) | linear(1,8.5) | 1200/1 | 0.8/1 |
    | [1200, 100, 1] [0.8, 0.8, 0] | 25 | next_scale(2) | linear(1,8.5) | 1200/100/1 | 0.8/0.8/1 |
    """

    _no_split_modules: ClassVar = ["PostNormBlock"]

    @register_to_config
    def __init__(
        self,
        spec: TokenSpec,
        class_names: list[str],
        codes: MultiScale | None = None,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        condition_dropout: float = 0.1,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        caption_dim: int | None = None,
        caption_length: int = 128,
        text_vocab_size: int | None = None,
        start_ids: Sequence[int] = (),
        end_ids: Sequence[int] = (),
        null_ids: Sequence[int] = (),
    ):
        super().__init__()
        self.check_spec(spec)
        self.check_heads(dim, num_heads)
        self.check_heads(num_heads, num_kv_heads or num_heads)
        self.spec, self.class_names = spec, tuple(class_names)
        self.sizes = tuple(height * width for height, width in spec.shape)
        if self.sizes[0] != 1 or len(self.sizes) == 1:
            raise IncompatibleTokensError(
                f"NextScaleLlama predicts scales from one token on, not {spec}: choose a tokenizer "
                "whose first scale is 1x1, and not the last"
            )
        if text_vocab_size is None and any((start_ids, end_ids, null_ids)):
            raise UserError("NextScaleLlama: start_ids, end_ids and null_ids need text_vocab_size")
        if text_vocab_size is not None and caption_dim is not None:
            raise UserError("NextScaleLlama: give either text_vocab_size or caption_dim")
        self.condition_dropout = condition_dropout
        self.text_head = None
        if text_vocab_size is not None:
            prompts = (text_vocab_size, caption_length, dim, start_ids, null_ids)
            self.condition = PromptCondition(*prompts)
            self.text_head = CategoricalHead(dim, text_vocab_size)
        elif caption_dim is not None:
            self.condition = CaptionCondition(caption_dim, caption_length, dim)
        else:
            self.condition = ClassCondition(len(class_names), dim)
        ends = torch.tensor(list(end_ids)).long()
        self.register_buffer("end_ids", ends, persistent=False)
        self.scale_embedding = nn.Embedding(len(self.sizes), dim)
        self.position_table = nn.Parameter(torch.empty(spec.num_tokens, dim))
        sizes = (num_heads, num_kv_heads or num_heads, hidden_dim or swiglu_width(dim), dropout)
        norm = partial(RMSNorm, eps=norm_eps)
        self.blocks = nn.ModuleList(
            PostNormBlock(dim, *sizes, norm, qk_norm=partial(RMSNorm, eps=1e-6))
            for _ in range(depth)
        )
        self.norm = norm(dim)
        length = self.condition.rows + spec.num_tokens + len(ends)
        rotary = rotary_table((length,), dim // num_heads, rope_base)
        self.register_buffer("rotary", rotary, persistent=False)
        self.apply(initialise)
        for table in (self.scale_embedding.weight, self.position_table):
            nn.init.trunc_normal_(table, std=(3 * dim) ** -0.5)
        self.head = CategoricalHead(dim, spec.vocab_size)
        if codes is not None:
            self.adopt(codes)

    def code_layers(self, dim: int) -> nn.Sequential:
        width = self.position_table.shape[1]
        layers = Linear(dim, width, bias=True), nn.GELU(), Linear(width, width, bias=True)
        return nn.Sequential(*layers).apply(initialise)

    def forward(self, tokens: Int64[Tensor, "b *n"], condition: Condition) -> GeneratorOutput:
        """Cross-entropy over all positions, given the true scales before. Models of prompts predict
        the ids after the image, too, and all of them among the ids of texts and images."""
        condition = self.some_null(condition)
        if self.text_head is None:
            loss = self.head.loss(self.teacher_forced(tokens, condition), tokens)
            return GeneratorOutput(loss.mean())
        logits = self.joint_logits(self.teacher_forced(tokens, condition, len(self.end_ids)))
        ends = self.end_ids.expand(len(tokens), -1)
        targets = torch.cat([tokens + self.condition.num_embeddings, ends], dim=1)
        return GeneratorOutput(F.cross_entropy(logits.transpose(1, 2), targets))

    def joint_logits(self, hidden: Float[Tensor, "b s d"]) -> Float[Tensor, "b s v"]:
        """Return the logits of all ids of texts and then of all of images."""
        return torch.cat([self.text_head.logits(hidden), self.head.logits(hidden)], dim=-1)

    def teacher_forced(
        self, tokens: Int64[Tensor, "b *n"], condition: Condition, ends: int = 0
    ) -> Float[Tensor, "b s d"]:
        """Return the hidden state that predicts each position, given the true scales before, and
        those that predict as many ids after the image as there are `ends`."""
        self.spec.check(tokens, type(self).__name__)
        x, prefix = self.embed(tokens, condition, ends), self.condition.rows
        rows = joined(self.sizes, prefix, ends, x.device)
        mask = rows.block_mask if x.is_cuda else rows.mask
        real = self.condition.real_rows(condition)
        if real is not None:
            mask = hide_padding(rows.mask, real, rows.rows, prefix)
        hidden = self.transformer(x, self.rotary[:, : rows.rows], mask=mask)
        return self.norm(hidden[:, prefix - 1 : prefix - 1 + len(rows.predict)])

    def embed(
        self, tokens: Int64[Tensor, "b n"], condition: Condition, ends: int = 0
    ) -> Float[Tensor, "b r d"]:
        """Return all rows of training: the prefix, the scales but the first, which is the last row
        of the prefix, and, where ids after the image are learned, a row for the first of them and
        those ids."""
        places = torch.arange(1, self.spec.num_tokens, device=tokens.device)
        parts = [self.prefix(condition), self.rows(self.told(tokens), places)]
        if ends:
            after = F.pad(F.embedding(self.end_ids, self.condition.weight), (0, 0, 1, 0))
            parts.append((after + self.scale_embedding.weight[0]).expand(len(tokens), -1, -1))
        return torch.cat(parts, dim=1)

    def prefix(self, condition: Condition) -> Float[Tensor, "b r d"]:
        """Return the rows of the condition, of which the last predicts the first scale."""
        place = F.pad(self.position_table[:1], (0, 0, self.condition.rows - 1, 0))
        return self.condition(condition) + self.scale_embedding.weight[0] + place

    def rows(
        self, vectors: Float[Tensor, "b r c"], places: Int64[Tensor, "r"]
    ) -> Float[Tensor, "b r d"]:
        """Return the rows of positions that are fed these sums of codes."""
        scale = self.plan().to(places.device).rank_of_position[places]
        place = self.scale_embedding(scale) + self.position_table[places]
        return self.code_embed(vectors.to(self.dtype)) + place

    @torch.no_grad()
    def told(self, tokens: Int64[Tensor, "b n"]) -> Float[Tensor, "b _ c"]:
        """Return what the scales before tell of each scale but the first."""
        sums, told = 0.0, []
        for codes, size in zip(self.known_codes.codes(tokens), self.spec.shape[1:], strict=False):
            sums = resized(sums + codes, size, "bicubic")
            told.append(sums.flatten(1, 2))
        return torch.cat(told, dim=1)

    def new_state(self, rows: int, plan: Plan) -> DecodingState:
        attention = self.blocks[0].attention
        length = self.condition.rows - 1 + sum(len(fed.predict) for fed in plan.sets)
        sizes = (attention.num_kv_heads, length, attention.head_dim)
        return DecodingState(KVCache(len(self.blocks), rows, *sizes, self.dtype, self.device))

    def step(
        self, tokens: Int64[Tensor, "b n"], condition: Condition, fed: Pass, state: DecodingState
    ) -> Float[Tensor, "b s d"]:
        cache, prefix = state.cache, self.condition.rows
        if len(fed.tokens):
            state.begin(fed)
            x = self.rows(self.next_told(tokens[:, fed.tokens], fed, state), fed.predict)
        else:
            x = self.prefix(condition)
        end = cache.filled + x.shape[1]
        mask = None
        real = self.condition.real_rows(condition)
        if real is not None:
            causal = None if len(fed.tokens) else real.new_ones(prefix, prefix).tril()
            mask = hide_padding(causal, real, end, prefix)
        hidden = self.transformer(x, self.rotary[:, cache.filled : end], mask=mask, cache=cache)
        if not len(fed.tokens):
            cache.advance(prefix - 1)
        return self.norm(hidden[:, -len(fed.predict) :])

    def next_told(
        self, tokens: Int64[Tensor, "b _"], fed: Pass, state: DecodingState
    ) -> Float[Tensor, "b r c"]:
        """Return what a pass tells its rows: the sums with the codes of the scale that is fed,
        blown up to the next scale unless it is the scale itself that is predicted again."""
        scale = fed.rank[0] if fed.correction else fed.rank[0] - 1
        codes = self.known_codes.quantizer.decode(tokens).unflatten(1, self.spec.shape[scale])
        sums = codes if state.sums is None else state.sums + codes
        if not fed.correction:
            sums = state.sums = resized(sums, self.spec.shape[scale + 1], "bicubic")
        return sums.flatten(1, 2)

    def transformer(
        self, x: Float[Tensor, "b r d"], rotary: Float[Tensor, "2 r hd"], **kwargs
    ) -> Float[Tensor, "b r d"]:
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, layer=layer, **kwargs)
        return x


@torch.compiler.disable  # which would make the rows and their mask anew
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def joined(sizes: tuple[int, ...], prefix: int, ends: int, device: torch.device) -> Pass:
    """Return all rows of training as those of one pass, for the mask of their ranks."""
    scales = [prefix - 1 + t for t, size in enumerate(sizes) for _ in range(size)]
    after = range(scales[-1] + 1, scales[-1] + 1 + (1 + ends if ends else 0))
    rank = [*range(prefix - 1), *scales, *after]
    predicted = range(sum(sizes) + ends)
    return Pass.of(rank, predicted, [[prefix - 1 + row] for row in predicted]).to(device)


def initialise(module: nn.Module) -> None:
    """Draw the weights of a layer."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
