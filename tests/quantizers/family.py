"""Tiny instances of every quantizer and of its main options, for tests that all of them pass.

Each is made of latents (b, 4, 5, `in_dim`) of about unit scale, and has codes of such a scale.
"""

from collections.abc import Callable

import torch

from vistok.quantizers import (
    EMAVQ,
    FSQ,
    IBQ,
    VQ,
    DimensionWise,
    DualVQ,
    NormEMAVQ,
    Quantizer,
    SimVQ,
    StochasticVQ,
)

POSITIONS = (4, 5)


def spread(quantizer: Quantizer) -> Quantizer:
    """Give the codebooks unit scale, so that latents of unit scale meet many codes."""
    for module in quantizer.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    return quantizer


QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "dimension-wise": lambda: DimensionWise(3, 6),
    "ema-vq": lambda: EMAVQ(20, 3),
    "ema-vq-cosine": lambda: EMAVQ(20, 3, l2_normalise=True, rotation=True),
    "ema-vq-kmeans-expiry": lambda: EMAVQ(20, 3, decay=0.9, expiry=0.5, kmeans=5),
    "dual-vq": lambda: spread(DualVQ(20, 3, 2, entropy=0.1)),
    "fsq": lambda: FSQ([8, 5, 4]),
    "ibq": lambda: IBQ(20, 3, entropy=0.05, entropy_temperature=0.1),
    "norm-ema-vq": lambda: NormEMAVQ(20, 3, decay=0.9),
    "sim-vq": lambda: SimVQ(20, 3),
    "sim-vq-rotation": lambda: SimVQ(20, 3, frozen_dim=5, rotation=True),
    "stochastic-vq": lambda: spread(StochasticVQ(20, 3, temperature=0.0)),
    "vq": lambda: spread(VQ(20, 3)),
    "vq-euclidean": lambda: spread(VQ(20, 3, l2_normalise=False)),
    "vq-learnable": lambda: spread(
        VQ(20, 3, False, 0.0, 0.0, joint=1.0, orthogonal=1.0, diversity=0.1)
    ),
    "vq-rotation": lambda: spread(VQ(20, 3, rotation=True)),
    "vq-search": lambda: spread(VQ(20, 3, l2_normalise="search")),
    "vq-entropy-revival": lambda: spread(VQ(20, 3, entropy=0.1, revival=True)),
}
