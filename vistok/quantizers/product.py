"""Product quantization (Jégou et al., 2011, IEEE TPAMI 33(1)): pieces of a latent, coded apart."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, Quantizer, code_statistics
from vistok.quantizers.composite import Composite, total


class Product(Composite):
    """Splits the channels into consecutive pieces, each with a quantizer of its own (the heads or
    codebooks of other libraries). Losses are means over the pieces.

    With `Residual` pieces this is grouped residual quantization: ids are those of the first piece's
    layers, then those of the second's, and so on.

    Args:
        quantizer: of each piece: one, whose copies serve the others, or a list.
        pieces: number of pieces of one quantizer.
        shared: one codebook for all pieces, which meets them as if they were latents.
    """

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer | Sequence[Quantizer],
        pieces: int | None = None,
        shared: bool = False,
    ):
        super().__init__(quantizer, pieces, shared)
        self.dims = [part.dim for part in self.each]
        self.dim = sum(self.dims)

    def forward(self, latents: Float[Tensor, "b *positions d"]) -> Quantized:
        pieces = latents.split(self.dims, dim=-1)
        if self.shared:
            result = self.quantizers[0](_as_latents(pieces))
            rows = (len(latents), self.count)
            codes = result.quantised.unflatten(0, rows).unbind(1)
            ids = result.ids.unflatten(0, rows).unbind(1)
            losses = result.losses
        else:
            found = [part(piece) for part, piece in zip(self.each, pieces, strict=True)]
            codes, ids = [result.quantised for result in found], [result.ids for result in found]
            sums = total([result.losses for result in found])
            losses = {name: loss / self.count for name, loss in sums.items()}
        ids = self._joined(ids)
        statistics = code_statistics(ids, self.levels)
        return Quantized(torch.cat(codes, dim=-1), ids, losses, *statistics)

    def encode(self, latents: Float[Tensor, "b *positions d"]) -> Int64[Tensor, "b *tokens n"]:
        pieces = latents.split(self.dims, dim=-1)
        return self._joined([q.encode(piece) for q, piece in zip(self.each, pieces, strict=True)])

    def decode(self, ids: Int64[Tensor, "b *tokens n"]) -> Float[Tensor, "b *positions d"]:
        pieces = zip(self.each, self._apart(ids), strict=True)
        return torch.cat([part.decode(code) for part, code in pieces], dim=-1)

    def update(self, latents: Float[Tensor, "b *positions d"]) -> None:
        pieces = latents.split(self.dims, dim=-1)
        if self.shared:
            self.quantizers[0].update(_as_latents(pieces))
            return
        for part, piece in zip(self.each, pieces, strict=True):
            part.update(piece)


def _as_latents(
    pieces: Sequence[Float[Tensor, "b *positions d"]],
) -> Float[Tensor, "n *positions d"]:
    """Return the pieces of all latents one after another, those of an image together: processes,
    each with some of the images, have them in the same order as one with all."""
    return torch.stack(tuple(pieces), dim=1).flatten(0, 1)
