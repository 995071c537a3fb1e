"""The objective of VQGAN (Esser et al., 2021, arXiv:2012.09841, eq. 6), each part optional."""

from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.losses import adversarial as gan
from vistok.losses.perceptual import LPIPS
from vistok.losses.reconstruction import ReconstructionLoss

Terms = dict[str, Float[Tensor, ""]]


@runtime_checkable
class Result(Protocol):
    """What a tokenizer's forward pass returns, as far as losses read it; see `TokenizerOutput`."""

    reconstruction: Float[Tensor, "b 3 h w"] | None
    losses: Terms
    features: Float[Tensor, "b gh gw d"] | None
    kept: Float[Tensor, "b"] | None


class TokenizerLoss(nn.Module):
    """Reconstruction, perceptual and adversarial losses, beside the quantizer's own.

    Weights are those of losses of [0, 1] images: see `ReconstructionLoss` for recipes in [-1, 1].
    `discriminator` has its own optimiser; it is None unless `adversarial_weight` is positive.

    Args:
        reconstruction: distance of pixels.
        reconstruction_weight: its weight.
        perceptual_weight: weight of LPIPS.
        lpips_weights: VGG-16 file for LPIPS; see `LPIPS`.
        adversarial_weight: weight of the adversary in the tokenizer's loss.
        adversarial_start: step at which the adversary sets in.
        adaptive: multiply the adversary's weight by the ratio of gradients at the last layer.
        discriminator: the adversary; None for `PatchDiscriminator()`.
        discriminator_weight: weight of the discriminator's own loss.
        generator_form: what the tokenizer minimises against the adversary.
        discriminator_form: what the adversary minimises.
    """

    def __init__(
        self,
        reconstruction: Literal["l1", "l2"] = "l2",
        reconstruction_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        lpips_weights: str | Path | None = None,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 20_000,
        adaptive: bool = False,
        discriminator: gan.Discriminator | None = None,
        discriminator_weight: float = 1.0,
        generator_form: gan.GeneratorForm = "hinge",
        discriminator_form: gan.DiscriminatorForm = "hinge",
    ):
        super().__init__()
        self.reconstruction_weight = reconstruction_weight
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.adaptive = adaptive
        self.discriminator_weight = discriminator_weight
        self.generator_form = generator_form
        self.discriminator_form = discriminator_form
        self.reconstruction = ReconstructionLoss(reconstruction)
        self.perceptual = LPIPS(lpips_weights) if perceptual_weight > 0 else None
        self.discriminator = (
            discriminator or gan.PatchDiscriminator() if adversarial_weight > 0 else None
        )

    def is_adversarial(self, step: int) -> bool:
        """Whether the adversary takes part in this step."""
        return self.discriminator is not None and step >= self.adversarial_start

    def generator_loss(
        self,
        images: Float[Tensor, "b 3 h w"],
        result: Result,
        step: int,
        last_layer: nn.Parameter | None,
    ) -> tuple[Float[Tensor, ""], Terms]:
        """Return the tokenizer's loss and its terms, each as weighted in the sum.

        `last_layer` is read by an adaptive weight alone. Where `result` has no reconstruction, the
        tokenizer's own losses are all; raises `UserError` if others were asked for that judge one.
        """
        if result.reconstruction is not None:
            terms = self._of_pixels(images, result.reconstruction.float(), step, last_layer)
        elif self.perceptual is not None or self.discriminator is not None:
            raise UserError(
                "TokenizerLoss: this tokenizer trains without a reconstruction, which the "
                "perceptual and adversarial losses judge: set their weights to 0"
            )
        else:
            terms = {}
        terms |= result.losses
        return sum(terms.values()), _detached(terms)

    def discriminator_loss(
        self,
        images: Float[Tensor, "b 3 h w"],
        reconstruction: Float[Tensor, "b 3 h w"],
        step: int,
        discriminator: nn.Module | None = None,
    ) -> tuple[Float[Tensor, ""], Terms]:
        """Return the discriminator's loss, zero before `adversarial_start`, and the mean logits.
        `discriminator` is the module as prepared for several processes."""
        discriminator = discriminator or self.discriminator
        # Two passes, since batch statistics of real and fake images differ.
        real, fake = discriminator(images), discriminator(reconstruction.detach().float())
        weight = self.discriminator_weight if self.is_adversarial(step) else 0.0
        total = weight * gan.discriminator_loss(real, fake, self.discriminator_form)
        terms = {"discriminator": total, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return total, _detached(terms)

    def _of_pixels(
        self,
        images: Float[Tensor, "b 3 h w"],
        reconstruction: Float[Tensor, "b 3 h w"],
        step: int,
        last_layer: nn.Parameter | None,
    ) -> Terms:
        """Return the terms that compare the reconstruction or judge it."""
        if self.discriminator is not None:
            self.discriminator.check_images(images)  # at once, not when it sets in
        terms = {
            "reconstruction": self.reconstruction_weight
            * self.reconstruction(images, reconstruction)
        }
        if self.perceptual is not None:
            distance = self.perceptual(images, reconstruction).mean()
            terms["perceptual"] = self.perceptual_weight * distance
        if self.is_adversarial(step):
            adversarial = gan.generator_loss(
                self._judged_frozen(reconstruction), self.generator_form
            )
            weight = self.adversarial_weight
            if self.adaptive:
                weight = weight * gan.adaptive_weight(sum(terms.values()), adversarial, last_layer)
            terms["adversarial"] = weight * adversarial
        return terms

    def _judged_frozen(self, images: Tensor) -> Tensor:
        """Return logits whose gradient reaches the images but not the discriminator."""
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return torch.func.functional_call(self.discriminator, frozen, (images,))


def _detached(terms: Terms) -> Terms:
    return {name: term.detach() for name, term in terms.items()}
