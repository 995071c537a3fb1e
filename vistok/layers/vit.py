"""The pre-norm transformer block of ViT (Dosovitskiy et al., 2020, arXiv:2010.11929)."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

Rows = slice | Int64[Tensor, "b m"]  # the same of all sequences, or each one's own
Activation = Callable[[Tensor], Tensor]


class SelfAttention(nn.Module):
    """Full multi-head attention; `qkv_bias` says whether queries, keys and values have biases,
    `dropout` is of the attention weights, in training."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        rows: Rows | None = None,
        visible: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b m w"]:
        """Return the output of `rows`, by default all, which look at the `visible` ones."""
        if rows is None:
            # B N 3W -> 3 x (B H N W/H)
            q, k, v = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self._projected(x, rows)
        mask = None if visible is None else visible[:, None, None]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _projected(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        sizes = (x.shape[-1], 2 * x.shape[-1])
        of_query, of_rest = self.in_proj.weight.split(sizes)
        biases = (None, None) if self.in_proj.bias is None else self.in_proj.bias.split(sizes)
        query = F.linear(take_rows(x, rows), of_query, biases[0])
        rest = F.linear(x, of_rest, biases[1]).unflatten(-1, (2, self.num_heads, -1))
        k, v = rest.permute(2, 0, 3, 1, 4)
        return query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2), k, v


class Mlp(nn.Module):
    """Two layers with an activation between, by default four times as wide inside."""

    def __init__(
        self,
        width: int,
        hidden_width: int | None = None,
        dropout: float = 0.0,
        activation: Activation = F.gelu,
    ):
        super().__init__()
        self.activation = activation
        self.c_fc = nn.Linear(width, hidden_width or 4 * width)
        self.c_proj = nn.Linear(hidden_width or 4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        return self.c_proj(self.dropout(self.activation(self.c_fc(x))))


class TransformerBlock(nn.Module):
    """Attention, then MLP, each after LayerNorm and added to its input. `dropout` is of attention
    weights, of the inside of the MLP and of what both add, in training."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        qkv_bias: bool = True,
        hidden_width: int | None = None,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        activation: Activation = F.gelu,
    ):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = SelfAttention(width, num_heads, qkv_bias, dropout)
        self.ln_2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, hidden_width, dropout, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        rows: Rows | None = None,
        visible: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b m w"]:
        """`rows` are those to return, for a last block; all but the `visible` ones are ignored as
        keys."""
        attended = self.attn(self.ln_1(x), rows, visible)
        x = (x if rows is None else take_rows(x, rows)) + self.dropout(attended)
        return x + self.dropout(self.mlp(self.ln_2(x)))


def take_rows(x: Float[Tensor, "b n w"], rows: Rows) -> Float[Tensor, "b m w"]:
    """Return `rows` of each sequence."""
    if isinstance(rows, slice):
        return x[:, rows]
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))
