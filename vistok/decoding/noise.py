"""Noise as an argument: each image has its own stream, keyed by (seed, index).

An image's tokens then do not depend on its batch, its neighbours or the number of processes. The
streams are Philox counters (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"),
whose 128-bit key holds seed and index whole: no two images of a run share a stream.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class Noise:
    """The random streams of images `indices` of the run `seed`; each draw advances all of them."""

    def __init__(self, seed: int, indices: Sequence[int] | Tensor):
        self.streams = [
            np.random.Generator(np.random.Philox(key=[seed, int(index)])) for index in indices
        ]

    def uniform(self, *shape: int) -> Float[Tensor, "b ..."]:
        """Draw float64 uniforms in [0, 1), (B, *shape), on the CPU."""
        return torch.from_numpy(np.stack([stream.random(shape) for stream in self.streams]))

    def normal(self, *shape: int) -> Float[Tensor, "b ..."]:
        """Draw float32 standard normals, (B, *shape), on the CPU."""
        draws = [stream.standard_normal(shape, dtype=np.float32) for stream in self.streams]
        return torch.from_numpy(np.stack(draws))


class StoredNoise(Noise):
    """Replays given tensors, one per draw: for parity with recorded runs and for couplings."""

    def __init__(self, *draws: Tensor):
        self.draws = iter(draws)

    def uniform(self, *shape: int) -> Float[Tensor, "b ..."]:
        draw = next(self.draws)
        # One number for each entry of a vocabulary may stand in place of one for each token.
        if tuple(draw.shape[1 : 1 + len(shape)]) != shape:
            raise ValueError(f"stored noise {tuple(draw.shape)}, asked for (B, {shape})")
        return draw

    normal = uniform
