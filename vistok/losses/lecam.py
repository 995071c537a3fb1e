"""LeCAM, the regulariser of adversaries with little data (Tseng et al., 2021, arXiv:2104.03310)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LeCAM(nn.Module):
    """Holds the mean logits of real images near the moving average of those of fake ones, and the
    other way round, from the side on which they are further apart than the averages.

    The averages are buffers: as a part of the discriminator they are saved with it. Among several
    processes they are those of process 0, as the statistics of batch normalisation are.

    Args:
        decay: of the averages, which start from 0.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(
        self, real: Float[Tensor, "*logits"], fake: Float[Tensor, "*logits"]
    ) -> Float[Tensor, ""]:
        """Return the penalty; the averages change by `update` alone."""
        above = F.relu(real.float().mean() - self.fake)
        below = F.relu(self.real - fake.float().mean())
        return above.square() + below.square()

    @torch.no_grad()
    def update(self, real: Float[Tensor, "*logits"], fake: Float[Tensor, "*logits"]) -> None:
        """Take the logits of one step into the averages, unless they are not finite: the step that
        they belong to is skipped, too."""
        for average, logits in ((self.real, real), (self.fake, fake)):
            mean = logits.float().mean()
            moved = average.lerp(mean, 1 - self.decay)
            average.copy_(torch.where(mean.isfinite(), moved, average))
