"""Tiny instances of every quantizer and of its main options, for tests that all of them pass.

Each is made of latents (b, 4, 5, `in_dim`) of about unit scale, and has codes of such a scale.
"""

from collections.abc import Callable

import torch

from vistok.quantizers import FSQ, VQ, DimensionWise, Quantizer, StochasticVQ

POSITIONS = (4, 5)


def spread(quantizer: Quantizer) -> Quantizer:
    """Give the codebooks unit scale, so that latents of unit scale meet many codes."""
    for module in quantizer.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    return quantizer


QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "dimension-wise": lambda: DimensionWise(3, 6),
    "fsq": lambda: FSQ([8, 5, 4]),
    "stochastic-vq": lambda: spread(StochasticVQ(20, 3, temperature=0.0)),
    "vq": lambda: spread(VQ(20, 3)),
    "vq-euclidean": lambda: spread(VQ(20, 3, l2_normalise=False)),
    "vq-entropy-revival": lambda: spread(VQ(20, 3, entropy=0.1, revival=True)),
}
