"""The trunk of xAR (Ren et al., 2025, arXiv:2502.20388) and FlowAR (Ren et al., 2024,
arXiv:2412.15205): two stacks of gated blocks over the same rows, of which each has a table of
positions and may have heads of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from vistok.layers.cache import KVCache
from vistok.layers.gated_transformer import EPS, GatedBlock
from vistok.layers.linear import Linear
from vistok.layers.norms import RMSNorm
from vistok.layers.rotary import rotary_factors


class Stack(nn.Module):
    """Blocks, then a norm. Rows lie at `coordinates`, by which attention turns them, and have rows
    of a table `position`, which whoever feeds the stack adds."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        hidden_dim: int,
        dropout: float,
        coordinates: Float[Tensor, "n axes"],
    ):
        super().__init__()
        self.position = nn.Parameter(torch.randn(len(coordinates), dim) * 0.02)
        self.blocks = nn.ModuleList(
            GatedBlock(dim, num_heads, hidden_dim, dropout) for _ in range(depth)
        )
        self.norm = RMSNorm(dim, eps=EPS)
        rotary = rotary_factors(coordinates, dim // num_heads)
        self.register_buffer("rotary", rotary, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "b r d"],
        places: Int64[Tensor, "r"],
        by: Sequence[Tensor],
        mask: Bool[Tensor, "r end"] | BlockMask | None,
        cache: KVCache | None,
    ) -> Float[Tensor, "b r d"]:
        rotary = self.rotary[:, places]
        for layer, block in enumerate(self.blocks):
            x = block(x, by[layer], rotary=rotary, mask=mask, cache=cache, layer=layer)
        return self.norm(x)


@dataclass(frozen=True)
class Caches:
    """Keys and values of both stacks."""

    encoder: KVCache
    decoder: KVCache

    def reset(self) -> None:
        self.encoder.reset()
        self.decoder.reset()

    def keep(self, batch: int) -> None:
        self.encoder.keep(batch)
        self.decoder.keep(batch)

    def advance(self, rows: int) -> None:
        self.encoder.advance(rows)
        self.decoder.advance(rows)


class GatedTrunk(nn.Module):
    """An encoder and a decoder, both over the same rows, which lie at `coordinates`; `encoder` and
    `decoder` are depth and heads of each."""

    def __init__(
        self,
        dim: int,
        encoder: tuple[int, int],
        decoder: tuple[int, int],
        hidden_dim: int,
        dropout: float,
        coordinates: Float[Tensor, "n axes"],
    ):
        super().__init__()
        self.embed_norm = RMSNorm(dim, eps=EPS)
        self.encoder = Stack(dim, *encoder, hidden_dim, dropout, coordinates)
        self.decoder_embed = Linear(dim, dim, bias=True)
        self.decoder = Stack(dim, *decoder, hidden_dim, dropout, coordinates)

    def modulations(self, condition: Float[Tensor, "b r d"]) -> list[Float[Tensor, "b r 6 d"]]:
        """Return what rows of a condition, or all rows of a sequence, are modulated by in each
        block."""
        blocks = (*self.encoder.blocks, *self.decoder.blocks)
        return [block.modulate(condition) for block in blocks]

    def linear_maps(self) -> list[Linear]:
        """Return those through which rows pass: all but the ones that make modulations."""
        maps = {n: m for n, m in self.named_modules() if isinstance(m, Linear)}
        return [module for name, module in maps.items() if not name.endswith("modulation")]

    def forward(
        self,
        x: Float[Tensor, "b r d"],
        places: Int64[Tensor, "r"],
        by: Float[Tensor, "_ _ d"] | list[Float[Tensor, "_ _ 6 d"]],
        mask: Bool[Tensor, "r end"] | BlockMask | None = None,
        caches: Caches | None = None,
    ) -> Float[Tensor, "b r d"]:
        """`places` are the positions of the rows; `by` are conditions of runs of rows, or what they
        modulate each block by; see `GatedBlock`."""
        of_encoder, of_decoder = (caches.encoder, caches.decoder) if caches else (None, None)
        depth = len(self.encoder.blocks)
        if isinstance(by, Tensor):
            by = [by] * (depth + len(self.decoder.blocks))
        x = self.embed_norm(x + self.encoder.position[places])
        x = self.encoder(x, places, by[:depth], mask, of_encoder)
        x = self.decoder_embed(x) + self.decoder.position[places]
        return self.decoder(x, places, by[depth:], mask, of_decoder)

    def new_caches(self, batch: int, length: int) -> Caches:
        """Return empty caches of so many sequences and rows."""
        place = self.decoder_embed.weight
        return Caches(
            *(
                KVCache(
                    len(stack.blocks),
                    batch,
                    stack.blocks[0].attention.num_heads,
                    length,
                    stack.blocks[0].attention.head_dim,
                    place.dtype,
                    place.device,
                )
                for stack in (self.encoder, self.decoder)
            )
        )
