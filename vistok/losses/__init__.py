"""What tokenizers are trained to minimise."""

from vistok.losses.adversarial import Discriminator, PatchDiscriminator, StyleGANDiscriminator
from vistok.losses.perceptual import LPIPS
from vistok.losses.reconstruction import ReconstructionLoss
from vistok.losses.tokenizer import TokenizerLoss

__all__ = [
    "LPIPS",
    "Discriminator",
    "PatchDiscriminator",
    "ReconstructionLoss",
    "StyleGANDiscriminator",
    "TokenizerLoss",
]
