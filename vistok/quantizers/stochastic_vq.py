"""Stochastic vector quantization (LARP: Wang et al., 2024, arXiv:2410.21264): a code is drawn, the
likelier the nearer it is."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.decoding.sampling import Sampling, sample_categorical
from vistok.models import register_to_config
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
        return self._draw(self._similarities(latents), uniform)

    def _choose(self, similarities: Float[Tensor, "*positions k"]) -> Int64[Tensor, "*positions"]:
        if not self.training:
            return super()._choose(similarities)
        uniform = torch.rand(similarities.shape[:-1], device=similarities.device)
        return self._draw(similarities, uniform)

    def _draw(self, similarities: Tensor, uniform: Tensor) -> Tensor:
        return sample_categorical(similarities.detach(), uniform, self.sampling)
