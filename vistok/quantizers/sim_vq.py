"""A codebook that moves as a whole (SimVQ: Zhu et al., 2024, arXiv:2411.02038): its rows are a
learned linear map of fixed random vectors, so that every code learns from each latent."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.models import register_to_config
from vistok.quantizers.codebook import Codebook


class SimVQ(Codebook):
    """Replaces each latent by the nearest mapped row.

    Args:
        vocab_size: rows of the codebook.
        dim: channels of a latent.
        frozen_dim: channels of the fixed vectors; None for `dim`.
        commitment: weight of the loss that pulls latents to their codes.
        codebook_weight: weight of the loss that pulls codes to their latents.
        rotation: as of `VQ`.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        frozen_dim: int | None = None,
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        rotation: bool = False,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.dim = dim
        self.commitment = commitment
        self.codebook_weight = codebook_weight
        self.rotation = rotation
        frozen_dim = frozen_dim or dim
        frozen = torch.randn(vocab_size, frozen_dim) * frozen_dim**-0.5
        self.register_buffer("frozen_codebook", frozen)
        self.code_transform = nn.Linear(frozen_dim, dim, bias=False)

    def _codes(self) -> Float[Tensor, "k d"]:
        with torch.autocast(self.frozen_codebook.device.type, enabled=False):
            return F.linear(self.frozen_codebook.float(), self.code_transform.weight.float())
