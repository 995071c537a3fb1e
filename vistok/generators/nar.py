"""NAR (He et al., 2025, arXiv:2503.10696): every neighbour of the known tokens at once.

A head for each axis predicts the next position along it. The first stands on the backbone, each
further one on extra blocks above the one before; a position with several known neighbours takes the
mean of their logits.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vistok.decoding.plans import Pass
from vistok.generators.llamagen import LlamaGen
from vistok.heads.categorical import CategoricalHead
from vistok.models import register_to_config
from vistok.tokens import TokenSpec


class NAR(LlamaGen):
    """Args:
    spec: tokens to model; ids of a grid or video.
    class_names: names of the classes, in the order of their labels.
    depth: blocks of the backbone, below the first head.
    extra_depth: further blocks below each further head.
    transformer: as of `LlamaGen`, without `order`.

    The published image models have LlamaGen's sizes B, L, XL and XXL, and M: 1024, 18, 16. Those of
    video have learned positions: L 1024, 24, 16; LP 1280, 30, 20.
    """

    settled = ("order",)
    learned = ("nar",)

    @register_to_config
    def __init__(
        self,
        spec: TokenSpec,
        class_names: list[str],
        depth: int = 12,
        extra_depth: int = 1,
        **transformer,
    ):
        axes = len(spec.shape)
        super().__init__(
            spec, class_names, order="nar", depth=depth + extra_depth * (axes - 1), **transformer
        )
        self.tapped = [depth + extra_depth * axis for axis in range(axes)]
        dim = self.norm.weight.shape[0]
        self.norm = nn.ModuleList(copy.deepcopy(self.norm) for _ in range(axes))
        # The heads are linear: the mean of their logits is one product of all their inputs, each
        # weighted beforehand, with their matrices side by side.
        self.head = CategoricalHead(axes * dim, spec.vocab_size)

    def transformer(
        self, x: Float[Tensor, "b r d"], rotary: Tensor | None, **kwargs
    ) -> Float[Tensor, "h b r d"]:
        """Return the hidden states below each head."""
        states = []
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, layer=layer, **kwargs)
            if layer + 1 in self.tapped:
                states.append(x)
        return torch.stack(states)

    def predictive(self, hidden: Float[Tensor, "h b r d"], rows: Pass) -> Float[Tensor, "b s e"]:
        """Return each head's share of each prediction, side by side."""
        normed = torch.stack([norm(h) for norm, h in zip(self.norm, hidden, strict=True)])
        mixing = rows.mixing.to(normed.dtype)
        return torch.einsum("hsr,hbrd->bshd", mixing, normed).flatten(2)
