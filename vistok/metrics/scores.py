"""Scores of images: as sets (Fréchet distance, KID, Inception score, precision and recall), in
pairs (PSNR, SSIM), and of codes (usage, perplexity, entropy by position).

All sets are of features of `vistok.metrics.features`, in float64.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vistok.errors import UserError

MIN_MSE = 1e-10  # equal images count as 100 dB, so that a mean over images stays finite


def frechet_distance(
    mean_a: Float[Tensor, "d"],
    covariance_a: Float[Tensor, "d d"],
    mean_b: Float[Tensor, "d"],
    covariance_b: Float[Tensor, "d d"],
) -> float:
    """Return |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al., 2017, equation 6).

    The trace of (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2); unlike square
    roots of eigenvalues of A B it stays exact where fewer images than dimensions make A singular.
    """
    root_a, root_b = (_square_root(c.double()) for c in (covariance_a, covariance_b))
    cross = torch.linalg.svdvals(root_a.T @ root_b).sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return float(shift + root_a.square().sum() + root_b.square().sum() - 2 * cross)


def _square_root(covariance: Tensor) -> Tensor:
    """Return R with R R^T = covariance; eigenvalues below zero are rounding errors."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def inception_score(
    logits: Float[Tensor, "n c"], splits: int = 10, seed: int = 2020
) -> tuple[float, float]:
    """Return mean and deviation over `splits` of exp E KL(p(y|x) || p(y)) (Salimans et al., 2016).

    Images are shuffled first, as splits of images sorted by class would each hold few classes.
    """
    count = len(logits)
    _require("inception score", count, splits)
    order = torch.from_numpy(np.random.RandomState(seed).permutation(count))
    logs = logits[order].double().log_softmax(1)
    bounds = [i * count // splits for i in range(splits + 1)]
    scores = []
    for low, high in itertools.pairwise(bounds):
        split = logs[low:high]
        marginal = split.exp().mean(0).log()
        scores.append((split.exp() * (split - marginal)).sum(1).mean().exp())
    return _mean_and_deviation(torch.stack(scores))


def kid(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Return mean and deviation over random subsets of the squared maximum mean discrepancy under
    the kernel (x.y / d + 1)^3 (Bińkowski et al., 2018)."""
    _require("KID", min(len(a), len(b)), max(2, subset_size))
    random = np.random.RandomState(seed)
    a, b = a.double(), b.double()
    distances = []
    for _ in range(subsets):
        x = a[torch.from_numpy(random.choice(len(a), subset_size, replace=False))]
        y = b[torch.from_numpy(random.choice(len(b), subset_size, replace=False))]
        distances.append(_mmd2(x, y))
    return _mean_and_deviation(torch.stack(distances))


def _mmd2(x: Float[Tensor, "m d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Unbiased within each set; across, pairs of equal position count as others do."""
    m = len(x)
    xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return within / (m * (m - 1)) - 2 * xy.sum() / m**2


def precision_recall(
    generated: Float[Tensor, "n d"], real: Float[Tensor, "m d"], neighbours: int = 3
) -> tuple[float, float]:
    """Return the shares of generated images near real ones and of real images near generated ones
    (Kynkäänniemi et al., 2019): within the distance of some image to its k-th neighbour."""
    _require("precision and recall", min(len(generated), len(real)), neighbours + 1)
    generated, real = generated.double(), real.double()
    return (
        _share_inside(generated, real, neighbours),
        _share_inside(real, generated, neighbours),
    )


def _share_inside(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Return the share of `points` inside the manifold that `centres` span."""
    rows = 1024  # bounds the memory of a block of distances
    # A centre is its own nearest neighbour, at distance 0.
    radii = [
        torch.cdist(block, centres).kthvalue(neighbours + 1).values for block in centres.split(rows)
    ]
    radii = torch.cat(radii)
    inside = [(torch.cdist(block, centres) <= radii).any(1) for block in points.split(rows)]
    return float(torch.cat(inside).double().mean())


def psnr(
    images: Float[Tensor, "b c h w"], references: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b"]:
    """Return the peak signal-to-noise ratio of each image in [0, 1], in dB, at most 100."""
    mse = (images.float() - references.float()).square().mean((1, 2, 3))
    return -10 * mse.clamp(min=MIN_MSE).log10()


def ssim(
    images: Float[Tensor, "b c h w"], references: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b"]:
    """Return the structural similarity of each image in [0, 1] (Wang et al., 2004): Gaussian window
    of 11 x 11 and sigma 1.5 where it fits inside, mean over positions and channels."""
    size, c1, c2 = 11, 0.01**2, 0.03**2
    if min(images.shape[2:]) < size:
        raise UserError(f"SSIM needs images of at least {size} x {size}, got {images.shape[2:]}")
    offsets = torch.arange(size, device=images.device) - size // 2
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(maps: Tensor) -> Tensor:
        maps = maps.flatten(0, 1).unsqueeze(1)  # (b c) 1 h w
        maps = F.conv2d(F.conv2d(maps, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return maps.squeeze(1).unflatten(0, images.shape[:2])

    x, y = images.float(), references.float()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.mean((1, 2, 3))


def code_counts(tokens: Int64[Tensor, "b *positions"], num_codes: int) -> Int64[Tensor, "p v"]:
    """Return how often each of `num_codes` came at each position of an image, positions in a row.
    Counts of batches and processes add up; summed over positions they are a codebook's histogram.
    """
    flat = tokens.flatten(1)
    positions = flat.shape[1]
    first = num_codes * torch.arange(positions, device=tokens.device)
    counts = torch.bincount((flat + first).flatten(), minlength=positions * num_codes)
    return counts.view(positions, num_codes)


def code_entropy(counts: Int64[Tensor, "*positions v"]) -> Float64[Tensor, "*positions"]:
    """Return the entropy of codes in bits, of each histogram: what a code says at most. Over the
    positions it tells where a sequence tokenizer puts its information, and which positions idle."""
    p = counts.double() / counts.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1) / math.log(2)


def codebook_usage(histogram: Int64[Tensor, "v"]) -> tuple[float, float]:
    """Return the share of codes that occur, and the perplexity of the codes: 2 to the entropy."""
    return float((histogram > 0).double().mean()), 2 ** float(code_entropy(histogram))


def _mean_and_deviation(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std(correction=0))


def _require(metric: str, count: int, needed: int) -> None:
    if count < needed:
        raise UserError(f"{count} image(s) are too few for {metric}: at least {needed}")
