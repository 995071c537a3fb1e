"""Decoding outside the model: plans, the loop, sampling, schedules and noise."""

from vistok.decoding.loop import Decoding, decode
from vistok.decoding.noise import Noise, StoredNoise
from vistok.decoding.plans import Pass, Plan, raster
from vistok.decoding.sampling import Sampling, probabilities, sample_categorical
from vistok.decoding.schedules import Schedule

__all__ = [
    "Decoding",
    "Noise",
    "Pass",
    "Plan",
    "Sampling",
    "Schedule",
    "StoredNoise",
    "decode",
    "probabilities",
    "raster",
    "sample_categorical",
]
