"""Residual quantization (SoundStream: Zeghidour et al., 2021, arXiv:2107.03312, section III.C):
each layer codes what the layers before it left over."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.errors import UserError
from vistok.layers.constant import Constant
from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, Quantizer, code_statistics
from vistok.quantizers.composite import Composite, total
from vistok.quantizers.ema_vq import EMAVQ
from vistok.quantizers.fsq import FSQ
from vistok.quantizers.lfq import LFQ


class Residual(Composite):
    """A latent as the sum of one code per layer, coarse to fine; the first few layers' ids decode,
    too. Losses are sums over the layers.

    Each layer passes the whole gradient on to the latents, so that n layers give them n times that
    of their sum.

    Args:
        quantizer: of each layer: one, whose copies serve the others, or a list.
        layers: number of layers of one quantizer.
        shared: one codebook in all layers.
        least_layers: training sums up only the first layers, at each forward a number of them drawn
            evenly from this to all (quantizer dropout); None for all always. The ids remain those
            of all layers: nothing less would be a token.
    """

    @register_to_config
    def __init__(
        self,
        quantizer: Quantizer | Sequence[Quantizer],
        layers: int | None = None,
        shared: bool = False,
        least_layers: int | None = None,
    ):
        super().__init__(quantizer, layers, shared)
        self.dim = self.quantizers[0].dim
        others = [part.dim for part in self.quantizers if part.dim != self.dim]
        if others:
            raise UserError(
                f"{type(self).__name__}: layers of {self.dim} and {others[0]} channels cannot code "
                "the same latents"
            )
        if least_layers is not None and not 1 <= least_layers <= self.count:
            raise UserError(
                f"{type(self).__name__}: least_layers {least_layers} must be from 1 to "
                f"{self.count}, the number of layers"
            )
        self.least_layers = least_layers

    def forward(
        self, latents: Float[Tensor, "*positions d"], layers: int | Int64[Tensor, ""] | None = None
    ) -> Quantized:
        """`layers` is the number of layers that are summed up and trained; by default all, or in
        training what the dropout draws."""
        if layers is None and self.training and self.least_layers is not None:
            bounds = (self.least_layers, self.count + 1)
            layers = torch.randint(*bounds, (), device=latents.device)
        left, found = self._entered(latents), []
        for part in self.each:
            found.append(part(left))
            left = left - found[-1].quantised.detach()
        codes, losses = [r.quantised for r in found], [r.losses for r in found]
        if layers is not None:
            used = [k < layers for k in range(self.count)]
            codes = [code * on for code, on in zip(codes, used, strict=True)]
            losses = [
                {name: loss * on for name, loss in of_one.items()}
                for of_one, on in zip(losses, used, strict=True)
            ]
        ids = self._joined([result.ids for result in found])
        return Quantized(sum(codes), ids, total(losses), *code_statistics(ids, self.levels))

    def encode(self, latents: Float[Tensor, "*positions d"]) -> Int64[Tensor, "*positions n"]:
        return self._joined([ids for _, _, ids in self.walk(latents)])

    def decode(self, ids: Int64[Tensor, "*positions k"]) -> Float[Tensor, "*positions d"]:
        """Return the sum of all layers' codes, or of those of as many first layers as there are ids
        of."""
        parts = zip(self.each, self._apart(ids), strict=False)
        return sum(part.decode(code) for part, code in parts)

    @torch.no_grad()
    def update(self, latents: Float[Tensor, "*positions d"], layers: int | None = None) -> None:
        """Adapt the codebooks of the first `layers` layers, by default of all: what a layer is to
        code is the same whether or not dropout left it out of the sum."""
        given: dict[Quantizer, list[tuple[Tensor, Tensor]]] = {}
        for part, left, ids in islice(self.walk(latents, begin=True), layers):
            given.setdefault(part, []).append((left, ids))
        for part, pairs in given.items():
            lefts = [left for left, _ in pairs]
            whole = lefts[0] if len(lefts) == 1 else torch.stack(lefts, dim=-2)
            if isinstance(part, EMAVQ):  # one step of the averages for each layer
                for left, ids in pairs:
                    part.accumulate(left, ids)
                part.refresh(whole)
            else:
                part.update(whole)

    def walk(
        self, latents: Float[Tensor, "*positions d"], begin: bool = False
    ) -> Iterator[tuple[Quantizer, Float[Tensor, "*positions d"], Tensor]]:
        """Yield each layer, what it is to code, and its ids. With `begin`, codebooks that are to be
        made of their first latents are made before."""
        left = self._entered(latents)
        for k, part in enumerate(self.each):
            if begin and isinstance(part, EMAVQ) and (k == 0 or not self.shared):
                part.begin(left)
            ids = part.encode(left)
            yield part, left, ids
            left = left - part.decode(ids)

    def _entered(self, latents: Float[Tensor, "*positions d"]) -> Float[Tensor, "*positions d"]:
        """Return what all layers together code."""
        return latents.float()


class ResidualFSQ(Residual):
    """Layers of symmetric `FSQ`, each of which parts the cells of the one before: layer k spreads
    the levels of a channel over ±levels^-k. Latents saturate softly just beyond ±1.

    Args:
        levels: of each channel, the same in every layer.
        layers: number of layers.
        least_layers: see `Residual`.
    """

    @register_to_config
    def __init__(self, levels: Sequence[int], layers: int, least_layers: int | None = None):
        scales = ([float(n) ** -k for n in levels] for k in range(layers))
        parts = [FSQ(levels, symmetric=True, scale=scale) for scale in scales]
        super().__init__(parts, least_layers=least_layers)
        self.limit = Constant([1 + 1 / (n - 1) for n in levels])

    def _entered(self, latents: Float[Tensor, "*positions d"]) -> Float[Tensor, "*positions d"]:
        limit = self.limit()
        return torch.tanh(latents.float() / limit) * limit


class ResidualLFQ(Residual):
    """Layers of `LFQ`, whose values halve from layer to layer: ±1, ±1/2, ±1/4, ...

    Args:
        dim: channels of a latent.
        layers: number of layers.
        entropy: see `LFQ`, as the next four.
        gamma: weight of evenly used codes within it.
        commitment: weight of the loss that pulls latents to their codes.
        temperature: of the soft assignment.
        clamped: how logarithms of mean probabilities are kept finite.
        least_layers: see `Residual`.
    """

    @register_to_config
    def __init__(
        self,
        dim: int,
        layers: int,
        entropy: float = 0.1,
        gamma: float = 1.0,
        commitment: float = 0.25,
        temperature: float = 0.01,
        clamped: bool = False,
        least_layers: int | None = None,
    ):
        shared = (entropy, gamma, commitment, temperature, clamped)
        parts = [LFQ(dim, *shared, scale=2.0**-k) for k in range(layers)]
        super().__init__(parts, least_layers=least_layers)
