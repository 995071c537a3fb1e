"""Our VQ tokenizer and its training losses against LlamaGen's, in the folder VISTOK_PARITY."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from narrow import narrow_lpips
from PIL import Image
from safetensors.torch import load_file

from vistok.checkpoints import llamagen_vq
from vistok.checkpoints.files import load, rename
from vistok.data import Transform, to_uint8
from vistok.data.transforms import adm_center_crop, to_float
from vistok.losses import (
    PatchDiscriminator,
    ReconstructionLoss,
    StyleGANDiscriminator,
    TokenizerLoss,
)
from vistok.losses import adversarial as gan

FOLDER = os.environ.get("VISTOK_PARITY")
if not FOLDER:
    pytest.skip("VISTOK_PARITY names no folder of numbers", allow_module_level=True)

# What torchvision says about the way in which package lpips builds its network.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchvision")

UNCOMPARED: dict[str, str] = {}  # name of an output: reason

TEN_CROPS = {1.1: "ten-crop", 1.05: "ten-crop-105"}
SCALE = {"l1": 2, "l2": 4}  # of a loss on [-1, 1] over the same on [0, 1]
RING = 65536  # codes over which the official usage is counted


def cases(trains: bool):
    for path in sorted(Path(FOLDER).glob("llamagen/vq_*/case.json")):
        case = json.loads(path.read_text())
        if ("vq_loss" in case["config"]) == trains:
            yield pytest.param(path.parent, case, id=path.parent.name)


def part(weights, prefix):
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}


def tokenizer_of(weights, config, image_size):
    args = config["model_args"]
    return llamagen_vq.tokenizer(
        weights,
        image_size,
        l2_normalise=args.get("codebook_l2_norm", True),
        commitment=args.get("commit_loss_beta", 0.25),
        entropy=args.get("entropy_loss_ratio", 0.0),
    )


def compare(case, tensors, computed):
    """Every output of the case must have its counterpart in `computed`."""
    expected = {k.removeprefix("out."): v for k, v in tensors.items() if k.startswith("out.")}
    assert expected
    for name in expected.keys() - UNCOMPARED.keys():
        assert name in computed, f"nothing to compare {name} with"
        ours, theirs = computed[name].detach(), expected[name]
        if theirs.numel() == 1:
            theirs = theirs.reshape(ours.shape)
        tolerance = {"atol": 0, "rtol": 0}
        if theirs.dtype == torch.uint8:
            ours, theirs = ours.int(), theirs.int()
            tolerance["atol"] = case.get("uint8_tolerance", 1)
        elif theirs.is_floating_point():
            tolerance = case["tolerance"]
        torch.testing.assert_close(
            ours, theirs, **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("folder", "case"), cases(trains=False))
@torch.no_grad()
def test_reconstruction(folder, case):
    config = case["config"]
    weights = load_file(folder / "weights.safetensors")
    tensors = load_file(folder / "tensors.safetensors")
    images = (tensors["in.images"] + 1) / 2
    model = tokenizer_of(weights, config, tuple(images.shape[-2:])).eval()
    levels = range(len(config["model_args"]["encoder_ch_mult"]))
    inner = {"enc_out": "encoder", "enc_mid": "encoder.mid", "dec_mid": "decoder.mid"}
    inner |= {name: name for name in ("quant_conv", "post_quant_conv")}
    inner |= {f"enc_down{i}": f"encoder.conv_blocks.{i}.resample" for i in levels}
    inner |= {f"dec_up{i}": f"decoder.conv_blocks.{i}.resample" for i in levels}
    computed = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda module, arguments, result, name=name: computed.update({name: result})
        )
        for name, path in inner.items()
    ]
    result = model(images)
    for hook in hooks:
        hook.remove()

    ids = model.encode(images)
    assert torch.equal(ids, result.tokens)
    computed["indices"] = ids.flatten()
    computed["quant"] = model.quantizer.decode(ids).movedim(-1, 1)
    computed["recon"] = 2 * result.reconstruction - 1
    computed["recon_uint8"] = to_uint8(result.reconstruction).movedim(1, -1)
    assert torch.equal(to_uint8(model.decode(ids)), to_uint8(result.reconstruction))
    codes = tensors["in.codes"].unflatten(1, model.spec.shape)
    computed["codebook_entry_chlast"] = model.quantizer.decode(codes)
    computed["decode_code"] = 2 * model.to_images(model.quantizer.decode(codes)) - 1
    torch.testing.assert_close(model.decode(codes), (computed["decode_code"] / 2 + 0.5).clamp(0, 1))
    both = torch.stack([images[0], images[0].flip(-1)])
    computed["codes_flip"] = model.encode(both).flatten(1)[None]
    if "resize_eval" in config:
        resized = F.interpolate(result.reconstruction, config["resize_eval"], mode="bicubic")
        computed["recon_resized_uint8"] = to_uint8(resized).movedim(1, -1)
    if "tencrop" in config:
        size, margin = config["tencrop"]["image_size"], config["tencrop"]["crop_range"]
        picture = Image.fromarray(tensors["in.picture"].numpy())
        enlarged = to_float(adm_center_crop(picture, int(size * margin)))
        computed["center_crop"] = to_uint8(enlarged).movedim(0, -1)
        crops = Transform(TEN_CROPS[margin], size).all_crops(picture)
        computed["ten_crops_uint8"] = to_uint8(crops)
        encoder = tokenizer_of(weights, config, size).eval()
        computed["ten_codes"] = encoder.encode(crops).flatten(1)[None]
    compare(case, tensors, computed)


@pytest.mark.parametrize(("folder", "case"), cases(trains=True))
def test_training(folder, case):
    config, settings = case["config"], case["config"]["vq_loss"]
    weights = load_file(folder / "weights.safetensors")
    tensors = load_file(folder / "tensors.safetensors")
    images, others = ((tensors[f"in.{name}"] + 1) / 2 for name in ("images", "images_b"))
    model = tokenizer_of(part(weights, "model."), config, tuple(images.shape[-2:])).train()
    loss = loss_of(weights, settings)
    discriminator = loss.discriminator
    start = settings["disc_start"]
    computed = {
        "disc_eval_logits_images": copy.deepcopy(discriminator).eval()(images),
        "lpips_per_image": loss.perceptual(images, others),
    }

    result = model(images)
    reconstruction, last = result.reconstruction, model.last_layer
    computed["recon"] = 2 * reconstruction - 1
    computed["vq_loss"] = result.losses["codebook"]
    computed["commit_loss"] = result.losses["commitment"]
    computed["entropy_loss"] = result.losses.get("entropy", torch.zeros(()))
    used = weights.get("model.quantize.codebook_used", torch.zeros(RING))
    ring = torch.cat([used, result.tokens.flatten()])[-len(used) :].float()
    usage = len(ring.unique()) / model.quantizer.vocab_size
    computed["codebook_usage"] = torch.tensor(
        usage if config["model_args"].get("codebook_show_usage", True) else 0.0
    )
    computed["codebook_used_tail"] = ring[-256:]

    distances = {k: s * ReconstructionLoss(k)(images, reconstruction) for k, s in SCALE.items()}
    computed |= {f"rec_{kind}": distance for kind, distance in distances.items()}
    computed["p_loss"] = loss.perceptual(images, reconstruction).mean()
    logits = copy.deepcopy(discriminator)(reconstruction)
    computed["gen_logits_fake"] = logits
    computed["gen_adv_hinge"] = gan.generator_loss(logits, "hinge")
    computed["gen_adv_nonsat"] = gan.generator_loss(logits, "non-saturating")
    pixels = settings["reconstruction_weight"] * distances[settings["reconstruction_loss"]]
    computed["adaptive_weight"] = gan.adaptive_weight(
        pixels + settings["perceptual_weight"] * computed["p_loss"],
        gan.generator_loss(logits, settings["gen_adv_loss"]),
        last,
    )

    def total_at(step, adaptive=False):
        scratch = copy.deepcopy(loss)  # a pass changes the discriminator's running statistics
        scratch.adaptive = adaptive
        return scratch.generator_loss(images, result, step, last)[0]

    computed["total_gen_before_start"] = total_at(start - 1)
    computed["total_gen_adaptive"] = total_at(start, adaptive=True)
    computed["total_gen_after_start"] = total_at(start)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(
        computed["total_gen_after_start"],
        [parameters[next(iter(rename({k: last}, llamagen_vq.RULES, k)))] for k in config["grads"]],
    )
    for name, gradient in zip(config["grads"], gradients, strict=True):
        computed[f"grad.{name}"] = gradient

    before = copy.deepcopy(loss).discriminator_loss(images, reconstruction, start - 1)[0]
    computed["disc_total_before_start"] = before
    seen = []
    discriminator.register_forward_hook(lambda module, arguments, result: seen.append(result))
    computed["disc_total_hinge"] = loss.discriminator_loss(images, reconstruction, start)[0]
    computed["disc_logits_real"], computed["disc_logits_fake"] = seen
    for name, form in (("hinge", "hinge"), ("vanilla", "vanilla"), ("nonsat", "non-saturating")):
        computed[f"d_{name}"] = gan.discriminator_loss(*seen, form)
    parameters = dict(discriminator.named_parameters())
    gradients = torch.autograd.grad(
        computed["disc_total_hinge"], [parameters[name] for name in config["disc_grads"]]
    )
    for name, gradient in zip(config["disc_grads"], gradients, strict=True):
        computed[f"disc_grad.{name}"] = gradient
    computed |= {f"bn_after.{name}": buffer for name, buffer in discriminator.named_buffers()}
    compare(case, tensors, computed)


def loss_of(weights, settings):
    """Return our loss with the case's networks."""
    loss = TokenizerLoss(
        reconstruction=settings["reconstruction_loss"],
        reconstruction_weight=settings["reconstruction_weight"]
        * SCALE[settings["reconstruction_loss"]],
        adversarial_weight=settings["disc_weight"],
        adversarial_start=settings["disc_start"],
        discriminator=discriminator_of(part(weights, "discriminator."), settings),
        discriminator_weight=settings["disc_weight"],
        generator_form=settings["gen_adv_loss"],
        discriminator_form=settings["disc_loss"],
    )
    loss.perceptual_weight = settings["perceptual_weight"]
    loss.perceptual = narrow_lpips(part(weights, "perceptual_loss."))
    return loss


def discriminator_of(weights, settings):
    if settings["disc_type"] == "patchgan":
        convolutions = sum(weight.ndim == 4 for weight in weights.values())
        network = PatchDiscriminator(len(weights["main.0.bias"]), num_layers=convolutions - 2)
    else:
        network = StyleGANDiscriminator(
            settings["image_size"], max_channels=len(weights["final_linear.0.bias"])
        )
    load(network, weights, "discriminator")
    return network
