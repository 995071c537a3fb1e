"""Latents to codes and back: one file per quantizer."""

from vistok.quantizers.base import Quantized, Quantizer, code_statistics
from vistok.quantizers.dimension_wise import DimensionWise
from vistok.quantizers.fsq import FSQ
from vistok.quantizers.gaussian import Gaussian
from vistok.quantizers.multi_scale import MultiScale
from vistok.quantizers.stochastic_vq import StochasticVQ
from vistok.quantizers.vq import VQ

__all__ = [
    "FSQ",
    "VQ",
    "DimensionWise",
    "Gaussian",
    "MultiScale",
    "Quantized",
    "Quantizer",
    "StochasticVQ",
    "code_statistics",
]
