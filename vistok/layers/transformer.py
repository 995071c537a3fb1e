"""The Llama block (Touvron et al., 2023): pre-norm attention with rotary positions, and SwiGLU."""

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention, silu

from vistok.layers.cache import KVCache
from vistok.layers.linear import Linear
from vistok.layers.rotary import rotate

Norm = Callable[[int], nn.Module]  # from a width


@lru_cache
def fused_flex_attention():
    """FlexAttention without its scores in memory, which it is only when compiled."""
    return torch.compile(flex_attention)


class Attention(nn.Module):
    """Multi-head attention with rotary positions and, where `num_kv_heads` is smaller, grouped
    keys and values (Ainslie et al., 2023). By default no biases; `out_bias` where the output's
    differs. `qk_norm` normalises queries and keys over a head before they are turned (Dehghani et
    al., 2023, arXiv:2302.05442); `scale` multiplies their products, by default by one over the root
    of the head's width; `weight_dropout` is of the attention weights, in training."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        dropout: float,
        qk_norm: Norm | None = None,
        scale: float | None = None,
        bias: bool = False,
        weight_dropout: float = 0.0,
        out_bias: bool | None = None,
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.qkv = Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias)
        self.out = Linear(num_heads * self.head_dim, dim, bias if out_bias is None else out_bias)
        self.dropout, self.weight_dropout = nn.Dropout(dropout), weight_dropout
        self.q_norm = qk_norm(self.head_dim) if qk_norm else None
        self.k_norm = qk_norm(self.head_dim) if qk_norm else None
        self.scale = scale

    def forward(
        self,
        x: Float[Tensor, "b r d"],
        rotary: Float[Tensor, "2 r hd"] | None = None,
        mask: Tensor | BlockMask | None = None,
        is_causal: bool = False,
        cache: KVCache | None = None,
        layer: int = 0,
        slots: Int64[Tensor, "r"] | None = None,
        end: int = 0,
    ) -> Float[Tensor, "b r d"]:
        """`mask` is true where a row (next to last axis) sees a key (last axis), or is added to
        their logit; with `cache`, keys are its rows: all, or with `slots` those before `end`."""
        heads = self.qkv(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        turned, value = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], 1)
        query, key = turned.split([self.num_heads, self.num_kv_heads], 1)
        if self.q_norm is not None:
            query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if rotary is not None:
            turned = turned if self.q_norm is None else torch.cat([query, key], 1)
            query, key = rotate(turned, rotary).split([self.num_heads, self.num_kv_heads], 1)
        if cache is not None and slots is not None:
            key, value = cache.write(layer, key, value, slots, end)
        elif cache is not None:
            key, value = cache.append(layer, key, value)
        grouped = self.num_kv_heads < self.num_heads
        if isinstance(mask, BlockMask):
            attend = fused_flex_attention() if query.is_cuda else flex_attention
            mixed = attend(query, key, value, block_mask=mask, scale=self.scale, enable_gqa=grouped)
        else:
            mixed = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=self.weight_dropout if self.training else 0.0,
                is_causal=is_causal,
                scale=self.scale,
                enable_gqa=grouped,
            )
        out = self.out(mixed.transpose(1, 2).flatten(2))
        return self.dropout(out) if self.training else out


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, 2020); gate and value share one matrix product."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.gate_value = Linear(dim, 2 * hidden_dim)
        self.out = Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b r d"]) -> Float[Tensor, "b r d"]:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        out = self.out(silu(gate) * value)
        return self.dropout(out) if self.training else out


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). `attention` are further arguments of
    `Attention`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        hidden_dim: int,
        dropout: float,
        norm: Norm,
        **attention,
    ):
        super().__init__()
        self.attention_norm = norm(dim)
        self.attention = Attention(dim, num_heads, num_kv_heads, dropout, **attention)
        self.feed_forward_norm = norm(dim)
        self.feed_forward = SwiGLU(dim, hidden_dim, dropout)

    def forward(self, x: Float[Tensor, "b r d"], *args, **kwargs) -> Float[Tensor, "b r d"]:
        x = x + self.attention(self.attention_norm(x), *args, **kwargs)
        return x + self.feed_forward(self.feed_forward_norm(x))


def swiglu_width(dim: int, multiple_of: int = 256) -> int:
    """Llama's hidden width: two thirds of 4 dim, rounded up to a multiple."""
    return -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of
