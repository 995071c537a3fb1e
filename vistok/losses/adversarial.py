"""The patch adversary of VQGAN (Isola et al., 2016, arXiv:1611.07004; Esser et al., 2021,
arXiv:2012.09841)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Adversary = Literal["hinge", "vanilla"]


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: images to a map of logits, higher for real.

    Args:
        channels: width after the first convolution; it doubles up to eightfold.
        num_layers: convolutions that halve the resolution.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        super().__init__()
        widths = [channels * min(2**n, 8) for n in range(num_layers + 1)]
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, num_layers + 1):
            stride = 2 if n < num_layers else 1
            layers += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[n]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 ph pw"]:
        return self.main(2 * images - 1)


def generator_loss(fake: Float[Tensor, "*logits"]) -> Float[Tensor, ""]:
    """Return the loss of the generator for both adversaries: raise the logits."""
    return -fake.float().mean()


def discriminator_loss(
    real: Float[Tensor, "*logits"], fake: Float[Tensor, "*logits"], kind: Adversary
) -> Float[Tensor, ""]:
    """Return the mean of the losses of real and fake logits."""
    penalty = (lambda x: F.relu(1 + x)) if kind == "hinge" else F.softplus
    return 0.5 * (penalty(-real.float()).mean() + penalty(fake.float()).mean())


def adaptive_weight(
    loss: Float[Tensor, ""], adversarial: Float[Tensor, ""], last_layer: nn.Parameter
) -> Float[Tensor, ""]:
    """Return the weight at which the adversary's gradient at the last layer is as long as that of
    the other losses (Esser et al., 2021, eq. 7)."""
    wanted, given = (
        torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm()
        for term in (loss, adversarial)
    )
    return (wanted / (given + 1e-4)).clamp(0, 1e4).detach()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
