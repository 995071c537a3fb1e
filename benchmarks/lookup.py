"""Time the evaluation of a codebook (latents to ids and codes) beside that of the package
vector-quantize-pytorch, which it needs: pip install vector-quantize-pytorch

python benchmarks/lookup.py

Both sides have the same random table and latents, and run in turn in one process.
"""

import importlib
import statistics
import time

import torch
from torch import Tensor

from vistok.errors import UserError
from vistok.options import run
from vistok.quantizers import EMAVQ


def main(
    codes: int = 16384,
    dim: int = 8,
    tokens: list[int] | None = None,
    repeats: int = 7,
    threads: int = 1,
) -> None:
    """Print the times of both sides, how many times as long theirs takes, and the share of equal
    ids.

    Args:
        codes: rows of the table
        dim: channels of a latent
        tokens: latents looked up at once, each a line; by default 4,096 and 16,384
        repeats: timed runs of either side, in turn, of which the median counts
        threads: of the CPU
    """
    try:
        package = importlib.import_module("vector_quantize_pytorch")
    except ImportError:
        raise UserError(
            "benchmarks/lookup.py measures another package: pip install vector-quantize-pytorch"
        ) from None
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(
        f"{codes:,} codes of {dim} channels; CPU ({torch.backends.cpu.get_cpu_capability()}), "
        f"float32, {threads} thread(s): medians of {repeats}\n\n"
        "| distance | tokens | package, ms | vistok, ms | times as long | equal ids |\n"
        "|---|---|---|---|---|---|"
    )
    for cosine in (False, True):
        ours = EMAVQ(codes, dim, l2_normalise=cosine).eval()
        theirs = package.VectorQuantize(
            dim=dim, codebook_size=codes, use_cosine_sim=cosine, rotation_trick=False
        ).eval()
        theirs._codebook.embed.copy_(ours.codebook.unsqueeze(0))
        for count in tokens or (4096, 16384):
            latents = torch.randn(1, count, dim)
            seconds, equal = compare(ours, theirs, latents, repeats)
            package_ms, our_ms = (1000 * s for s in seconds)
            print(
                f"| {'cosine' if cosine else 'Euclid'} | {count:,} | {package_ms:.1f} | "
                f"{our_ms:.1f} | {package_ms / our_ms:.1f} | {equal:.3%} |",
                flush=True,
            )


@torch.no_grad()
def compare(
    ours: EMAVQ, theirs: torch.nn.Module, latents: Tensor, repeats: int
) -> tuple[tuple[float, float], float]:
    """Return the seconds of the package and ours, and the share of equal ids."""
    sides = (lambda: theirs(latents)[1], lambda: ours(latents).ids)
    ids = [side() for side in sides]  # which also warms up
    taken = [[timed(side) for side in sides] for _ in range(repeats)]
    package, our = map(statistics.median, zip(*taken, strict=True))
    return (package, our), (ids[0] == ids[1]).double().mean().item()


def timed(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    run(main)
