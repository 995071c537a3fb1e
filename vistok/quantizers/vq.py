"""Vector quantization with a codebook trained by gradient (van den Oord et al., 2017,
arXiv:1711.00937), on the unit sphere by default (Yu et al., 2021, arXiv:2110.04627)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.layers.processes import mean_of_processes, rows_of_processes
from vistok.losses.entropy import assignment_entropies, entropy_of_mean
from vistok.models import register_to_config
from vistok.quantizers.codebook import Codebook, nearest, similarities

USAGE_DECAY = 0.99


class VQ(Codebook):
    """Replaces each latent by its nearest codebook row.

    Args:
        vocab_size: rows of the codebook.
        dim: channels of a latent.
        l2_normalise: search, losses and output in the space of unit vectors; the stored rows may
            have any length. With "search", only the search.
        commitment: weight of the loss that pulls latents to their codes.
        codebook_weight: weight of the loss that pulls codes to their latents. The first VQGANs
            (Esser et al., 2021, arXiv:2012.09841) exchanged the two weights.
        entropy: weight of E[H(p)] - H(E[p]), p the soft assignment of a latent at
            `entropy_temperature` (Yu et al., 2023, arXiv:2310.05737, eq. 4): confident latents,
            evenly used codes.
        revival: move rarely used codes towards latents at each `update` (Zheng and Vedaldi, 2023,
            arXiv:2307.15139, eq. 4-6).
        rotation: the gradient of a code passes to its latent by the rotation and scaling that takes
            the one to the other (Fifty et al., 2024, arXiv:2410.06424), not unchanged.
        joint: weight of a loss that pulls latents and codes to each other at once.
        orthogonal: weight of the mean squared cosine of two different codes (Shin et al., 2021,
            arXiv:2112.00384).
        diversity: weight of a loss that spreads the codes which a position has in different images:
            the negative entropy of their mean soft assignment, e^(-distance / temperature).
        entropy_temperature: of squared distances.
        diversity_temperature: of distances.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        l2_normalise: bool | Literal["search"] = True,
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        entropy: float = 0.0,
        revival: bool = False,
        rotation: bool = False,
        joint: float = 0.0,
        orthogonal: float = 0.0,
        diversity: float = 0.0,
        entropy_temperature: float = 0.01,
        diversity_temperature: float = 0.01,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.dim = dim
        self.l2_normalise = l2_normalise
        self.commitment = commitment
        self.codebook_weight = codebook_weight
        self.entropy = entropy
        self.revival = revival
        self.rotation = rotation
        self.joint = joint
        self.orthogonal = orthogonal
        self.diversity = diversity
        self.entropy_temperature = entropy_temperature
        self.diversity_temperature = diversity_temperature
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / vocab_size, 1 / vocab_size)
        with torch.no_grad():
            self.embedding.weight.copy_(self._normalised(self.embedding.weight))
        if revival:
            self.register_buffer("embed_prob", torch.zeros(vocab_size))

    @torch.no_grad()
    def update(self, latents: Float[Tensor, "*positions d"]) -> None:
        """Replace each code by a mixture with the latent nearest to it, almost wholly where the
        code is dead, not at all where it has its even share of use."""
        if not self.revival:
            return
        latents = rows_of_processes(latents.detach().float().flatten(0, -2))
        compared, codes = self._compared(self._normalised(latents), self._codes())
        usage = torch.bincount(nearest(compared, codes), minlength=self.vocab_size) / len(latents)
        self.embed_prob.lerp_(usage, 1 - USAGE_DECAY)
        closest = latents[nearest(codes, compared)]
        replaced = torch.exp(-10 * self.embed_prob * self.vocab_size / (1 - USAGE_DECAY) - 1e-3)
        self.embedding.weight.lerp_(closest.to(self.embedding.weight), replaced.unsqueeze(-1))

    def _losses(self, latents: Tensor, quantised: Tensor, codes: Tensor) -> dict[str, Tensor]:
        losses = super()._losses(latents, quantised, codes)
        if self.joint > 0:
            losses["joint"] = self.joint * F.mse_loss(latents, quantised)
        if self.entropy > 0:
            # softmax(-|z - e|^2 / t) is softmax(2 (z.e - |e|^2 / 2) / t): |z|^2 cancels.
            logits = 2 / self.entropy_temperature * similarities(*self._compared(latents, codes))
            of_each, of_mean = assignment_entropies(logits)
            losses["entropy"] = self.entropy * (of_each - of_mean)
        if self.orthogonal > 0:
            losses["orthogonal"] = self.orthogonal * squared_cosine(codes)
        if self.diversity > 0:
            logits = -torch.cdist(latents, codes) / self.diversity_temperature
            losses["diversity"] = -self.diversity * position_entropy(logits.softmax(-1))
        return losses

    def _normalised(self, vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return (
            F.normalize(vectors.float(), dim=-1) if self.l2_normalise is True else vectors.float()
        )

    def _compared(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        if self.l2_normalise == "search":
            return F.normalize(latents, dim=-1), F.normalize(codes, dim=-1)
        return latents, codes

    def _codes(self) -> Float[Tensor, "k d"]:
        return self._normalised(self.embedding.weight)


def squared_cosine(codes: Float[Tensor, "k d"]) -> Float[Tensor, ""]:
    """Return the mean squared cosine of a code with any code, less what is due to itself."""
    unit = F.normalize(codes, dim=-1)
    # The table of k x k cosines and this one of d x d have the same sum of squares.
    return (unit.T @ unit).square().sum() / len(codes) ** 2 - 1 / len(codes)


def position_entropy(p: Float[Tensor, "b *positions k"]) -> Float[Tensor, ""]:
    """Return the entropy of the mean of p over images, those of all processes; a mean over
    positions."""
    mean = mean_of_processes(p.mean(0))
    return entropy_of_mean(mean, clamped=True) / mean[..., 0].numel()
