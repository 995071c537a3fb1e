"""Latents to codes and back: one file per quantizer."""

from vistok.quantizers.base import Quantized, Quantizer, code_statistics
from vistok.quantizers.dimension_wise import DimensionWise
from vistok.quantizers.dual import DualVQ
from vistok.quantizers.ema_vq import EMAVQ, NormEMAVQ
from vistok.quantizers.fsq import FSQ
from vistok.quantizers.gaussian import Gaussian
from vistok.quantizers.ibq import IBQ
from vistok.quantizers.lfq import BSQ, LFQ, reverse_bits
from vistok.quantizers.multi_scale import MultiScale
from vistok.quantizers.product import Product
from vistok.quantizers.projected import Projected
from vistok.quantizers.residual import Residual, ResidualFSQ, ResidualLFQ
from vistok.quantizers.sim_vq import SimVQ
from vistok.quantizers.stochastic_vq import StochasticVQ
from vistok.quantizers.vq import VQ

__all__ = [
    "BSQ",
    "EMAVQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "VQ",
    "DimensionWise",
    "DualVQ",
    "Gaussian",
    "MultiScale",
    "NormEMAVQ",
    "Product",
    "Projected",
    "Quantized",
    "Quantizer",
    "Residual",
    "ResidualFSQ",
    "ResidualLFQ",
    "SimVQ",
    "StochasticVQ",
    "code_statistics",
    "reverse_bits",
]
