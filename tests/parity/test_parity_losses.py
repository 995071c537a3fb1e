"""Our losses, adversary and schedules against TiTok's, in the folder VISTOK_PARITY."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from narrow import narrow_convnext, narrow_lpips
from official import Case, cases
from torch import Tensor, nn

from vistok.checkpoints.files import load
from vistok.losses import LPIPS, ConvNeXtLogits, TiTokDiscriminator, TokenizerLoss
from vistok.quantizers import Gaussian
from vistok.training import EMA, OptimizerConfig, adamw

# What torchvision says about the way in which package lpips builds its network.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchvision")

UNCOMPARED = {
    "*.d_weight": "an option of the case's config, reported as it is",
    "*.commitment_loss": "an input of the case, passed through to the log",
    "*.codebook_loss": "an input of the case, passed through to the log",
}
EMA_DECAY = 0.999  # the official constant; no case's config names it


@dataclass
class Result:
    """As a tokenizer's forward pass returns it, as far as losses read it."""

    reconstruction: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    kept: Tensor | None = None


@dataclass
class Networks:
    """The networks of a case; a perceptual one may be missing."""

    discriminator: TiTokDiscriminator
    lpips: LPIPS | None = None
    convnext: ConvNeXtLogits | None = None


def networks_of(case: Case, folder: Path) -> Networks:
    """Return the networks of a case; `folder` takes the file that one of them is read from."""

    def part(prefix):
        return {k.removeprefix(prefix): w for k, w in case.weights.items() if k.startswith(prefix)}

    weights = part("discriminator.")
    stages = sum(name.endswith(".1.kernel") for name in weights)
    discriminator = TiTokDiscriminator(len(weights["block_in.0.bias"]), stages)
    load(discriminator, weights, "discriminator")
    lpips, convnext = part("perceptual_loss.lpips."), part("perceptual_loss.convnext.")
    networks = Networks(discriminator)
    if lpips:
        networks.lpips = narrow_lpips(lpips)
    if convnext:
        path = folder / "convnext.pth"
        networks.convnext = narrow_convnext(convnext, case.config["tiny_convnext"], path)
    return networks


def shares(name: str) -> tuple[float, float]:
    """Return the shares of LPIPS and ConvNeXt in a perceptual loss by its official name."""
    if name in ("lpips", "convnext_s"):
        return float(name == "lpips"), float(name == "convnext_s")
    a, b = map(float, name.split("-")[2:])
    return a / (a + b), b / (a + b)


def loss_of(settings: dict, networks: Networks, perceptual: str, **options) -> TokenizerLoss:
    """Return our loss by the official settings, with the case's networks."""
    loss = TokenizerLoss(
        reconstruction=settings["reconstruction_loss"],
        adversarial_start=settings["discriminator_start"],
        discriminator=networks.discriminator,
        discriminator_weight=settings["discriminator_factor"],
        lecam_weight=settings["lecam_regularization_weight"],
        lecam_decay=settings.get("lecam_ema_decay", 0.999),
        **{
            "reconstruction_weight": settings["reconstruction_weight"],
            "adversarial_weight": generator_weight(settings),
            **options,
        },
    )
    weights = [settings["perceptual_weight"] * share for share in shares(perceptual)]
    loss.perceptual_weight, loss.convnext_weight = weights
    loss.perceptual = networks.lpips if weights[0] else None
    loss.convnext = networks.convnext if weights[1] else None
    return loss


def generator_weight(settings: dict) -> float:
    return settings["discriminator_weight"] * settings["discriminator_factor"]


@pytest.mark.parametrize("folder", cases("titok", lambda d: d["kind"] == "TitokLosses"))
def test_losses(folder, tmp_path):
    case = Case(folder)
    networks = networks_of(case, tmp_path)
    compare_networks(case, networks)
    compare_generator(case, networks)
    compare_discriminator(case, networks)
    compare_schedules(case)
    case.finish(UNCOMPARED)


def compare_networks(case: Case, networks: Networks) -> None:
    real, fake = case.inputs["real"], case.inputs["fake"]
    a, b = shares(case.config["losses"]["perceptual_loss"])
    perceptual = torch.zeros(len(real))
    if networks.lpips:
        distance = networks.lpips(real, fake)
        case.compare("lpips", distance)
        perceptual = perceptual + a * distance
    if networks.convnext:
        distance = networks.convnext(real, fake).mean()
        case.compare("convnext_logits_real", networks.convnext.logits(real))
        case.compare("convnext", distance)
        perceptual = perceptual + b * distance
    # One of the two alone is reported as its mean over the batch.
    case.compare("perceptual", perceptual if a and b else perceptual.mean())
    for name, images in (("real", real), ("fake", fake)):
        case.compare(f"logits_{name}", networks.discriminator(images))


def compare_generator(case: Case, networks: Networks) -> None:
    settings, inputs = case.config["losses"], case.inputs
    start, perceptual = settings["discriminator_start"], settings["perceptual_loss"]
    fake = inputs["fake"].clone().requires_grad_()
    loss = loss_of(settings, networks, perceptual)
    quantizer = {"quantizer": settings["quantizer_weight"] * inputs["quantizer_loss"]}

    def compare(prefix, loss, own, step):
        total, terms = loss.generator_loss(inputs["real"], Result(fake, own), step, None)
        absent = torch.zeros(())
        weighted = terms.get("adversarial", absent)
        factor = settings["discriminator_factor"] * (step >= start)
        case.compare(f"{prefix}.total_loss", total)
        case.compare(f"{prefix}.reconstruction_loss", terms["reconstruction"])
        judged = [terms.get(name, absent) for name in ("perceptual", "convnext")]
        case.compare(f"{prefix}.perceptual_loss", sum(judged))
        case.compare(f"{prefix}.quantizer_loss", terms.get("quantizer", absent))
        case.compare(f"{prefix}.kl_loss", terms.get("kl", absent))
        case.compare(f"{prefix}.weighted_gan_loss", weighted)
        case.compare(f"{prefix}.gan_loss", weighted / (generator_weight(settings) or 1))
        case.compare(f"{prefix}.discriminator_factor", torch.tensor(float(factor)))
        return total

    compare("gen_pre", loss, quantizer, start - 1)
    compare("gen", loss, quantizer, start).backward()
    case.compare("gen.grad_fake", fake.grad)
    if networks.convnext:
        compare("stage2", loss_of(settings, networks, "convnext_s"), quantizer, start)

    moments = inputs["moments"].flatten(2).transpose(1, 2)  # B 2C 1 K to B K 2C
    bottleneck = Gaussian(moments.shape[-1] // 2, kl=settings.get("kl_weight", 1e-6))
    variance = math.exp(settings.get("logvar_init", 0.0))
    vae = loss_of(
        settings,
        networks,
        perceptual,
        reconstruction_weight=settings["reconstruction_weight"] / variance,
    )
    compare("vae", vae, bottleneck(moments).losses, start)


def compare_discriminator(case: Case, networks: Networks) -> None:
    settings, inputs = case.config["losses"], case.inputs
    # Of a weight that is not 0, as the adversary is trained even where the tokenizer ignores it.
    loss = loss_of(settings, networks, settings["perceptual_loss"], adversarial_weight=1.0)
    discriminator = loss.discriminator
    lecam = getattr(discriminator, "lecam", None)
    if lecam is not None:
        lecam.real.copy_(case.weights["ema_real_logits_mean"].squeeze())
        lecam.fake.copy_(case.weights["ema_fake_logits_mean"].squeeze())
    for call in (1, 2):
        total, terms = loss.discriminator_loss(
            inputs["real"], inputs["fake"], settings["discriminator_start"]
        )
        case.compare(f"disc{call}.discriminator_loss", total)
        case.compare(f"disc{call}.lecam_loss", terms.get("lecam", torch.zeros(())))
        for name in ("logits_real", "logits_fake"):
            case.compare(f"disc{call}.{name}", terms[name])
        discriminator.zero_grad()
        total.backward()
        for name, parameter in discriminator.named_parameters():
            case.compare(f"disc{call}.grad.discriminator.{name}", parameter.grad)
        if lecam is not None:
            case.compare(f"ema{call}", torch.stack([lecam.real, lecam.fake]))

    expected = case.description["extra"].get("discriminator_no_weight_decay")
    if expected is None:
        return
    undecayed = {id(p) for p in adamw(discriminator, OptimizerConfig()).param_groups[1]["params"]}
    names = [
        f"discriminator.{name}"
        for name, parameter in discriminator.named_parameters()
        if id(parameter) in undecayed
    ]
    assert sorted(names) == sorted(expected)


def compare_schedules(case: Case) -> None:
    schedule, steps = case.config["schedule"], case.inputs["sched.steps"]
    warmup = schedule["warmup"]
    # The official scheduler counts from 0, a step at rate 0; our warm-up starts with its count 1.
    # After it both count alike, so that our run stands at the peak for one step more.
    trained = steps >= (warmup > 0)
    assert not case.expected["sched.lr"][~trained].any()
    for name, end in (("lr", schedule["end_lr"]), ("lr_constant", schedule["lr"])):
        optimizer = OptimizerConfig(
            lr=schedule["lr"], warmup_steps=warmup, final_fraction=end / schedule["lr"]
        )
        rates = [
            optimizer.learning_rate(s - 1 if s <= warmup else s, schedule["total"]) / optimizer.lr
            for s in steps[trained].tolist()
        ]
        case.compare(f"sched.{name}", torch.tensor(rates), part=lambda r: r[trained])

    decays = []
    for step in case.inputs["sched.ema_steps"].tolist():
        model = nn.Linear(1, 1, bias=False)
        ema = EMA(model, EMA_DECAY)
        nn.init.zeros_(ema.module.weight)
        nn.init.ones_(model.weight)
        ema.n_averaged.fill_(step - 1)
        ema.update_parameters(model)
        decays.append(1 - ema.module.weight.item())
    case.compare("sched.ema", torch.tensor(decays))
