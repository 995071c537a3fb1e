"""Finite scalar quantization (Mentzer et al., 2023, arXiv:2309.15505)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vistok.errors import UserError
from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, Quantizer, code_statistics

MARGIN = 1e-3  # keeps the outermost levels reachable at finite latents


class FSQ(Quantizer):
    """Rounds each channel i to one of `levels[i]` values; the code is the mixed-radix number of the
    channels' digits, first channel least significant. No parameters, no losses.

    An odd number of levels gives values symmetric in [-1, 1], an even number L gives
    -1, ..., 1 - 2/L.

    Args:
        levels: levels of each channel, each at least 2; their product is the vocabulary.
    """

    @register_to_config
    def __init__(self, levels: Sequence[int] = (8, 8, 8, 8)):
        super().__init__()
        if len(levels) == 0 or min(levels) < 2:
            raise UserError(f"FSQ: levels {list(levels)} must each be at least 2")
        self.dim = len(levels)
        self.vocab_size = math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        # Integers: a cast of the model to bfloat16 leaves them exact.
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def forward(self, latents: Float[Tensor, "*positions d"]) -> Quantized:
        bounded = self._bound(latents)
        rounded = bounded.round()
        ids = self._to_ids(rounded)
        if self.training:
            rounded = bounded + (rounded - bounded).detach()
        quantised = rounded / (self.levels // 2)
        return Quantized(quantised, ids, {}, *code_statistics(ids, self.vocab_size))

    def encode(self, latents: Float[Tensor, "*positions d"]) -> Int64[Tensor, "*positions"]:
        return self._to_ids(self._bound(latents).round())

    def decode(self, ids: Int64[Tensor, "*positions"]) -> Float[Tensor, "*positions d"]:
        digits = ids.unsqueeze(-1) // self.basis % self.levels
        half = self.levels // 2
        return (digits - half).float() / half

    def _bound(self, latents: Tensor) -> Tensor:
        """Squash each channel into the span that rounds to its levels, centred on them."""
        half_width = (self.levels - 1) * (1 + MARGIN) / 2
        offset = (1 - self.levels % 2) / 2
        shift = torch.atanh(offset / half_width)
        return torch.tanh(latents.float() + shift) * half_width - offset

    def _to_ids(self, rounded: Tensor) -> Tensor:
        return ((rounded.long() + self.levels // 2) * self.basis).sum(-1)
