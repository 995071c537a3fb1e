"""The block of VAR (Tian et al., 2024, arXiv:2404.02905): attention by cosines and an MLP under
layer norms without weights, modulated as in DiT (Peebles and Xie, 2022, arXiv:2212.09748).

A modulation is six numbers for each channel: gates of attention and MLP, factors of what these read
(a model puts out their difference from one), and shifts. It depends on the condition alone, so that
samplers make it beforehand.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.layers.linear import Linear
from vistok.layers.transformer import Attention

SHARPEST = math.log(100)  # of what multiplies the cosines of queries and keys
Modulation = tuple[Float[Tensor, "b 1 d"], ...]


class Unit(nn.Module):
    """Vectors of unit length, in float32; with `num_heads`, times a learned factor of each head."""

    def __init__(self, num_heads: int | None = None):
        super().__init__()
        self.sharpness = None
        if num_heads:
            self.sharpness = nn.Parameter(torch.full((num_heads,), math.log(4)))

    def forward(self, x: Float[Tensor, "b h r d"]) -> Float[Tensor, "b h r d"]:
        unit = F.normalize(x.float(), dim=-1)
        if self.sharpness is None:
            return unit
        return unit * self.sharpness.float().clamp(max=SHARPEST).exp()[:, None, None]


class QKV(Linear):
    """Queries, keys and values, of which keys have no bias."""

    def __init__(self, dim: int):
        super().__init__(dim, 3 * dim)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "b r d"]) -> Float[Tensor, "b r d3"]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.weight, bias)


class CosineBlock(nn.Module):
    """Attention, then MLP, each after a modulated norm and added through a gate.

    Attention is by cosines; without `cosine` by products, of a quarter of the usual scale. `shared`
    blocks add a table to a modulation that is the same for all. In training `drop_path` is the
    probability with which a branch adds nothing to an image (Huang et al., 2016, arXiv:1603.09382).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        cosine: bool,
        shared: bool,
        drop_path: float,
        eps: float,
    ):
        super().__init__()
        scale = 1.0 if cosine else 0.25 * (dim // num_heads) ** -0.5
        self.attention = Attention(dim, num_heads, num_heads, 0.0, scale=scale, out_bias=True)
        self.attention.qkv = QKV(dim)
        if cosine:
            self.attention.q_norm, self.attention.k_norm = Unit(num_heads), Unit()
        self.fc1 = Linear(dim, hidden_dim, bias=True)
        self.fc2 = Linear(hidden_dim, dim, bias=True)
        self.modulation = None if shared else Linear(dim, 6 * dim, bias=True)
        self.modulation_table = nn.Parameter(torch.randn(6, dim) / dim**0.5) if shared else None
        self.drop_path, self.eps = drop_path, eps

    def modulate(self, by: Float[Tensor, "b 1 d"] | Float[Tensor, "b 1 6 d"]) -> Modulation:
        """Return the two gates, the factors and the shifts. `by` is the condition or, of shared
        blocks, the shared modulation."""
        if self.modulation_table is not None:
            gates, scales, shifts = (by + self.modulation_table).split(2, dim=-2)
        else:
            gates, scales, shifts = self.modulation(F.silu(by)).unflatten(-1, (6, -1)).split(2, -2)
        return (*gates.unbind(-2), *(1 + scales).unbind(-2), *shifts.unbind(-2))

    def forward(
        self, x: Float[Tensor, "b r d"], by: Tensor | Modulation, **attention
    ) -> Float[Tensor, "b r d"]:
        """`by` is as of `modulate`, or what that has made of it beforehand."""
        modulation = self.modulate(by) if isinstance(by, Tensor) else by
        gate, mlp_gate, factor, mlp_factor, shift, mlp_shift = modulation
        branch = self.attention(modulated(x, factor, shift, self.eps), **attention)
        x = torch.addcmul(x, gate, self._dropped(branch))
        branch = self.fc1(modulated(x, mlp_factor, mlp_shift, self.eps))
        branch = self.fc2(F.gelu(branch, approximate="tanh"))
        return torch.addcmul(x, mlp_gate, self._dropped(branch))

    def _dropped(self, branch: Float[Tensor, "b r d"]) -> Float[Tensor, "b r d"]:
        if not (self.training and self.drop_path):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * (kept / (1 - self.drop_path)).to(branch.dtype)


def modulated(
    x: Float[Tensor, "b r d"],
    factor: Float[Tensor, "_ 1 d"],
    shift: Float[Tensor, "_ 1 d"],
    eps: float,
) -> Float[Tensor, "b r d"]:
    """Return the layer norm of x, multiplied and shifted."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), factor)
