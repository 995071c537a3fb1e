"""Distance of pixels."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ReconstructionLoss(nn.Module):
    """Mean absolute (`l1`) or squared (`l2`) difference over all pixels and channels of [0, 1]
    images. Recipes for images in [-1, 1] carry over with twice (l1) or four times (l2) the weight.
    """

    def __init__(self, kind: Literal["l1", "l2"] = "l2"):
        super().__init__()
        self.distance = F.l1_loss if kind == "l1" else F.mse_loss

    def forward(
        self, images: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, ""]:
        return self.distance(reconstruction, images)
