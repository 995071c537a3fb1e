"""The exponential moving average of a model's weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class EMA(AveragedModel):
    """`module` is the average of `model`; call `update_parameters(model)` after each step.

    After n updates the decay is min(decay, (1 + n) / (10 + n)): the average spans about the last
    tenth of a young run, so that short runs are not held back by their random start. Buffers, such
    as a codebook's statistics, are copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, multi_avg_fn=self._average)
        self.decay = decay
        self.model_class = type(model)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def _average(self, averaged: list[Tensor], current: list[Tensor], _: Tensor) -> None:
        # Counted on the host, where `n_averaged` lives: the device is not waited for.
        n = int(self.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averaged, current, 1 - decay)
