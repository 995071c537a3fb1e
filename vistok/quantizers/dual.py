"""Two codebooks with one index (TokenFlow: Qu et al., 2024, arXiv:2412.03069, section 3.2): a
latent is a semantic and a pixel part, each with a table of its own, and its code is the pair of
rows that is nearest in the sum of both distances."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vistok.models import register_to_config
from vistok.quantizers.vq import VQ


class DualVQ(VQ):
    """A `VQ` whose rows are [semantic | pixel]: two tables side by side, of which each part lies on
    a unit sphere of its own, so that both count alike however many channels they have.

    Args:
        vocab_size: rows of either codebook.
        semantic_dim: channels of the semantic part, which comes first.
        pixel_dim: channels of the pixel part.
        pixel_weight: weight of the pixel part's squared distance beside the semantic part's.
        vq: arguments of `VQ`.
    """

    settled = ("dim", "l2_normalise")

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        semantic_dim: int = 32,
        pixel_dim: int = 8,
        pixel_weight: float = 1.0,
        **vq,
    ):
        self.parts = (semantic_dim, pixel_dim)  # which the parent's constructor already reads
        super().__init__(vocab_size, semantic_dim + pixel_dim, l2_normalise=True, **vq)
        self.pixel_weight = pixel_weight

    def _normalised(self, vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        parts = vectors.float().split(self.parts, dim=-1)
        return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1)

    def _compared(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        if self.pixel_weight == 1:
            return latents, codes
        factors = zip(self.parts, (1.0, self.pixel_weight**0.5), strict=True)
        lengths = torch.cat([codes.new_full((dim,), factor) for dim, factor in factors])
        return latents * lengths, codes * lengths
