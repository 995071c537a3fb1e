"""Scores against torch-fidelity's own, closed forms and direct sums."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from vistok.errors import UserError
from vistok.metrics import (
    code_counts,
    code_entropy,
    codebook_usage,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
    psnr,
    ssim,
)

SAME = {"rel": 1e-6}
CASES = [(0, 200, 150, 8), (1, 300, 300, 16), (2, 120, 400, 32), (3, 64, 80, 5), (4, 500, 90, 3)]


def features(seed: int, n: int, m: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of correlated, shifted, heavy-tailed vectors."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    a = torch.randn(n, d, generator=g, dtype=torch.float64) @ mix
    b = torch.randn(m, d, generator=g, dtype=torch.float64).pow(3) @ mix + 0.3
    return a, b


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.mean(0), torch.cov(x.T)


@pytest.mark.parametrize("case", CASES)
def test_frechet_distance_is_torch_fidelitys(case):
    a, b = features(*case)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False
    )
    ours = frechet_distance(*moments(a), *moments(b))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], **SAME)


def test_frechet_distance_of_commuting_covariances():
    a, b = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 9.0, 0.25])
    shift = torch.tensor([1.0, -2.0, 0.5])
    expected = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(shift, a.diag(), torch.zeros(3), b.diag()) == pytest.approx(expected)


@pytest.mark.parametrize("count", [40, 400])
def test_frechet_distance_of_equal_sets_is_zero(count):
    """Also with fewer images than dimensions, and with dimensions that hardly vary."""
    x, _ = features(0, count, 2, 128)
    x = x * torch.logspace(0, -7, 128, dtype=torch.float64)
    assert abs(frechet_distance(*moments(x), *moments(x))) < 1e-6
    constant = torch.ones(5, 4)
    assert frechet_distance(*moments(constant), *moments(constant)) == 0


@pytest.mark.parametrize("case", CASES)
def test_kid_is_torch_fidelitys(case):
    a, b = features(*case)
    theirs = kid_features_to_metric(a, b, kid_subsets=7, kid_subset_size=50, verbose=False)
    mean, deviation = kid(a, b, subsets=7, subset_size=50)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], **SAME)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], **SAME)


@pytest.mark.parametrize("case", CASES)
def test_precision_recall_is_torch_fidelitys(case):
    generated, real = features(*case)
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=3, verbose=False)
    precision, recall = precision_recall(generated, real)
    assert precision == pytest.approx(theirs["precision"], **SAME)
    assert recall == pytest.approx(theirs["recall"], **SAME)
    assert (precision, recall) != (recall, precision) or case[1] == case[2]


@pytest.mark.parametrize("case", CASES)
def test_inception_score_is_torch_fidelitys(case):
    logits, _ = features(*case)
    theirs = isc_features_to_metric(logits.float(), splits=10)
    mean, deviation = inception_score(logits.float())
    assert mean == pytest.approx(theirs["inception_score_mean"], **SAME)
    assert deviation == pytest.approx(theirs["inception_score_std"], **SAME)


def test_inception_score_does_not_depend_on_the_order_of_classes():
    """Sorted by class, each split in order would hold one class and score 1."""
    sorted_by_class = 20 * torch.eye(10).repeat_interleave(100, dim=0)
    assert inception_score(sorted_by_class)[0] > 9


@pytest.mark.parametrize(
    "metric", [lambda x: inception_score(x), lambda x: kid(x, x), lambda x: precision_recall(x, x)]
)
def test_too_few_images_are_refused(metric):
    with pytest.raises(UserError, match=r"3 image\(s\) are too few"):
        metric(torch.randn(3, 4))


def test_psnr():
    image = torch.full((2, 3, 4, 4), 0.5)
    other = image + torch.tensor([0.1, 0.0]).view(2, 1, 1, 1)
    assert psnr(image, other).tolist() == pytest.approx([20.0, 100.0], rel=1e-5)


def test_ssim_is_the_mean_over_windows():
    x, y = torch.rand(2, 3, 16, 14), torch.rand(2, 3, 16, 14)
    y = (x + 0.3 * y) / 1.3
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2
    expected = []
    for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True):
        values = []
        for channel in range(3):
            for i in range(16 - 10):
                for j in range(14 - 10):
                    p, q = (z[channel, i : i + 11, j : j + 11] for z in (a, b))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    luminance = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
                    values.append(luminance * (2 * cov + 9e-4) / (vp + vq + 9e-4))
        expected.append(np.mean(values))
    assert ssim(x, y).tolist() == pytest.approx(expected, rel=1e-4)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(UserError, match="11 x 11"):
        ssim(x[..., :10], y[..., :10])


def test_code_counts_add_up_over_batches_and_positions():
    tokens = torch.randint(5, (12, 2, 3))
    counts = code_counts(tokens, 5)
    assert counts.shape == (6, 5)
    for position in range(6):
        expected = torch.bincount(tokens.flatten(1)[:, position], minlength=5)
        assert torch.equal(counts[position], expected)
    assert torch.equal(counts, code_counts(tokens[:7], 5) + code_counts(tokens[7:], 5))
    assert torch.equal(counts.sum(0), torch.bincount(tokens.flatten(), minlength=5))


def test_code_entropy_is_in_bits():
    counts = torch.tensor([[4, 4, 4, 4], [9, 0, 0, 0], [2, 2, 0, 0]])
    assert code_entropy(counts).tolist() == pytest.approx([2.0, 0.0, 1.0])
    perplexity = codebook_usage(counts[2])[1]
    assert math.log2(perplexity) == pytest.approx(float(code_entropy(counts[2])))


def test_codebook_usage():
    assert codebook_usage(torch.tensor([5, 5, 5, 5])) == pytest.approx((1.0, 4.0))
    assert codebook_usage(torch.tensor([9, 0, 0, 0])) == pytest.approx((0.25, 1.0))
    usage, perplexity = codebook_usage(torch.tensor([3, 1, 0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert (usage, perplexity) == pytest.approx((2 / 3, math.exp(entropy)))
