"""Finite scalar quantization (Mentzer et al., 2023, arXiv:2309.15505)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.errors import UserError
from vistok.layers.constant import Constant
from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, Quantizer, code_statistics
from vistok.quantizers.estimators import straight_through

MARGIN = 1e-3  # keeps the outermost levels reachable at finite latents


class FSQ(Quantizer):
    """Rounds each channel i to one of `levels[i]` values; the code is the mixed-radix number of the
    channels' digits, first channel least significant. No parameters, no losses.

    An odd number of levels gives values symmetric in [-1, 1], an even number L gives
    -1, ..., 1 - 2/L, unless `symmetric`.

    Args:
        levels: levels of each channel, each at least 2; their product is the vocabulary.
        symmetric: spread the values of every number of levels evenly over [-1, 1].
        scale: of each channel, whose values are then spread over [-scale, scale], where latents
            beyond saturate; for residuals, see `ResidualFSQ`. None squashes latents of any size.
    """

    @register_to_config
    def __init__(
        self,
        levels: Sequence[int] = (8, 8, 8, 8),
        symmetric: bool = False,
        scale: Sequence[float] | None = None,
    ):
        super().__init__()
        if len(levels) == 0 or min(levels) < 2:
            raise UserError(f"FSQ: levels {list(levels)} must each be at least 2")
        if math.prod(levels) >= 2**63:
            raise UserError(
                f"FSQ: levels {list(levels)} make more codes than int64 counts: split the channels "
                "by a Product"
            )
        if scale is not None and (not symmetric or len(scale) != len(levels)):
            raise UserError(
                f"FSQ: a scale is for symmetric levels and one for each channel, {len(levels)}: "
                f"got {len(scale)} with symmetric {symmetric}"
            )
        self.dim = len(levels)
        self.vocab_size = math.prod(levels)
        self.symmetric = symmetric
        self.scale = None if scale is None else Constant(scale)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        # Integers: a cast of the model to bfloat16 leaves them exact.
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def forward(self, latents: Float[Tensor, "*positions d"]) -> Quantized:
        bounded = self._bound(latents)
        rounded = self._round(bounded)
        ids = self._to_ids(rounded)
        if self.training:
            rounded = straight_through(bounded, rounded)
        quantised = self._values(rounded)
        return Quantized(quantised, ids, {}, *code_statistics(ids, self.vocab_size))

    def encode(self, latents: Float[Tensor, "*positions d"]) -> Int64[Tensor, "*positions"]:
        return self._to_ids(self._round(self._bound(latents)))

    def decode(self, ids: Int64[Tensor, "*positions"]) -> Float[Tensor, "*positions d"]:
        digits = ids.unsqueeze(-1) // self.basis % self.levels
        return self._values((digits - self._zero()).float())

    def _bound(self, latents: Tensor) -> Tensor:
        """Squash each channel into the span that rounds to its levels, centred on them."""
        latents = latents.float()
        if self.symmetric:
            if self.scale is None:
                unit = torch.tanh(latents)
            else:
                unit = (latents / self.scale()).clamp(-1, 1)
            return (self.levels - 1) * (unit + 1) / 2
        half_width = (self.levels - 1) * (1 + MARGIN) / 2
        offset = (1 - self.levels % 2) / 2
        shift = torch.atanh(offset / half_width)
        return torch.tanh(latents + shift) * half_width - offset

    def _round(self, bounded: Tensor) -> Tensor:
        # Latents of zero lie between two of an even number of symmetric levels: up, wherever.
        return (bounded + 0.5).floor() if self.symmetric else bounded.round()

    def _values(self, rounded: Tensor) -> Tensor:
        if not self.symmetric:
            return rounded / (self.levels // 2)
        values = 2 * rounded / (self.levels - 1) - 1
        return values if self.scale is None else values * self.scale()

    def _zero(self) -> Tensor | int:
        """The digit of each channel that rounds to 0."""
        return 0 if self.symmetric else self.levels // 2

    def _to_ids(self, rounded: Tensor) -> Tensor:
        return ((rounded.long() + self._zero()) * self.basis).sum(-1)
