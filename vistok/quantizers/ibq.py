"""Index backpropagation quantization (IBQ: Shi et al., 2024, arXiv:2412.02692): the gradient of a
code passes through the probabilities of all codes, so that large codebooks learn as one."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.losses.entropy import assignment_entropies
from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, code_statistics
from vistok.quantizers.codebook import Codebook, largest


class IBQ(Codebook):
    """Replaces each latent by the codebook row with which its dot product is largest.

    Training holds the dot products of all latents with all codes: 1 GB for 1024 latents and 262144
    codes.

    Args:
        vocab_size: rows of the codebook.
        dim: channels of a latent.
        joint: weight of the loss that pulls latents and, by their probabilities, all codes to each
            other.
        commitment: weight of the loss that pulls latents to their codes.
        codebook_weight: weight of the loss that pulls codes to their latents.
        entropy: weight of E[H(p)] - H(E[p]), p the softmax of the dot products divided by
            `entropy_temperature`; 0.05 in the published models.
        entropy_temperature: see `entropy`.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        joint: float = 1.0,
        commitment: float = 1.0,
        codebook_weight: float = 0.25,
        entropy: float = 0.0,
        entropy_temperature: float = 0.01,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.dim = dim
        self.joint = joint
        self.commitment = commitment
        self.codebook_weight = codebook_weight
        self.entropy = entropy
        self.entropy_temperature = entropy_temperature
        self.embedding = nn.Embedding(vocab_size, dim)

    def forward(self, latents: Float[Tensor, "*positions d"]) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents, codes = latents.float(), self._codes()
            logits = F.linear(latents, codes) if self.training else None
            if logits is None:
                ids = self._choose(latents, codes)
            else:
                ids = logits.detach().max(-1).indices
            chosen = quantised = F.embedding(ids, codes)
            losses = self._losses(latents, chosen, codes)
            if logits is not None:
                # Numerically nothing, whose gradient is that of the one-hot code taken for soft.
                expected = logits.softmax(-1) @ codes.detach()
                quantised = chosen + (expected - expected.detach())
                if self.entropy > 0:
                    of_each, of_mean = assignment_entropies(logits / self.entropy_temperature)
                    losses["entropy"] = self.entropy * (of_each - of_mean)
            losses["joint"] = self.joint * F.mse_loss(latents, quantised)
        return Quantized(quantised, ids, losses, *code_statistics(ids, self.vocab_size))

    def _nearest(self, latents: Tensor, codes: Tensor) -> Int64[Tensor, "*positions"]:
        return largest(latents, codes, torch.zeros_like(codes[:, 0]))

    def _codes(self) -> Float[Tensor, "k d"]:
        return self.embedding.weight.float()
