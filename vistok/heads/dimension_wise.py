"""The dimension-wise head of TokenBridge (Wang et al., 2025, arXiv:2503.16430): the channels of a
token, each a digit of few levels, are drawn one after another by a small causal transformer.

Its rows are the channels in the order of drawing. The first row holds the condition, a linear map
of the hidden state, each further one the digit drawn before, and each predicts its own digit. The
condition and the step of a row, but not what it holds, modulate every block (Peebles and Xie, 2022,
arXiv:2212.09748): all modulations of a token are one product, made before the first draw.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.decoding.noise import Noise
from vistok.decoding.sampling import Sampling, sample_categorical
from vistok.errors import IncompatibleTokensError, UserError
from vistok.heads.base import PLAIN, ValueHead
from vistok.layers.adaln import AdaLNBlock, zero_linear
from vistok.layers.cache import KVCache
from vistok.layers.linear import Linear
from vistok.models import register_to_config
from vistok.quantizers import DimensionWise
from vistok.tokens import TokenSpec

# The 16 channels of MAR's autoencoder, those of low frequencies first.
FREQUENCY_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
TOKENS_AT_ONCE = 512  # are drawn, for the modulations of each fill up to 2.5 MB


class RowLogits(nn.Module):
    """A linear map of its own for each row."""

    def __init__(self, rows: int, width: int, levels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, levels, width))
        self.bias = nn.Parameter(torch.zeros(rows, levels))
        for weight in self.weight.unbind():
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Float[Tensor, "n r w"], rows: slice) -> Float[Tensor, "n r v"]:
        """`rows` says which ones `x` holds."""
        weight, bias = self.weight[rows].mT, self.bias[rows, None]
        return torch.baddbmm(bias, x.transpose(0, 1), weight).transpose(0, 1)


class DimensionWiseHead(ValueHead):
    """Args:
    width, depth, num_heads: of the transformer.
    hidden_ratio: width of its feed-forward layers over its own.
    order: in which channels are drawn; None for the published one of 16, that of low
        frequencies first, and for that of their numbers elsewhere; `vistok latents` finds the
        one of other autoencoders.
    dropout: of attention weights, of attention outputs and in feed-forward layers, in training.
    norm_eps: of all layer norms.
    sampling_adds_first_step: whether the first row also holds the embedding of its step when
        digits are drawn, but not in training. So the released code does it, and its published
        numbers were reached; heads that are trained here draw as they are trained.
    quantizer: values to digits and back; None for that of the tokens or, for latents, the
        published one, of 64 levels.

    The published sizes (width, depth, num_heads): B 768, 4, 8; L 1024, 4, 8; H 1024, 6, 8.

    Digits are drawn with temperature, top-k and top-p; guidance is of the hidden states. Computes
    in the type of its weights, also under autocast.
    """

    @register_to_config
    def __init__(
        self,
        width: int = 1024,
        depth: int = 4,
        num_heads: int = 8,
        hidden_ratio: float = 4.0,
        order: list[int] | None = None,
        dropout: float = 0.1,
        norm_eps: float = 1e-6,
        sampling_adds_first_step: bool = False,
        quantizer: DimensionWise | None = None,
    ):
        super().__init__()
        if width % num_heads:
            raise UserError(
                f"DimensionWiseHead: width {width} must be a multiple of num_heads {num_heads}"
            )
        self.width, self.depth, self.num_heads = width, depth, num_heads
        self.hidden_width = round(hidden_ratio * width)
        self.order, self.dropout, self.norm_eps = order, dropout, norm_eps
        self.sampling_adds_first_step = sampling_adds_first_step
        self.quantizer = quantizer

    def build(self, hidden_dim: int, spec: TokenSpec) -> None:
        self.quantizer = fitting_quantizer(self.quantizer, spec)
        self.order = fitting_order(self.order, self.quantizer.dim)
        channels, levels = self.quantizer.dim, self.quantizer.levels
        width, norm = self.width, partial(nn.LayerNorm, eps=self.norm_eps)
        self.condition = Linear(hidden_dim, width, bias=True)
        self.digit_embedding = nn.Embedding((channels - 1) * levels, width)
        self.position_embedding = nn.Parameter(torch.randn(channels, width) * 0.02)
        self.step_embedding = nn.Parameter(torch.randn(channels, width) * 0.02)
        self.blocks = nn.ModuleList(
            AdaLNBlock(width, self.num_heads, self.hidden_width, self.dropout, norm)
            for _ in range(self.depth)
        )
        self.norm = norm(width)
        self.digit_logits = RowLogits(channels, width, levels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Six numbers for each block, which begins as the identity, and two for the end.
        self.modulation = zero_linear(width, (6 * self.depth + 2) * width)

    def loss(
        self, hidden: Float[Tensor, "b s d"], target: Float[Tensor, "b s c"]
    ) -> Float[Tensor, "b s"]:
        """Return the cross-entropy of each token's digits, the mean over channels."""
        channels = self.quantizer.quantise(target).flatten(0, 1).unbind(1)
        digits = torch.stack([channels[channel] for channel in self.order], dim=1)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.logits(hidden.flatten(0, 1), digits)
        loss = F.cross_entropy(logits.float().transpose(1, 2), digits, reduction="none")
        return loss.mean(1).view(hidden.shape[:2])

    def logits(
        self, hidden: Float[Tensor, "n d"], digits: Int64[Tensor, "n c"]
    ) -> Float[Tensor, "n c v"]:
        """Return the logits of `digits`, which lie in the order of drawing, given those before."""
        condition, modulations = self.conditioned(hidden)
        begins = self.quantizer.levels * torch.arange(digits.shape[1] - 1, device=digits.device)
        fed = self.digit_embedding(digits[:, :-1] + begins)
        x = torch.cat([condition[:, None], fed], dim=1) + self.position_embedding
        return self.transformer(x, modulations, slice(None), is_causal=True)

    def evaluations(self, sampling: Sampling, budget: int) -> int:
        return self.quantizer.dim

    def draw_noise(
        self, noise: Noise, num_tokens: int, sampling: Sampling = PLAIN, budget: int = 1
    ) -> Float[Tensor, "b n c *v"]:
        return noise.uniform(num_tokens, self.quantizer.dim)

    def sample(
        self,
        hidden: Float[Tensor, "b s d"],
        null: Float[Tensor, "b s d"] | None,
        scale: float,
        noise: Float[Tensor, "b s c *v"],
        sampling: Sampling,
        budget: int = 1,
    ) -> Float[Tensor, "b s c"]:
        if null is not None:
            hidden = torch.lerp(null.float(), hidden.float(), scale)
        parts = (x.flatten(0, 1).split(TOKENS_AT_ONCE) for x in (hidden, noise))
        with torch.autocast(hidden.device.type, enabled=False):
            digits = [self.draw(*part, sampling) for part in zip(*parts, strict=True)]
        return self.quantizer.decode(torch.cat(digits)).unflatten(0, hidden.shape[:2])

    def draw(
        self, hidden: Float[Tensor, "n d"], uniform: Float[Tensor, "n c *v"], sampling: Sampling
    ) -> Int64[Tensor, "n c"]:
        """Return digits in the order of the channels, each drawn by the channel's own number."""
        x, modulations = self.conditioned(hidden)
        if self.sampling_adds_first_step:
            x = x + self.step_embedding[0]
        digits = torch.empty(len(x), len(self.order), dtype=torch.int64, device=x.device)
        sizes = (len(x), self.num_heads, len(self.order), self.width // self.num_heads)
        cache = KVCache(self.depth, *sizes, x.dtype, x.device)
        for row, channel in enumerate(self.order):
            if row > 0:
                begin = (row - 1) * self.quantizer.levels
                x = self.digit_embedding(begin + digits[:, self.order[row - 1]])
            x = (x + self.position_embedding[row])[:, None]
            logits = self.transformer(x, modulations, slice(row, row + 1), cache=cache)
            cache.advance(1)
            digits[:, channel] = sample_categorical(logits[:, 0], uniform[:, channel], sampling)
        return digits

    def conditioned(
        self, hidden: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n w"], Float[Tensor, "n c m"]]:
        """Return the conditions of tokens, and what modulates their rows."""
        condition = self.condition(hidden.to(self.condition.weight.dtype))
        steps = F.silu(condition[:, None] + self.step_embedding)
        return condition, self.modulation(steps)

    def transformer(
        self,
        x: Float[Tensor, "n r w"],
        modulations: Float[Tensor, "n c m"],
        rows: slice,
        **attention,
    ) -> Float[Tensor, "n r v"]:
        """Return what `rows`, embedded as `x`, predict."""
        *by_block, last = modulations[:, rows].split(6 * self.width, dim=-1)
        for layer, (block, modulation) in enumerate(zip(self.blocks, by_block, strict=True)):
            x = block.modulated(x, modulation, layer=layer, **attention)
        scale, shift = last.chunk(2, dim=-1)  # in this order here
        normed = F.layer_norm(self.norm(x), (self.width,), eps=self.norm_eps)
        return self.digit_logits(torch.addcmul(shift, normed, 1 + scale), rows)


def fitting_quantizer(chosen: DimensionWise | None, spec: TokenSpec) -> DimensionWise:
    """Return the quantizer of these tokens, or a `chosen` one; raise `IncompatibleTokensError` if
    it makes others."""
    is_latents, (dim,) = spec.kind == "latents", spec.value_shape
    quantizer = chosen or (DimensionWise(dim) if is_latents else DimensionWise.of(spec))
    made = quantizer.spec(spec.shape, spec.ordered)
    if made != spec and not (is_latents and quantizer.dim == dim):
        raise IncompatibleTokensError(
            f"DimensionWiseHead: its quantizer makes {made}, but it models {spec}: leave it out"
        )
    return quantizer


def fitting_order(chosen: Sequence[int] | None, dim: int) -> tuple[int, ...]:
    """Return an order of `dim` channels; raise `UserError` if the `chosen` one is none."""
    published = FREQUENCY_ORDER if dim == len(FREQUENCY_ORDER) else range(dim)
    order = tuple(published if chosen is None else chosen)
    if sorted(order) != list(range(dim)):
        raise UserError(
            f"DimensionWiseHead: order {list(order)} is no order of the channels 0 to {dim - 1}"
        )
    return order
