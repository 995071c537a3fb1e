"""A quantizer of fewer (or more) channels than the latents have (factorised codes: Yu et al., 2021,
arXiv:2110.04627, section 3.2)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.models import register_to_config
from vistok.quantizers.base import Quantized, Quantizer
from vistok.tokens import TokenSpec


class Projected(Quantizer):
    """A linear map to the channels of any quantizer, and one back from its codes.

    Args:
        quantizer: what codes the projected latents.
        dim: channels of the latents.
    """

    @register_to_config
    def __init__(self, quantizer: Quantizer, dim: int):
        super().__init__()
        if quantizer.draws:
            raise UserError(f"Projected: {type(quantizer).__name__} draws latents from moments")
        self.dim = dim
        self.quantizer = quantizer
        self.vocab_size = quantizer.vocab_size
        self.project_in = Projection(dim, quantizer.in_dim)
        self.project_out = Projection(quantizer.dim, dim)

    def spec(self, shape: Sequence[int], ordered: bool = False) -> TokenSpec:
        return self.quantizer.spec(shape, ordered)

    def forward(self, latents: Float[Tensor, "*positions d"]) -> Quantized:
        result = self.quantizer(self.project_in(latents))
        return replace(result, quantised=self.project_out(result.quantised))

    def encode(self, latents: Float[Tensor, "*positions d"]) -> Tensor:
        return self.quantizer.encode(self.project_in(latents))

    def decode(self, ids: Tensor) -> Float[Tensor, "*positions d"]:
        return self.project_out(self.quantizer.decode(ids))

    @torch.no_grad()
    def update(self, latents: Float[Tensor, "*positions d"]) -> None:
        self.quantizer.update(self.project_in(latents))


class Projection(nn.Linear):
    """A linear map in float32, whatever the autocast dtype and that of its weights."""

    def forward(self, x: Float[Tensor, "*positions i"]) -> Float[Tensor, "*positions o"]:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())
