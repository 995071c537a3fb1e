"""Fixed sine-cosine position embedding (Vaswani et al., 2017, arXiv:1706.03762)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def sincos_table(
    positions: Int64[Tensor, "n"], dim: int, base: float = 10000.0
) -> Float[Tensor, "n d"]:
    """Return the sines, then the cosines, of each position times base^(-i / (dim / 2))."""
    half = dim // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None].double() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
