"""Vector quantization with a codebook trained by gradient (van den Oord et al., 2017,
arXiv:1711.00937), on the unit sphere by default (Yu et al., 2021, arXiv:2110.04627)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, Quantizer, code_statistics

USAGE_DECAY = 0.99
ENTROPY_TEMPERATURE = 0.01


class VQ(Quantizer):
    """Replaces each latent by its nearest codebook row.

    Args:
        vocab_size: rows of the codebook.
        dim: channels of a latent.
        l2_normalise: search, losses and output in the space of unit vectors; the stored rows may
            have any length.
        commitment: weight of the loss that pulls latents to their codes.
        codebook_weight: weight of the loss that pulls codes to their latents.
        entropy: weight of E[H(p)] - H(E[p]), p the soft assignment of a latent at temperature 0.01
            (Yu et al., 2023, arXiv:2310.05737, eq. 4): confident latents, evenly used codes.
        revival: move rarely used codes towards latents at each `update` (Zheng and Vedaldi, 2023,
            arXiv:2307.15139, eq. 4-6).
        rotation: the gradient of a code passes to its latent by the rotation and scaling that takes
            the one to the other (Fifty et al., 2024, arXiv:2410.06424), not unchanged.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        dim: int,
        l2_normalise: bool = True,
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        entropy: float = 0.0,
        revival: bool = False,
        rotation: bool = False,
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
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / vocab_size, 1 / vocab_size)
        with torch.no_grad():
            self.embedding.weight.copy_(self._normalised(self.embedding.weight))
        if revival:
            self.register_buffer("embed_prob", torch.zeros(vocab_size))

    def forward(self, latents: Float[Tensor, "*positions d"]) -> Quantized:
        latents, codes = self._normalised(latents), self._codes()
        similarities = _similarities(latents, codes)
        ids = self._choose(similarities)
        quantised = F.embedding(ids, codes)
        losses = {
            "codebook": self.codebook_weight * F.mse_loss(quantised, latents.detach()),
            "commitment": self.commitment * F.mse_loss(latents, quantised.detach()),
        }
        if self.entropy > 0:
            losses["entropy"] = self.entropy * _assignment_entropy(similarities)
        if self.training:
            passed = _rotated if self.rotation else _straight_through
            quantised = passed(latents, quantised.detach())
        return Quantized(quantised, ids, losses, *code_statistics(ids, self.vocab_size))

    def encode(self, latents: Float[Tensor, "*positions d"]) -> Int64[Tensor, "*positions"]:
        return self._similarities(latents).argmax(-1)

    def decode(self, ids: Int64[Tensor, "*positions"]) -> Float[Tensor, "*positions d"]:
        return F.embedding(ids, self._codes())

    @torch.no_grad()
    def update(self, latents: Float[Tensor, "*positions d"]) -> None:
        """Replace each code by a mixture with the latent nearest to it, almost wholly where the
        code is dead, not at all where it has its even share of use."""
        if not self.revival:
            return
        latents = _of_all_processes(latents.detach().float().flatten(0, -2))
        compared, codes = self._normalised(latents), self._codes()
        ids = _similarities(compared, codes).argmax(-1)
        usage = torch.bincount(ids, minlength=self.vocab_size) / len(ids)
        self.embed_prob.lerp_(usage, 1 - USAGE_DECAY)
        nearest = latents[_similarities(codes, compared).argmax(-1)]
        replaced = torch.exp(-10 * self.embed_prob * self.vocab_size / (1 - USAGE_DECAY) - 1e-3)
        self.embedding.weight.lerp_(nearest.to(self.embedding.weight), replaced.unsqueeze(-1))

    def _choose(self, similarities: Float[Tensor, "*positions k"]) -> Int64[Tensor, "*positions"]:
        return similarities.argmax(-1)

    def _similarities(
        self, latents: Float[Tensor, "*positions d"]
    ) -> Float[Tensor, "*positions k"]:
        return _similarities(self._normalised(latents), self._codes())

    def _normalised(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors.float(), dim=-1) if self.l2_normalise else vectors.float()

    def _codes(self) -> Tensor:
        return self._normalised(self.embedding.weight)


def _similarities(
    queries: Float[Tensor, "*positions d"], keys: Float[Tensor, "k d"]
) -> Float[Tensor, "*positions k"]:
    """Return q.k - |k|^2 / 2, whose largest entry along k is the nearest key."""
    with torch.autocast(queries.device.type, enabled=False):
        return F.linear(queries, keys, -0.5 * keys.square().sum(-1))


def _straight_through(
    latents: Float[Tensor, "*positions d"], codes: Float[Tensor, "*positions d"]
) -> Float[Tensor, "*positions d"]:
    return latents + (codes - latents).detach()


def _rotated(
    latents: Float[Tensor, "*positions d"], codes: Float[Tensor, "*positions d"]
) -> Float[Tensor, "*positions d"]:
    """Return the codes, up to rounding, as a linear map of the latents that is held constant."""
    e, length = latents.detach(), latents.detach().norm(dim=-1, keepdim=True) + 1e-6
    code_length = codes.norm(dim=-1, keepdim=True)
    u, q = e / length, codes / (code_length + 1e-6)
    # Two reflections make the rotation of u to q: one along their bisector, one along u.
    w = F.normalize(u + q, dim=-1)
    along_w, along_u = ((latents * axis).sum(-1, keepdim=True) for axis in (w, u))
    return (latents - 2 * along_w * w + 2 * along_u * q) * (code_length / length)


def _assignment_entropy(similarities: Float[Tensor, "*positions k"]) -> Float[Tensor, ""]:
    # softmax(-|z - e|^2 / t) is softmax(2 (z.e - |e|^2 / 2) / t): |z|^2 cancels.
    log_p = F.log_softmax(2 * similarities.flatten(0, -2) / ENTROPY_TEMPERATURE, dim=-1)
    p = log_p.exp()
    per_latent = -(p * log_p).sum(-1).mean()
    mean = p.mean(0)
    return per_latent + (mean * torch.log(mean + 1e-5)).sum()


def _of_all_processes(latents: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    """Return the rows of every process, in rank order on all of them; each has equally many."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return latents
    gathered = [torch.empty_like(latents) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, latents.contiguous())
    return torch.cat(gathered)
