"""Adaptive layer norm of DiT (Peebles and Xie, 2022, arXiv:2212.09748): a condition shifts and
scales what each branch of a block reads, and gates what it adds."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from vistok.layers.linear import Linear
from vistok.layers.transformer import Attention, Block, Norm


class ModulatedBlock(Block):
    """A block whose rows are of one kind or two, the first and the others, each modulated in its
    own way. At the start all gates are shut.

    A modulation is six numbers for each kind and channel: gates of attention and feed-forward,
    shift and scale of attention, shift and scale of feed-forward.
    """

    def __init__(self, dim: int, *sizes, kinds: int = 1, **more):
        super().__init__(dim, *sizes, **more)
        self.kinds = kinds
        self.modulation = zero_linear(dim, kinds * 6 * dim)

    def modulate(self, condition: Float[Tensor, "b d"]) -> Float[Tensor, "b kinds 6 d"]:
        return self.modulation(silu(condition)).unflatten(-1, (self.kinds, 6, -1))

    def forward(
        self,
        x: Float[Tensor, "b r d"],
        modulation: Float[Tensor, "_ kinds 6 d"],
        first: int,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "b r d"]:
        """`first` rows are of the first kind; one modulation may serve the whole batch."""
        rows = [by_kind(numbers, first, x.shape[1]) for numbers in modulation.unbind(2)]
        gate_attention, gate_feed_forward, *shifts_and_scales = rows
        shift, scale, feed_forward_shift, feed_forward_scale = shifts_and_scales
        attended = self.attention(self.attention_norm(x) * (1 + scale) + shift, mask=mask)
        x = x + gate_attention * attended
        fed = self.feed_forward_norm(x) * (1 + feed_forward_scale) + feed_forward_shift
        return x + gate_feed_forward * self.feed_forward(fed)


class AdaLNBlock(nn.Module):
    """Attention, then MLP, each after a modulated norm and added through a gate (RAR, TokenBridge).

    A modulation is six numbers for each channel: shift, scale and gate of attention, then of the
    MLP. It depends on nothing that a row holds, so that samplers make it beforehand. `dropout` is
    of attention weights, of attention outputs and in the MLP, in training.
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, dropout: float, norm: Norm):
        super().__init__()
        self.attention_norm = norm(dim)
        self.attention = Attention(
            dim, num_heads, num_heads, dropout, qk_norm=norm, bias=True, weight_dropout=dropout
        )
        self.mlp_norm = norm(dim)
        self.fc1 = Linear(dim, hidden_dim, bias=True)
        self.fc2 = Linear(hidden_dim, dim, bias=True)
        self.dropout = nn.Dropout(dropout)

    def modulated(
        self, x: Float[Tensor, "b r d"], modulation: Float[Tensor, "b r d6"], **attention
    ) -> Float[Tensor, "b r d"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=-1)
        h = torch.addcmul(shift, self.attention_norm(x), 1 + scale)
        x = torch.addcmul(x, gate, self.attention(h, **attention))
        h = torch.addcmul(mlp_shift, self.mlp_norm(x), 1 + mlp_scale)
        mlp = self.fc2(self.dropout(gelu(self.fc1(h))))
        return torch.addcmul(x, mlp_gate, self.dropout(mlp))


def by_kind(numbers: Float[Tensor, "b kinds d"], first: int, rows: int) -> Float[Tensor, "b _ d"]:
    """Return the numbers of each row, those of the first kind for the `first` rows."""
    if numbers.shape[1] == 1:
        return numbers
    head, rest = numbers.split(1, dim=1)
    return torch.cat([head.expand(-1, first, -1), rest.expand(-1, rows - first, -1)], dim=1)


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear map that puts out zeros until it is trained."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
