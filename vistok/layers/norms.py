"""Normalisation layers."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (Zhang & Sennrich, 2019) with float32 arithmetic under autocast; the
    result is cast to the input's dtype before the weight multiplies it, as in Llama."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:
            return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        normed = torch.nn.functional.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return normed.to(x.dtype) * self.weight
