"""The post-norm encoder of BERT (Devlin et al., 2018, arXiv:1810.04805)."""

from jaxtyping import Float
from torch import Tensor, nn

from vistok.layers.vit import Mlp, SelfAttention

EPS = 1e-12  # of all its layer norms


class BertBlock(nn.Module):
    """Attention, then MLP, each added to its input and normalised after."""

    def __init__(self, width: int, num_heads: int, hidden_width: int, dropout: float):
        super().__init__()
        self.attn = SelfAttention(width, num_heads, dropout=dropout)
        self.ln_1 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, hidden_width)
        self.ln_2 = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        x = self.ln_1(x + self.dropout(self.attn(x)))
        return self.ln_2(x + self.dropout(self.mlp(x)))


class BertEncoder(nn.Module):
    """Embeddings, positions added, through `depth` blocks. Dropout is of embeddings, attention
    weights and both branches, in training."""

    def __init__(
        self, width: int, depth: int, num_heads: int, hidden_width: int, dropout: float = 0.1
    ):
        super().__init__()
        self.ln_pre = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            BertBlock(width, num_heads, hidden_width, dropout) for _ in range(depth)
        )

    def forward(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b n w"]:
        x = self.dropout(self.ln_pre(x))
        for block in self.blocks:
            x = block(x)
        return x
