"""Our scores of reconstructions and codes against One-D-Piece's evaluator's, in the folder
VISTOK_PARITY."""

import math

import pytest
import torch
from official import Case, cases

from vistok.data import to_uint8
from vistok.metrics import (
    Moments,
    code_counts,
    code_entropy,
    codebook_usage,
    frechet_distance,
    inception_score,
)

UNCOMPARED: dict[str, str] = {}
ADDED = 1e-8  # to each probability inside the official logarithm of an entropy


def moments_of(batches) -> Moments:
    moments = Moments(batches[0].shape[1])
    for batch in batches:
        moments.update(batch)
    return moments


def shifted(entropy, counts):
    """Return the official entropy, -sum p log2(p + 1e-8), from the exact one."""
    p = counts.double() / counts.sum(-1, keepdim=True)
    shift = torch.where(counts > 0, p * torch.log1p(ADDED / p), 0.0).sum(-1) / math.log(2)
    return entropy - shift


@pytest.mark.parametrize("folder", cases("one_d_piece", lambda d: d["kind"] == "OdpMetrics"))
def test_metrics(folder):
    case = Case(folder)
    inputs, split = case.inputs, int(case.inputs["split"])
    real, fake, ids = (
        (inputs[name][:split], inputs[name][split:]) for name in ("feat_real", "feat_fake", "ids")
    )
    a, b = moments_of(real), moments_of(fake)
    distance = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    case.compare("rfid", torch.tensor(distance, dtype=torch.float64))
    score = inception_score(inputs["logits_fake"], splits=1)[0]
    case.compare("inception_score", torch.tensor(score, dtype=torch.float64))

    counts = sum(code_counts(batch.flatten(1), case.config["codebook_size"]) for batch in ids)
    histogram = counts.sum(0)
    usage, perplexity = codebook_usage(histogram)
    case.compare("codebook_usage", torch.tensor(usage, dtype=torch.float64))
    entropy = torch.tensor(math.log2(perplexity), dtype=torch.float64)
    case.compare("codebook_entropy", shifted(entropy, histogram))
    case.compare("codebook_min_freq", histogram.min())
    case.compare("codebook_max_freq", histogram.max())
    # The official table has a fixed number of rows, of which those beyond a sequence say nothing.
    case.compare(
        "entropy_per_position",
        shifted(code_entropy(counts), counts),
        part=lambda bits: bits[: len(counts)],
    )

    # The official evaluator cuts off what our pictures round.
    image = inputs["image"]
    case.compare("uint8", (255 * image).byte())
    assert (to_uint8(image) - 255 * image).abs().max() <= 0.5
    case.finish(UNCOMPARED)
