"""The Gaussian bottleneck of a variational autoencoder (Kingma and Welling, 2013,
arXiv:1312.6114): latents stay continuous and cost their divergence from the unit Gaussian."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, Quantizer
from vistok.tokens import TokenSpec

LOG_VARIANCE = (-30.0, 20.0)  # beyond which it is clamped


class Gaussian(Quantizer):
    """Mean and log-variance of each latent, side by side, to a draw in training and to the mean in
    eval. The tokens are the latents.

    Args:
        dim: channels of a latent; `in_dim` is twice as many.
        kl: weight of the divergence, summed over the latents of an image.
    """

    draws = True
    vocab_size = None

    @register_to_config
    def __init__(self, dim: int, kl: float = 1e-6):
        super().__init__()
        self.dim = dim
        self.kl = kl

    @property
    def in_dim(self) -> int:
        return 2 * self.dim

    def spec(self, shape: Sequence[int], ordered: bool = False) -> TokenSpec:
        return TokenSpec.latents(tuple(shape), self.dim, ordered)

    def forward(self, latents: Float[Tensor, "b *positions m"]) -> Quantized:
        drawn = self.encode(latents, sample=self.training)
        return Quantized(drawn, drawn.detach(), self.losses(latents))

    def losses(self, latents: Float[Tensor, "b *positions m"]) -> dict[str, Tensor]:
        """Return the divergence of an image, a mean over the batch, by its weight."""
        return {"kl": self.kl * self.divergence(latents).flatten(1).sum(1).mean()}

    def encode(
        self,
        latents: Float[Tensor, "b *positions m"],
        sample: bool = False,
        noise: Float[Tensor, "b *positions d"] | None = None,
    ) -> Float[Tensor, "b *positions d"]:
        """Return the means or, with `sample`, draws, for which standard normals `noise` may be
        given."""
        mean, log_variance = self.moments(latents)
        if not sample:
            return mean
        noise = torch.randn_like(mean) if noise is None else noise
        return mean + (0.5 * log_variance).exp() * noise

    def decode(self, ids: Float[Tensor, "b *positions d"]) -> Float[Tensor, "b *positions d"]:
        return ids

    def divergence(self, latents: Float[Tensor, "b *positions m"]) -> Float[Tensor, "b *positions"]:
        """Return the Kullback-Leibler divergence of each latent from the unit Gaussian, in nats."""
        mean, log_variance = self.moments(latents)
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)

    def moments(
        self, latents: Float[Tensor, "b *positions m"]
    ) -> tuple[Float[Tensor, "b *positions d"], Float[Tensor, "b *positions d"]]:
        """Return mean and log-variance, float32."""
        mean, log_variance = latents.float().chunk(2, dim=-1)
        return mean, log_variance.clamp(*LOG_VARIANCE)
