"""What every quantizer takes and returns."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.models import Component


@dataclass
class Quantized:
    """The result of any quantizer.

    `quantised` carries the straight-through gradient in training and is the exact code in eval;
    `losses` are scalars, already weighted, to be summed; `usage` (share of the codebook hit) and
    `perplexity` (e to the entropy of the code histogram) describe this batch.
    """

    quantised: Float[Tensor, "*positions d"]
    ids: Int64[Tensor, "*positions"]
    losses: dict[str, Tensor] = field(default_factory=dict)
    usage: Tensor | None = None
    perplexity: Tensor | None = None


class Quantizer(Component):
    """Latents to codes and back, channels last. Works in float32 whatever the autocast dtype.

    Attributes: `dim`, channels of a latent; `vocab_size`, number of codes.
    """

    dim: int
    vocab_size: int

    def forward(self, latents: Float[Tensor, "*positions d"]) -> Quantized:
        raise NotImplementedError

    def encode(self, latents: Float[Tensor, "*positions d"]) -> Int64[Tensor, "*positions"]:
        """Return the code of each latent."""
        raise NotImplementedError

    def decode(self, ids: Int64[Tensor, "*positions"]) -> Float[Tensor, "*positions d"]:
        """Return the latent of each code."""
        raise NotImplementedError

    def update(self, latents: Float[Tensor, "*positions d"]) -> None:
        """Adapt the codebook to one optimiser step's latents (averages, revival of dead codes).

        The training loop calls it after the step, outside the forward pass, so that compiled and
        repeated forwards leave the state alone. Under several processes every one must call it;
        all end with the same codebook.
        """


def code_statistics(ids: Int64[Tensor, "..."], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return (usage, perplexity) of a batch of codes as scalars on its device."""
    ids = ids.flatten()
    # Unlike bincount, this does not make the host wait for the device.
    counts = torch.zeros(vocab_size, device=ids.device)
    counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))
    p = counts / counts.sum()
    return (counts > 0).float().mean(), torch.exp(-torch.special.xlogy(p, p).sum())
