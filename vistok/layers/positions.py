"""Sine-cosine embeddings of positions (Vaswani et al., 2017, arXiv:1706.03762) and of times."""

import math

import torch
from jaxtyping import Float, Int64, Real
from torch import Tensor, nn


def sincos_table(
    positions: Int64[Tensor, "n"], dim: int, base: float = 10000.0
) -> Float[Tensor, "n d"]:
    """Return the sines, then the cosines, of each position times base^(-i / (dim / 2))."""
    half = dim // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None].double() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_grid(height: int, width: int, dim: int) -> Float[Tensor, "h w d"]:
    """Return sines and cosines of the row, then those of the column, of each cell of a square grid.

    Other grids are cut into runs of `height` cells, row by row, and get the number of the run and
    the place in it: unique, but no coordinates. FlexTok's weights were trained with these.
    """
    cells = torch.arange(height * width)
    halves = [sincos_table(axis, dim // 2) for axis in (cells // height, cells % height)]
    return torch.cat(halves, dim=1).view(height, width, dim)


def time_features(
    times: Float[Tensor, "b"], dim: int, highest: float = 1000.0, span: float = 256.0
) -> Float[Tensor, "b d"]:
    """Return the cosines, then the sines, of times at frequencies from `highest`, here of times in
    [0, 1], down to `highest / span`; an odd `dim` ends in zero.

    The angles are so large that float32 rounds them visibly: the order of the products is that of
    the published models, and exponentials are rounded once, lest they depend on the machine.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=times.device) / half
    frequencies = highest * (-math.log(span) * exponents).double().exp().float()
    angles = times.float()[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    return torch.nn.functional.pad(features, (0, dim % 2))


class TimeEmbedding(nn.Sequential):
    """Times of 0 to 1000 through their cosines and sines and an MLP (ADM: Dhariwal and Nichol,
    2021, arXiv:2105.05233)."""

    features = 256

    def __init__(self, dim: int):
        super().__init__(nn.Linear(self.features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: Real[Tensor, "t"]) -> Float[Tensor, "t d"]:
        features = time_features(times.float(), self.features, highest=1.0, span=10000.0)
        return super().forward(features.to(self[0].weight.dtype))


def learned_table(length: int, width: int) -> nn.Parameter:
    """Return a table to be learned, whose rows have a length of about one (CLIP: Radford et al.,
    2021, arXiv:2103.00020)."""
    return nn.Parameter(torch.randn(length, width) * width**-0.5)
