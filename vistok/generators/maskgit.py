"""MaskGIT (Chang et al., 2022, arXiv:2202.04200) as TiTok trains it (Yu et al., 2024,
arXiv:2406.07550): a bidirectional transformer that fills in masked ids.

The class is a row before the tokens, which lie in one sequence whatever their shape. Decoding is
`vistok.decoding.decode_masked`.
"""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vistok.decoding.orders import Order
from vistok.decoding.plans import MaskedPlan
from vistok.generators.base import Generator, GeneratorOutput
from vistok.generators.conditions import ClassCondition
from vistok.heads.categorical import CategoricalHead
from vistok.layers.bert import BertEncoder
from vistok.layers.uvit import UViTEncoder
from vistok.models import register_to_config
from vistok.tokens import TokenSpec


class MaskGIT(Generator):
    """Args:
    spec: tokens to model; ids of any shape.
    class_names: names of the classes, in the order of their labels.
    backbone: BERT, or U-ViT with long skips, which has no dropout and, of an even depth, one block
        more.
    dim, depth, num_heads: width, blocks and heads of the transformer.
    hidden_dim: width of the feed-forward layers; None for 4 dim.
    dropout: of BERT, in training.
    condition_dropout: probability with which training replaces a class by the null class.
    label_smoothing: share of each target that is spread over all codes.
    visible_weight: weight in the loss of tokens that are not masked.

    The published models (backbone, dim, depth, num_heads): bert 768, 24, 16 for TiTok-L-32, TiTok-
    B-64 and One-D-Piece; uvit 1024, 20, 16 for TiTok-S-128.

    The published settings of sampling are spelt so in a `Decoding`, where the guidance scale s is
    null + s (conditional - null) throughout:

    | published | here |
    |---|---|
    | S steps | plan maskgit(S) |
    | guidance w, constant | guidance 1+w |
    | guidance w, linear | guidance linear(1,1+w) |
    | guidance w, power-cosine with power p | guidance power_cosine(1,w,p) |
    | randomize_temperature T | randomness linear(T,0) |
    | softmax_temperature_annealing | temperature linear(1.3,0.5) |
    """

    _no_split_modules: ClassVar = ["BertBlock", "TransformerBlock"]

    @register_to_config
    def __init__(
        self,
        spec: TokenSpec,
        class_names: list[str],
        backbone: Literal["bert", "uvit"] = "bert",
        dim: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        hidden_dim: int | None = None,
        dropout: float = 0.1,
        condition_dropout: float = 0.1,
        label_smoothing: float = 0.1,
        visible_weight: float = 0.1,
    ):
        super().__init__()
        self.check_spec(spec)
        self.check_heads(dim, num_heads)
        self.spec, self.class_names = spec, tuple(class_names)
        self.condition_dropout = condition_dropout
        self.label_smoothing, self.visible_weight = label_smoothing, visible_weight
        self.mask_token = spec.vocab_size
        self.condition = ClassCondition(len(class_names), dim)
        self.token_embedding = nn.Embedding(spec.vocab_size + 1, dim)
        rows = self.condition.rows + spec.num_tokens
        self.position_embedding = nn.Parameter(torch.randn(rows, dim) * 0.02)
        sizes = (dim, depth, num_heads, hidden_dim or 4 * dim)
        if backbone == "bert":
            self.encoder = BertEncoder(*sizes, dropout)
        else:
            self.encoder = UViTEncoder(*sizes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.head = CategoricalHead(dim, spec.vocab_size, bias=True)

    def plan(self, order: Order | None = None) -> MaskedPlan:
        order = order or Order("maskgit(8)")
        if order.name != "maskgit":
            raise self.refusal(order)
        return order(self.spec.shape)

    @property
    def orders(self) -> list[str]:
        return ["maskgit(8)", "maskgit(steps,schedule)"]

    def forward(
        self, tokens: Int64[Tensor, "b *shape"], condition: Int64[Tensor, "b"]
    ) -> GeneratorOutput:
        """Mask a random share of the tokens and predict all."""
        ratios = torch.rand(len(tokens), device=tokens.device)
        order = torch.rand(len(tokens), self.spec.num_tokens, device=tokens.device)
        return self.loss(tokens, self.some_null(condition), random_masks(ratios, order))

    def loss(
        self,
        tokens: Int64[Tensor, "b *shape"],
        condition: Int64[Tensor, "b"],
        masked: Bool[Tensor, "b n"],
    ) -> GeneratorOutput:
        """The cross-entropy of all tokens where `masked` ones are not seen, the others weighing
        `visible_weight`. Also logs the accuracy on masked ones."""
        self.spec.check(tokens, type(self).__name__)
        target = tokens.flatten(1)
        hidden = self.hidden(target.masked_fill(masked, self.mask_token), condition)
        logits = self.head.logits(hidden)
        loss = cross_entropy(
            logits.transpose(1, 2), target, reduction="none", label_smoothing=self.label_smoothing
        )
        weight = torch.where(masked, 1.0, self.visible_weight)
        correct = (logits.argmax(-1) == target) & masked
        accuracy = (correct.sum(1) / masked.sum(1)).mean()
        return GeneratorOutput((loss * weight).sum() / weight.sum(), {"accuracy": accuracy})

    def hidden(
        self, tokens: Int64[Tensor, "b n"], condition: Int64[Tensor, "b"]
    ) -> Float[Tensor, "b n d"]:
        """Return the hidden state of every position; unknown ids are `mask_token`."""
        rows = torch.cat([self.condition(condition), self.token_embedding(tokens)], dim=1)
        return self.encoder(rows + self.position_embedding)[:, self.condition.rows :]

    def compile_decoding(self, **options) -> None:
        self.hidden = torch.compile(self.hidden, **options)


def random_masks(ratios: Float[Tensor, "b"], order: Float[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """Return which tokens of each image to mask, at least one, from uniforms in [0, 1): the
    arccosine of the first says how many, the ranks of the others which."""
    share = torch.arccos(ratios) * (2 / math.pi)
    count = (order.shape[1] * share.clamp(1e-6, 1)).round().clamp(min=1)
    return order.argsort(dim=1) < count[:, None]
