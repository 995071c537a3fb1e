"""U-ViT (Bao et al., 2022, arXiv:2209.12152): a transformer with the long skips of a U-net."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vistok.layers.vit import TransformerBlock


class UViTEncoder(nn.Module):
    """Embeddings, positions added, through `depth` // 2 blocks, one more, and `depth` // 2 blocks
    that each also take what the mirrored one of the first half put out; then a layer norm. Queries,
    keys and values have no biases."""

    def __init__(self, width: int, depth: int, num_heads: int, hidden_width: int):
        super().__init__()
        half = depth // 2
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, qkv_bias=False, hidden_width=hidden_width)
            for _ in range(2 * half + 1)
        )
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(half))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        half = len(self.skips)
        kept = []
        for block in self.blocks[:half]:
            x = block(x)
            kept.append(x)
        x = self.blocks[half](x)
        for skip, block in zip(self.skips, self.blocks[half + 1 :], strict=True):
            x = block(skip(torch.cat([x, kept.pop()], dim=-1)))
        return self.ln_post(x)
