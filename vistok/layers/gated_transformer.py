"""The block of xAR (Ren et al., 2025, arXiv:2502.20388) and FlowAR (Ren et al., 2024,
arXiv:2412.15205): attention and a gated MLP, modulated as in DiT (Peebles and Xie, 2022,
arXiv:2212.09748), under norms without weights.

A modulation is six numbers for each channel: gates of attention and MLP, their scales, their
shifts. It depends on the condition alone, so that samplers make it beforehand.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from vistok.layers.linear import Linear
from vistok.layers.transformer import Attention

EPS = 1e-6


class GEGLU(nn.Module):
    """Feed-forward layer gated by an exact GELU (Shazeer, 2020, arXiv:2002.05202); gate and value
    share one matrix product."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        self.gate_value = Linear(dim, 2 * hidden_dim, bias=True)
        self.out = Linear(hidden_dim, dim, bias=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b r d"]) -> Float[Tensor, "b r d"]:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        gated = gelu(gate)
        # In place where it may be: memory of this size, taken anew, costs more than the product.
        gated = gated * value if torch.is_grad_enabled() else gated.mul_(value)
        return self.dropout(self.out(self.dropout(gated)))


class GatedBlock(nn.Module):
    """x + gate * attention(modulated x), then x + gate * MLP(modulated x).

    `dropout` is of attention weights and of the outputs of attention and MLP; `qkv_bias` says
    whether queries, keys and values have biases.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        dropout: float = 0.0,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.attention = Attention(
            dim,
            num_heads,
            num_heads,
            dropout,
            bias=qkv_bias,
            out_bias=True,
            weight_dropout=dropout,
        )
        self.feed_forward = GEGLU(dim, hidden_dim, dropout)
        self.modulation = Linear(dim, 6 * dim, bias=True)

    def modulate(self, condition: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 6 d"]:
        return self.modulation(silu(condition)).unflatten(-1, (6, -1))

    def forward(
        self,
        x: Float[Tensor, "b r d"],
        by: Float[Tensor, "_ _ d"] | Float[Tensor, "_ _ 6 d"],
        **attention,
    ) -> Float[Tensor, "b r d"]:
        """`by` modulates as many runs of rows, all of one length: conditions or, made beforehand,
        modulations. `attention` are arguments of `Attention`."""
        # Training leaves it to the block, whose weights FSDP serves only here.
        modulation = self.modulate(by) if by.ndim == 3 else by
        if 1 < modulation.shape[1] < x.shape[1]:
            modulation = modulation.repeat_interleave(x.shape[1] // modulation.shape[1], dim=1)
        gate, mlp_gate, scale, mlp_scale, shift, mlp_shift = modulation.unbind(-2)
        x = x + gate * self.attention(modulated(x, scale, shift), **attention)
        return x + mlp_gate * self.feed_forward(modulated(x, mlp_scale, mlp_shift))


def modulated(
    x: Float[Tensor, "b r d"], scale: Float[Tensor, "_ _ d"], shift: Float[Tensor, "_ _ d"]
) -> Float[Tensor, "b r d"]:
    """Return x over its root mean square, which float32 arithmetic finds, scaled and shifted."""
    return torch.addcmul(shift, rms_normed(x), 1 + scale)


def rms_normed(x: Float[Tensor, "b r d"]) -> Float[Tensor, "b r d"]:
    return nn.functional.rms_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype)


def gated_width(dim: int, ratio: float = 4.0) -> int:
    """Hidden width of the MLP: two thirds of what one without a gate would have."""
    return int(dim * ratio * 2 / 3)
