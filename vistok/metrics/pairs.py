"""Scores of images against their originals, one by one, and of the codes in between."""

from collections.abc import Callable

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vistok.metrics.scores import code_counts, code_entropy, codebook_usage, psnr, ssim
from vistok.metrics.statistics import IndexedTable, all_reduce


class PairScores:
    """Means over images 0 to `count` - 1 of PSNR, SSIM and, where it is given, `lpips`; usage and
    perplexity of a codebook of `num_codes` (0: there is none). Equal on any number of processes.

    Attributes: `metrics`, the names of what is scored; after `reduce`, `position_bits`, the entropy
    of the codes at each of `num_positions` places of an image.
    """

    position_bits: list[float] | None = None

    def __init__(
        self,
        count: int,
        num_codes: int = 0,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
        num_positions: int = 1,
    ):
        self.functions = {"psnr": psnr, "ssim": ssim} | ({"lpips": lpips} if lpips else {})
        self.table = IndexedTable(count, len(self.functions), device=device)
        shape = (num_positions, num_codes)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device) if num_codes else None
        self.metrics = (*self.functions, *(("codebook",) if num_codes else ()))

    @torch.inference_mode()
    def update(
        self,
        indices: Int64[Tensor, "b"],
        images: UInt8[Tensor, "b c h w"],
        originals: UInt8[Tensor, "b c h w"],
        tokens: Tensor,
    ) -> None:
        """Add some images; `tokens` are their codes, not read where there is no codebook."""
        pair = images / 255, originals.to(images.device) / 255
        values = [function(*pair) for function in self.functions.values()]
        self.table.update(indices, torch.stack(values, dim=1))
        if self.counts is not None:
            positions, num_codes = self.counts.shape
            self.counts += code_counts(tokens.reshape(-1, positions), num_codes)

    def reduce(self) -> dict[str, float]:
        """Return the scores of what all processes added, on each of them."""
        means = self.table.all_reduce().cpu().double().mean(0).tolist()
        scores = dict(zip(self.functions, means, strict=True))
        if self.counts is not None:
            counts = all_reduce(self.counts).cpu()
            self.position_bits = code_entropy(counts).tolist()
            usage, perplexity = codebook_usage(counts.sum(0))
            scores |= {"codebook_usage": usage, "codebook_perplexity": perplexity}
        return scores
