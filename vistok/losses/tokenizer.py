"""The objective of VQGAN (Esser et al., 2021, arXiv:2012.09841, eq. 6), each part optional."""

from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.decoding.schedules import Schedule
from vistok.errors import UserError
from vistok.losses import adversarial as gan
from vistok.losses.alignment import Teacher, alignment
from vistok.losses.lecam import LeCAM
from vistok.losses.perceptual import LPIPS, ConvNeXtLogits
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
    """Reconstruction, perceptual, adversarial and alignment losses, beside the tokenizer's own.

    Weights are those of losses of [0, 1] images: see `ReconstructionLoss` for recipes in [-1, 1].
    `discriminator` has its own optimiser; it is None unless `adversarial_weight` is positive.

    Args:
        reconstruction: distance of pixels.
        reconstruction_weight: its weight.
        l1_weight: weight of the absolute difference beside that distance.
        perceptual_weight: weight of LPIPS.
        lpips_weights: VGG-16 file for LPIPS; see `LPIPS`.
        convnext_weight: weight of the difference of ConvNeXt-S's class scores (TiTok).
        convnext_weights: ConvNeXt-S file; see `ConvNeXtLogits`.
        adversarial_weight: weight of the adversary in the tokenizer's loss.
        adversarial_start: step at which the adversary sets in.
        adversarial_warmup: steps from there in which its weight in the tokenizer's loss rises.
        adaptive: multiply the adversary's weight by the ratio of gradients at the last layer.
        adaptive_floor: the least that then becomes of the weight.
        discriminator: the adversary; None for `PatchDiscriminator()`.
        discriminator_weight: weight of the discriminator's own loss.
        generator_form: what the tokenizer minimises against the adversary.
        discriminator_form: what the adversary minimises.
        consistency_weight: weight, in the adversary's loss, of the squared difference of what it
            makes of an image seen twice, as adversaries that augment do (balanced consistency: Zhao
            et al., 2020, arXiv:2002.04724).
        lecam_weight: weight of `LeCAM` in the adversary's loss.
        lecam_decay: decay of its averages.
        feature_until: step from which the tokenizer's own term `feature` is left out (ReToK); None
            for never.
        alignment_weight: weight of the alignment of the tokenizer's features with a teacher's.
        teacher: the network to align with.
        alignment_by_kept: factor of an image's alignment by the share of its tokens that were kept,
            as `linear(1,0)` (ReToK's hierarchical semantic regularisation).
        alignment_grid: positions of a side at which features are compared; None for the teacher's.
    """

    def __init__(
        self,
        reconstruction: Literal["l1", "l2"] = "l2",
        reconstruction_weight: float = 1.0,
        l1_weight: float = 0.0,
        perceptual_weight: float = 0.0,
        lpips_weights: str | Path | None = None,
        convnext_weight: float = 0.0,
        convnext_weights: str | Path | None = None,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 20_000,
        adversarial_warmup: int = 0,
        adaptive: bool = False,
        adaptive_floor: float = 0.0,
        discriminator: gan.Discriminator | None = None,
        discriminator_weight: float = 1.0,
        generator_form: gan.GeneratorForm = "hinge",
        discriminator_form: gan.DiscriminatorForm = "hinge",
        consistency_weight: float = 0.0,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.999,
        feature_until: int | None = None,
        alignment_weight: float = 0.0,
        teacher: Teacher | None = None,
        alignment_by_kept: Schedule = Schedule(1),
        alignment_grid: int | None = None,
    ):
        super().__init__()
        self.reconstruction_weight = reconstruction_weight
        self.l1_weight = l1_weight
        self.perceptual_weight = perceptual_weight
        self.convnext_weight = convnext_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.adversarial_warmup = adversarial_warmup
        self.adaptive = adaptive
        self.adaptive_floor = adaptive_floor
        self.discriminator_weight = discriminator_weight
        self.generator_form = generator_form
        self.discriminator_form = discriminator_form
        self.consistency_weight = consistency_weight
        self.lecam_weight = lecam_weight
        self.feature_until = feature_until
        self.alignment_weight = alignment_weight
        self.alignment_by_kept = alignment_by_kept
        self.alignment_grid = alignment_grid
        self.reconstruction = ReconstructionLoss(reconstruction)
        self.perceptual = LPIPS(lpips_weights) if perceptual_weight > 0 else None
        self.convnext = ConvNeXtLogits(convnext_weights) if convnext_weight > 0 else None
        self.discriminator = (
            discriminator or gan.PatchDiscriminator() if adversarial_weight > 0 else None
        )
        if self.discriminator is not None and lecam_weight > 0:
            # A part of the discriminator, with which its averages are saved and resumed.
            self.discriminator.lecam = LeCAM(lecam_decay)
        if alignment_weight > 0 and teacher is None:
            raise UserError(
                f"TokenizerLoss: alignment_weight {alignment_weight} needs a teacher to align with"
            )
        self.teacher = teacher if alignment_weight > 0 else None

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """The networks that judge without being trained, by name."""
        networks = {
            "perceptual": self.perceptual,
            "convnext": self.convnext,
            "teacher": self.teacher,
        }
        return {name: network for name, network in networks.items() if network is not None}

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
        tokenizer's own losses and its alignment are all. Raises `UserError` for a result without
        what the losses asked for judge.
        """
        if result.reconstruction is not None:
            terms = self._of_pixels(images, result.reconstruction.float(), step, last_layer)
        elif self.perceptual or self.convnext or self.discriminator:
            raise UserError(
                "TokenizerLoss: this tokenizer trains without a reconstruction, which the "
                "perceptual and adversarial losses judge: set their weights to 0"
            )
        else:
            terms = {}
        terms |= {
            name: term
            for name, term in result.losses.items()
            if name != "feature" or self.feature_until is None or step < self.feature_until
        }
        if self.teacher is not None:
            terms["alignment"] = self.alignment_weight * self._aligned(images, result)
        return sum(terms.values()), _detached(terms)

    def discriminator_loss(
        self,
        images: Float[Tensor, "b 3 h w"],
        reconstruction: Float[Tensor, "b 3 h w"],
        step: int,
        discriminator: nn.Module | None = None,
    ) -> tuple[Float[Tensor, ""], Terms]:
        """Return the discriminator's loss, zero before `adversarial_start`, and its terms with the
        mean logits. LeCAM's averages move on. `discriminator` is the module as prepared for several
        processes."""
        discriminator = discriminator or self.discriminator
        # Two passes, since batch statistics of real and fake images differ.
        real, fake = discriminator(images), discriminator(reconstruction.detach().float())
        weight = self.discriminator_weight if self.is_adversarial(step) else 0.0
        total = weight * gan.discriminator_loss(real, fake, self.discriminator_form)
        terms = {"logits_real": real.mean(), "logits_fake": fake.mean()}
        if self.consistency_weight > 0 and self.is_adversarial(step):
            again = discriminator(images), discriminator(reconstruction.detach().float())
            apart = sum(map(F.mse_loss, again, (real, fake)))
            terms["consistency"] = self.consistency_weight * apart
            total = total + terms["consistency"]
        if self.lecam_weight > 0 and self.is_adversarial(step):
            lecam = self.discriminator.lecam
            terms["lecam"] = self.lecam_weight * lecam(real, fake)
            total = total + terms["lecam"]
            lecam.update(real, fake)
        return total, _detached({"discriminator": total, **terms})

    def _aligned(self, images: Float[Tensor, "b 3 h w"], result: Result) -> Float[Tensor, ""]:
        """Return the alignment of the features with the teacher's, weighed by the tokens kept."""
        if result.features is None:
            raise UserError(
                "TokenizerLoss: this tokenizer gives no features to align with a teacher; set "
                "alignment_weight to 0"
            )
        if result.features.shape[-1] != self.teacher.dim:
            raise UserError(
                f"TokenizerLoss: the tokenizer's features have {result.features.shape[-1]} "
                f"channels, those of teacher {self.teacher.path} have {self.teacher.dim}"
            )
        distances = alignment(result.features, self.teacher(images), self.alignment_grid)
        if result.kept is None:
            return self.alignment_by_kept(1.0) * distances.mean()
        weights = [self.alignment_by_kept(share) for share in result.kept.tolist()]
        return (distances.new_tensor(weights) * distances).mean()

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
        if self.l1_weight > 0:
            terms["l1"] = self.l1_weight * F.l1_loss(reconstruction, images)
        if self.perceptual is not None:
            distance = self.perceptual(images, reconstruction).mean()
            terms["perceptual"] = self.perceptual_weight * distance
        if self.convnext is not None:
            distance = self.convnext(images, reconstruction).mean()
            terms["convnext"] = self.convnext_weight * distance
        if self.is_adversarial(step):
            adversarial = gan.generator_loss(
                self._judged_frozen(reconstruction), self.generator_form
            )
            weight = self.adversarial_weight
            if self.adversarial_warmup:
                weight *= min(1, (step + 1 - self.adversarial_start) / self.adversarial_warmup)
            if self.adaptive:
                ratio = gan.adaptive_weight(sum(terms.values()), adversarial, last_layer)
                weight = (weight * ratio).clamp(min=self.adaptive_floor)
            terms["adversarial"] = weight * adversarial
        return terms

    def _judged_frozen(self, images: Tensor) -> Tensor:
        """Return logits whose gradient reaches the images but not the discriminator."""
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return torch.func.functional_call(self.discriminator, frozen, (images,))


def _detached(terms: Terms) -> Terms:
    return {name: term.detach() for name, term in terms.items()}
