"""Decoding outside the model: plans, the loop, sampling, schedules and noise."""

from vistok.decoding.adaptive import decode_adaptively
from vistok.decoding.loop import Decoding, DecodingOptions, Draw, Given, decode
from vistok.decoding.masked import decode_masked
from vistok.decoding.noise import Noise, StoredNoise
from vistok.decoding.orders import Order
from vistok.decoding.plans import MaskedPlan, Pass, Plan, RandomPlan
from vistok.decoding.random_sets import decode_random
from vistok.decoding.samplers import Sampler
from vistok.decoding.sampling import Sampling, probabilities, sample_categorical
from vistok.decoding.schedules import Corrected, Schedule

__all__ = [
    "Corrected",
    "Decoding",
    "DecodingOptions",
    "Draw",
    "Given",
    "MaskedPlan",
    "Noise",
    "Order",
    "Pass",
    "Plan",
    "RandomPlan",
    "Sampler",
    "Sampling",
    "Schedule",
    "StoredNoise",
    "decode",
    "decode_adaptively",
    "decode_masked",
    "decode_random",
    "probabilities",
    "sample_categorical",
]
