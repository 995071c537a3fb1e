"""What every quantizer takes and returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.models import Component
from vistok.tokens import TokenSpec


@dataclass
class Quantized:
    """The result of any quantizer.

    `quantised` carries the straight-through gradient in training and is the exact code in eval;
    `ids` are the tokens, the latents themselves where these stay continuous; `losses` are scalars,
    already weighted, to be summed; `usage` (share of the codebook hit), `perplexity` (e to the
    entropy of the code histogram) and `dead_codes` (how many codes are not hit) describe this
    batch, where there is a codebook.
    """

    quantised: Float[Tensor, "*positions d"]
    ids: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    usage: Tensor | None = None
    perplexity: Tensor | None = None
    dead_codes: Tensor | None = None

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What to log beside the losses, under the names that the log has for whole windows."""
        found = {
            "codebook_usage": self.usage,
            "codebook_perplexity": self.perplexity,
            "dead_codes": self.dead_codes,
        }
        return {name: value for name, value in found.items() if value is not None}


class Quantizer(Component):
    """Latents to codes and back, channels last. Works in float32 whatever the autocast dtype.

    Attributes: `dim`, channels of a latent; `in_dim`, channels of what it is made from, where these
    are more; `vocab_size`, number of codes, None where latents stay continuous; `draws`, whether
    the code is that of a draw from a distribution, whose moments it is made from, when `encode` is
    called with `sample=True`.
    """

    draws = False
    dim: int
    vocab_size: int | None

    @property
    def in_dim(self) -> int:
        return self.dim

    def spec(self, shape: Sequence[int], ordered: bool = False) -> TokenSpec:
        """Return what one image becomes that has latents of this shape."""
        return TokenSpec.ids(tuple(shape), self.vocab_size, ordered)

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


def code_statistics(
    ids: Int64[Tensor, "..."], vocab_size: int | Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (usage, perplexity, dead codes) of a batch of codes as scalars on its device. Given
    the sizes of several codebooks, the last axis of `ids` has a code of each: the first two are
    their means, the last the sum. Negative ids, of codes left out, do not count."""
    sizes = (vocab_size,) if isinstance(vocab_size, int) else tuple(vocab_size)
    ids = ids.reshape(-1, len(sizes)).T.sort().values
    # Runs of equal ids: a histogram in little memory, however many codes there are; and unlike
    # bincount, this does not make the host wait for the device.
    first = F.pad(ids.diff() != 0, (1, 0), value=True)
    counted = (ids >= 0).float()
    counts = torch.zeros_like(counted).scatter_add_(1, first.cumsum(1) - 1, counted)
    p = counts / counts.sum(1, keepdim=True).clamp(min=1)
    perplexity = torch.exp(-torch.special.xlogy(p, p).sum(1)).mean()
    hit = (counts > 0).sum(1)
    usage = sum(used / size for used, size in zip(hit, sizes, strict=True)) / len(sizes)
    return usage, perplexity, sum(sizes) - hit.sum()
