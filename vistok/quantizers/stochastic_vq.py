"""Stochastic vector quantization (LARP: Wang et al., 2024, arXiv:2410.21264): a code is drawn, the
likelier the nearer it is."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.decoding.sampling import Sampling, sample_categorical
from vistok.models import register_to_config
from vistok.quantizers.codebook import similarities
from vistok.quantizers.vq import VQ


class StochasticVQ(VQ):
    """Draws from softmax(similarity / temperature) in training; in eval takes the nearest code.

    The similarity is the cosine on unit vectors, and e.z - |e|^2 / 2 for a code e and a latent z of
    any length.

    Args:
        vocab_size: rows of the codebook.
        dim: channels of a latent.
        temperature: of the draw; 0 takes the nearest code.
        vq: the other arguments of `VQ`.
    """

    @register_to_config
    def __init__(self, vocab_size: int, dim: int, temperature: float = 0.03, **vq):
        super().__init__(vocab_size, dim, **vq)
        self.sampling = Sampling(temperature)

    def encode(
        self,
        latents: Float[Tensor, "*positions d"],
        uniform: Float[Tensor, "*positions"] | None = None,
    ) -> Int64[Tensor, "*positions"]:
        """Return the nearest codes or, given one number in [0, 1) per latent, drawn ones."""
        if uniform is None:
            return super().encode(latents)
        return self._draw(self._normalised(latents), self._codes(), uniform)

    def _choose(self, latents: Tensor, codes: Tensor) -> Int64[Tensor, "*positions"]:
        if not self.training:
            return self._nearest(latents, codes)
        return self._draw(latents, codes, torch.rand(latents.shape[:-1], device=latents.device))

    def _draw(self, latents: Tensor, codes: Tensor, uniform: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            alike = similarities(*self._compared(latents, codes)).detach()
        return sample_categorical(alike, uniform, self.sampling)
