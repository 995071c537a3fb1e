"""What quantizers made of others share: several codes per latent."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.quantizers.base import Quantizer
from vistok.tokens import TokenSpec


class Composite(Quantizer):
    """Codes of several quantizers, side by side in the last axis of the ids, in their order; those
    of one that has several itself stand together.

    Attributes: `quantizers`, of which a shared one stands there once, `each`, where it stands as
    often as it is used, and `levels`, the codes that each id counts.

    Args:
        quantizer: one, of which freshly made copies are taken, or all of them.
        count: uses of one quantizer.
        shared: the same codebook at every use instead of copies.
    """

    def __init__(self, quantizer: Quantizer | Sequence[Quantizer], count: int | None, shared: bool):
        super().__init__()
        name = type(self).__name__
        if isinstance(quantizer, Quantizer):
            if count is None or count < 1:
                raise UserError(f"{name}: how often one quantizer is used must be 1 or more")
            copies = [] if shared else [_copy(quantizer) for _ in range(count - 1)]
            quantizers = [quantizer, *copies]
        else:
            quantizers = list(quantizer)
            if shared or count not in (None, len(quantizers)) or not quantizers:
                raise UserError(
                    f"{name}: got a list of {len(quantizers)} quantizers; one alone can be shared "
                    "or used several times"
                )
        for part in quantizers:
            if part.vocab_size is None or part.draws:
                raise UserError(f"{name}: {type(part).__name__} draws latents, which are no codes")
        self.quantizers = nn.ModuleList(quantizers)
        self.shared = shared
        self.count = count or len(quantizers)
        self.vocab_size = math.prod(part.vocab_size for part in self.each)
        parts = [ids_of_one(part) for part in self.each]
        self.levels = tuple(n for part in parts for n in part.levels or (part.vocab_size,))
        # How many ids of a latent each has in an axis of their own, 0 without such an axis.
        self.widths = [len(part.levels or ()) for part in parts]

    @property
    def each(self) -> list[Quantizer]:
        return [self.quantizers[0]] * self.count if self.shared else list(self.quantizers)

    def spec(self, shape: Sequence[int], ordered: bool = False) -> TokenSpec:
        positions = self.quantizers[0].spec(shape, ordered)
        return TokenSpec.factorised(positions.shape, self.levels, positions.ordered)

    def _joined(self, ids: Sequence[Tensor]) -> Int64[Tensor, "*positions n"]:
        """Return the ids of all, given those of each."""
        rows = zip(ids, self.widths, strict=True)
        return torch.cat([part if width else part.unsqueeze(-1) for part, width in rows], dim=-1)

    def _apart(self, ids: Int64[Tensor, "*positions n"]) -> list[Tensor]:
        """Return the ids of each quantizer, or of the first few that `ids` are those of."""
        found, start = [], 0
        for width in self.widths:
            if start == ids.shape[-1]:
                break
            part = ids[..., start : start + (width or 1)]
            found.append(part if width else part.squeeze(-1))
            start += width or 1
        return found


def ids_of_one(quantizer: Quantizer) -> TokenSpec:
    """Return what becomes of one latent, wherever it stands."""
    while hasattr(quantizer, "quantizer"):  # of the scales of a `MultiScale`
        quantizer = quantizer.quantizer
    return quantizer.spec((1,))


def total(losses: Sequence[dict[str, Float[Tensor, ""]]]) -> dict[str, Float[Tensor, ""]]:
    """Return the sum of each of several quantizers' losses."""
    names = dict.fromkeys(name for of_one in losses for name in of_one)
    return {name: sum(of_one[name] for of_one in losses if name in of_one) for name in names}


def _copy(quantizer: Quantizer) -> Quantizer:
    """Return a quantizer of the same arguments with weights of its own."""
    kind = type(quantizer)
    return kind(**kind.revive(quantizer.arguments, kind.__name__))
