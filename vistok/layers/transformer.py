"""The Llama block (Touvron et al., 2023): pre-norm attention with rotary positions, and SwiGLU."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from vistok.layers.cache import KVCache
from vistok.layers.norms import RMSNorm
from vistok.layers.rotary import rotate


class Attention(nn.Module):
    """Multi-head attention with rotary positions and, where `num_kv_heads` is smaller, grouped
    keys and values (Ainslie et al., 2023). No biases."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b r d"],
        rotary: Float[Tensor, "r pairs 2"],
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "b r d"]:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
        query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        mixed = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            enable_gqa=self.num_kv_heads < self.num_heads,
        )
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, 2020); gate and value share one matrix product."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.gate_value = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b r d"]) -> Float[Tensor, "b r d"]:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.dropout(self.out(silu(gate) * value))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, hidden_dim: int, dropout: float
    ):
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim, num_heads, num_kv_heads, dropout)
        self.feed_forward_norm = RMSNorm(dim, eps=1e-5)
        self.feed_forward = SwiGLU(dim, hidden_dim, dropout)

    def forward(self, x: Float[Tensor, "b r d"], *args, **kwargs) -> Float[Tensor, "b r d"]:
        x = x + self.attention(self.attention_norm(x), *args, **kwargs)
        return x + self.feed_forward(self.feed_forward_norm(x))


def swiglu_width(dim: int, multiple_of: int = 256) -> int:
    """Llama's hidden width: two thirds of 4 dim, rounded up to a multiple."""
    return -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of
