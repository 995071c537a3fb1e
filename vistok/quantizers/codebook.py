"""Quantizers that search a table of codes, and the search."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, library

from vistok.quantizers.base import Quantized, Quantizer, code_statistics
from vistok.quantizers.estimators import rotated, straight_through

# Similarities held at a time: as many as a core's cache takes, or a quarter of a GB on a GPU.
HELD, HELD_ON_GPU = 2**20, 2**26
FEWEST_ROWS = 64  # for which a table is worth reading


class Codebook(Quantizer):
    """Replaces each latent by the nearest row of a table. A subclass sets `vocab_size` and `dim`
    and says what the rows are (`_codes`) and how they and the latents are trained: by the weights
    `codebook_weight` and `commitment`, or otherwise (`_losses`). It may compare latents on a sphere
    (`_normalised`), or choose other codes than the nearest (`_choose`).

    Attributes: `rotation`, whether a code's gradient passes to its latent by rotation and scaling
    instead of unchanged.
    """

    rotation = False

    def forward(self, latents: Float[Tensor, "*positions d"]) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            latents, codes = self._normalised(latents), self._codes()
            ids = self._choose(latents.detach(), codes.detach())
            quantised = F.embedding(ids, codes)
            losses = self._losses(latents, quantised, codes)
            if self.training:
                quantised = (rotated if self.rotation else straight_through)(latents, quantised)
        return Quantized(quantised, ids, losses, *code_statistics(ids, self.vocab_size))

    def encode(self, latents: Float[Tensor, "*positions d"]) -> Int64[Tensor, "*positions"]:
        return self._nearest(self._normalised(latents).detach(), self._codes().detach())

    def decode(self, ids: Int64[Tensor, "*positions"]) -> Float[Tensor, "*positions d"]:
        return F.embedding(ids, self._codes())

    def _codes(self) -> Float[Tensor, "k d"]:
        """Return the table, in the space of losses and output."""
        raise NotImplementedError

    def _losses(
        self,
        latents: Float[Tensor, "*positions d"],
        quantised: Float[Tensor, "*positions d"],
        codes: Float[Tensor, "k d"],
    ) -> dict[str, Float[Tensor, ""]]:
        return {
            "codebook": self.codebook_weight * F.mse_loss(quantised, latents.detach()),
            "commitment": self.commitment * F.mse_loss(latents, quantised.detach()),
        }

    def _normalised(self, vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return vectors in the space of losses and output."""
        return vectors.float()

    def _compared(
        self, latents: Float[Tensor, "*positions d"], codes: Float[Tensor, "k d"]
    ) -> tuple[Float[Tensor, "*positions d"], Float[Tensor, "k d"]]:
        """Return both in the space of the search."""
        return latents, codes

    def _choose(
        self, latents: Float[Tensor, "*positions d"], codes: Float[Tensor, "k d"]
    ) -> Int64[Tensor, "*positions"]:
        """Return the codes of a forward pass."""
        return self._nearest(latents, codes)

    def _nearest(
        self, latents: Float[Tensor, "*positions d"], codes: Float[Tensor, "k d"]
    ) -> Int64[Tensor, "*positions"]:
        return nearest(*self._compared(latents, codes))


def similarities(
    queries: Float[Tensor, "*positions d"], keys: Float[Tensor, "k d"]
) -> Float[Tensor, "*positions k"]:
    """Return q.k - |k|^2 / 2, whose largest entry along k is the nearest key."""
    return F.linear(queries, keys, -0.5 * keys.square().sum(-1))


def nearest(
    queries: Float[Tensor, "*positions d"], keys: Float[Tensor, "k d"]
) -> Int64[Tensor, "*positions"]:
    """Return the key at the least distance of each query, the first of several."""
    return largest(queries, keys, -0.5 * keys.square().sum(-1))


def largest(
    queries: Float[Tensor, "*positions d"], keys: Float[Tensor, "k d"], bias: Float[Tensor, "k"]
) -> Int64[Tensor, "*positions"]:
    """Return the key with the largest q.k + bias of each query, the first of several; float32, in
    memory that does not grow with the number of queries."""
    return _largest(queries.reshape(-1, keys.shape[1]), keys, bias).view(queries.shape[:-1])


@library.custom_op("vistok::largest", mutates_args=())
def _largest(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    # One operation for the compiler, which would unroll the loop.
    held = HELD if queries.device.type == "cpu" else HELD_ON_GPU
    rows = max(FEWEST_ROWS, held // len(keys))
    found = queries.new_empty(len(queries), dtype=torch.int64)
    with torch.autocast(queries.device.type, enabled=False):
        for part, its in zip(queries.split(rows), found.split(rows), strict=True):
            # Unlike argmax, max is fast along rows.
            its.copy_(F.linear(part, keys, bias).max(-1).indices)
    return found


@_largest.register_fake
def _(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    return queries.new_empty(len(queries), dtype=torch.int64)
