"""Constants that models compute with."""

from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor, nn


class Constant(nn.Module):
    """A row of float32 numbers that goes with its model to a device, but keeps every bit where the
    model is cast to another type; not saved."""

    def __init__(self, numbers: Sequence[float]):
        super().__init__()
        bits = torch.tensor(numbers, dtype=torch.float32).view(torch.int32)
        self.register_buffer("bits", bits, persistent=False)

    def forward(self) -> Float32[Tensor, "n"]:
        return self.bits.view(torch.float32)
