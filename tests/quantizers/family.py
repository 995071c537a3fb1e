"""Tiny instances of every quantizer and of its main options, for tests that all of them pass.

Each is made of latents (b, 4, 5, `in_dim`) of about unit scale, and has codes of such a scale.
Soft assignments are at high temperatures: at the usual ones, gradients are so steep that rounding
alone soon leads two runs apart.
"""

from collections.abc import Callable

import torch

from vistok.quantizers import (
    BSQ,
    EMAVQ,
    FSQ,
    IBQ,
    LFQ,
    VQ,
    DimensionWise,
    DualVQ,
    MultiScale,
    NormEMAVQ,
    Product,
    Projected,
    Quantizer,
    Residual,
    ResidualFSQ,
    ResidualLFQ,
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
    "bsq": lambda: BSQ(4, entropy=0.1, temperature=0.5),
    "bsq-codes": lambda: BSQ(5, bitwise=False, commitment=0.25, temperature=0.5),
    "dimension-wise": lambda: DimensionWise(3, 6),
    "ema-vq": lambda: EMAVQ(20, 3),
    "ema-vq-cosine": lambda: EMAVQ(20, 3, l2_normalise=True, rotation=True),
    "ema-vq-kmeans-expiry": lambda: EMAVQ(20, 3, decay=0.9, expiry=0.5, kmeans=5),
    "dual-vq": lambda: spread(DualVQ(20, 3, 2, entropy=0.1, entropy_temperature=1.0)),
    "fsq": lambda: FSQ([8, 5, 4]),
    "fsq-symmetric": lambda: FSQ([5, 2, 4], symmetric=True),
    "ibq": lambda: IBQ(20, 3, entropy=0.05, entropy_temperature=0.1),
    "lfq": lambda: LFQ(6, temperature=1.0),
    "lfq-factors": lambda: LFQ(5, temperature=1.0, factors=(2, 3)),
    "multi-scale": lambda: spread(
        MultiScale(VQ(20, 3, commitment=0.0, codebook_weight=0.0), [1, (2, 3), POSITIONS], 2)
    ),
    "multi-scale-ema": lambda: MultiScale(
        EMAVQ(20, 3, decay=0.9, expiry=0.5), [1, (2, 3), POSITIONS], smoothers=0, jointly=False
    ),
    "norm-ema-vq": lambda: NormEMAVQ(20, 3, decay=0.9),
    "product": lambda: spread(
        Product([VQ(20, 2), FSQ([5, 4]), LFQ(4, temperature=1.0, factors=(1, 3))])
    ),
    "product-residual": lambda: spread(Product(Residual(EMAVQ(20, 2), 2), 2)),
    "product-shared": lambda: Product(EMAVQ(60, 2, expiry=0.2), 3, shared=True),
    "projected": lambda: Projected(EMAVQ(20, 3, rotation=True), 5),
    "residual": lambda: spread(Residual(VQ(20, 3, l2_normalise=False), 3, least_layers=3)),
    "residual-ema": lambda: Residual(EMAVQ(20, 3, decay=0.9, expiry=0.5, kmeans=3), 2),
    "residual-fsq": lambda: ResidualFSQ([5, 4], 2),
    "residual-lfq": lambda: ResidualLFQ(3, 2, temperature=1.0),
    "residual-shared": lambda: Residual(EMAVQ(20, 3, decay=0.9, expiry=0.5), 3, shared=True),
    "sim-vq": lambda: SimVQ(20, 3),
    "sim-vq-rotation": lambda: SimVQ(20, 3, frozen_dim=5, rotation=True),
    "stochastic-vq": lambda: spread(StochasticVQ(20, 3, temperature=0.0)),
    "vq": lambda: spread(VQ(20, 3)),
    "vq-euclidean": lambda: spread(VQ(20, 3, l2_normalise=False)),
    "vq-learnable": lambda: spread(
        VQ(
            20,
            3,
            False,
            0.0,
            0.0,
            joint=1.0,
            orthogonal=1.0,
            diversity=0.1,
            diversity_temperature=1.0,
        )
    ),
    "vq-rotation": lambda: spread(VQ(20, 3, rotation=True)),
    "vq-search": lambda: spread(VQ(20, 3, l2_normalise="search")),
    "vq-entropy-revival": lambda: spread(
        VQ(20, 3, entropy=0.1, entropy_temperature=1.0, revival=True)
    ),
}
