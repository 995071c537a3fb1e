"""Post-training quantisation of continuous latents, number by number (TokenBridge: Wang et al.,
2025, arXiv:2503.16430, section 3.2)."""

import math

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from vistok.decoding.spelling import read_call
from vistok.errors import UserError
from vistok.layers.constant import Constant
from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, code_statistics
from vistok.quantizers.gaussian import Gaussian
from vistok.tokens import TokenSpec


class DimensionWise(Gaussian):
    """Each number of a latent to the nearest of a few fixed levels, the same for all: the means of
    equally likely parts of a normal distribution. Nothing is learned, so that it takes the place of
    the `Gaussian` that a tokenizer was trained with; latents should be of about unit variance.

    Args:
        dim: numbers of a latent; `in_dim`, means and log-variances, is twice as many.
        levels: values that each number can take, at least 2.
        limit: the latents from -limit to limit span the normal distribution, cut off at
            `deviations`; beyond the outermost levels (4.06 by default) they saturate.
        deviations: standard deviations of the normal distribution at `limit`.
        kl: weight of the divergence, as of `Gaussian`, where the tokenizer is trained on.
    """

    @register_to_config
    def __init__(
        self,
        dim: int,
        levels: int = 64,
        limit: float = 5.0,
        deviations: float = 3.0,
        kl: float = 1e-6,
    ):
        super().__init__(dim, kl)
        if levels < 2 or min(limit, deviations) <= 0:
            raise UserError(
                f"DimensionWise: levels {levels} must be at least 2, limit {limit:g} and "
                f"deviations {deviations:g} positive"
            )
        self.levels = levels
        self.vocab_size = levels**dim
        self.limit = limit
        self.deviations = deviations
        _, means = normal_cells(levels, deviations)
        values = (means + deviations) / (2 * deviations) * (2 * limit) - limit
        self.values = Constant(values.tolist())
        self.midpoints = Constant(((means[1:] + means[:-1]) / 2).tolist())

    @classmethod
    def of(cls, spec: TokenSpec) -> "DimensionWise":
        """Return the quantizer whose tokens these are; raise `UserError` for tokens that stand for
        no numbers, or not for such."""
        if spec.kind != "factorised" or spec.values is None or len(set(spec.levels)) != 1:
            raise UserError(
                f"{spec}: expected factorised tokens with one number of levels, of values "
                "normal(limit,deviations), as DimensionWise makes"
            )
        _, numbers = read_call(spec.values, "values", ("normal",))
        try:
            limit, deviations = map(float, numbers)
        except ValueError:
            raise UserError(f"values '{spec.values}': expected normal(limit,deviations)") from None
        return cls(len(spec.levels), spec.levels[0], limit, deviations)

    def spec(self, shape, ordered: bool = False) -> TokenSpec:
        values = f"normal({self.limit:g},{self.deviations:g})"
        return TokenSpec.factorised(tuple(shape), (self.levels,) * self.dim, ordered, values)

    def forward(self, latents: Float[Tensor, "b *positions m"]) -> Quantized:
        values = super().encode(latents, sample=self.training)
        ids = self.quantise(values)
        quantised = self.decode(ids)
        if self.training:
            quantised = values + (quantised - values).detach()
        # Each channel has its own histogram: the mean usage, the geometric mean of perplexities.
        apart = ids + self.levels * torch.arange(self.dim, device=ids.device)
        usage, perplexity, dead = code_statistics(apart, self.levels * self.dim)
        return Quantized(quantised, ids, self.losses(latents), usage, perplexity / self.dim, dead)

    def encode(
        self,
        latents: Float[Tensor, "b *positions m"],
        sample: bool = False,
        noise: Float[Tensor, "b *positions d"] | None = None,
    ) -> Int64[Tensor, "b *positions d"]:
        """Return the levels of the means or, with `sample`, of draws, for which standard normals
        `noise` may be given."""
        return self.quantise(super().encode(latents, sample, noise))

    def quantise(self, values: Float[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
        """Return the nearest level of each number, the lower one of two that are as near."""
        span = 2 * self.limit
        normal = (values.float() + self.limit) / span * (2 * self.deviations) - self.deviations
        return torch.bucketize(normal.contiguous(), self.midpoints())

    def decode(self, ids: Int64[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
        """Return the number that each level stands for."""
        return self.values()[ids]


def normal_cells(
    levels: int, deviations: float
) -> tuple[Float32[Tensor, "bounds"], Float32[Tensor, "levels"]]:
    """Return the bounds, one more than `levels`, of equally likely cells of the standard normal
    distribution, cut off at `deviations`, and the mean of each cell; raise `UserError` if a cell
    lies beyond these."""
    # Published tables came about in this order of types, on the CPU.
    probabilities = torch.arange(levels + 1, dtype=torch.float64, device="cpu") / levels
    bounds = torch.special.ndtri(probabilities).float().clamp(-deviations, deviations)
    density = torch.exp(-bounds.square() / 2) / math.sqrt(2 * math.pi)
    mass = ((1 + torch.erf(bounds / math.sqrt(2))) / 2).diff()
    if not mass.all():
        raise UserError(
            f"DimensionWise: {levels} levels do not fit in {deviations:g} deviations of the normal "
            "distribution: take fewer levels or more deviations"
        )
    return bounds, -density.diff() / mass


def frequency_sums(latents: Float[Tensor, "b h w d"]) -> Float64[Tensor, "2 d"]:
    """Return two sums over the frequencies above 0 of each channel's maps: of power by frequency
    (cycles per latent) and of power. They add up over batches; the one over the other is the
    channel's mean frequency. TokenBridge's head draws channels of low frequencies first."""
    h, w = latents.shape[1:3]
    power = torch.fft.fft2(latents.double(), dim=(1, 2)).abs().square().sum(0)
    power[0, 0] = 0
    rows, columns = (torch.fft.fftfreq(n, device=latents.device).double() for n in (h, w))
    frequency = torch.hypot(rows[:, None], columns[None]).unsqueeze(-1)
    return torch.stack([(power * frequency).sum((0, 1)), power.sum((0, 1))])
