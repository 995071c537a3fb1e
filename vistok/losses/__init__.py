"""What tokenizers are trained to minimise."""

from vistok.losses.adversarial import (
    Discriminator,
    PatchDiscriminator,
    StyleGANDiscriminator,
    TiTokDiscriminator,
)
from vistok.losses.alignment import Teacher, alignment
from vistok.losses.dino import DINODiscriminator
from vistok.losses.lecam import LeCAM
from vistok.losses.perceptual import LPIPS, ConvNeXtLogits
from vistok.losses.reconstruction import ReconstructionLoss
from vistok.losses.tokenizer import TokenizerLoss

__all__ = [
    "LPIPS",
    "ConvNeXtLogits",
    "DINODiscriminator",
    "Discriminator",
    "LeCAM",
    "PatchDiscriminator",
    "ReconstructionLoss",
    "StyleGANDiscriminator",
    "Teacher",
    "TiTokDiscriminator",
    "TokenizerLoss",
    "alignment",
]
