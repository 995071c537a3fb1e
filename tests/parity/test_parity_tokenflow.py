"""TokenFlow's tokenizers, shared codebooks and losses against the official ones, in the folder
VISTOK_PARITY."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from official import Case, cases
from torch import Tensor

from vistok.checkpoints import tokenflow
from vistok.checkpoints.files import load, rename
from vistok.losses import PatchDiscriminator, Teacher, TokenizerLoss
from vistok.losses import adversarial as gan
from vistok.quantizers import DualVQ, MultiScale

UNCOMPARED: dict[str, str] = {}  # name of an output: reason
RING = 131072  # codes over which the official usage is counted
SCALE = {"l1": 2, "l2": 4}  # of a loss on [-1, 1] over the same on [0, 1]


def with_config(*names):
    return cases("tokenflow", lambda d: all(name in d["config"] for name in names))


def patches_of(case: Case, weights: str = "encoder_vqkd.") -> int:
    return next(
        w.shape[-1] for k, w in case.weights.items() if k.startswith(weights) and w.ndim == 4
    )


def squared_distances(vq: DualVQ, latents: Tensor) -> list[Tensor]:
    """Return those of both parts of the normalised latents to all codes."""
    codes = vq.decode(torch.arange(vq.vocab_size))
    pairs = zip(vq._normalised(latents).split(vq.parts, -1), codes.split(vq.parts, -1), strict=True)
    return [torch.cdist(z.flatten(0, -2).double(), e.double()).square() for z, e in pairs]


def margins(vq: DualVQ, latents: list[Tensor]) -> Tensor:
    """Return the smallest lead of a nearest code over the second."""
    joint = torch.cat([sum(squared_distances(vq, z)) for z in latents])
    best = joint.topk(2, largest=False).values
    return (best[:, 1] - best[:, 0]).min()


@pytest.mark.parametrize("folder", with_config("args", "tiny"))
@torch.no_grad()
def test_tokenizer(folder):
    case = Case(folder)
    tiny, images = case.config["tiny"], (case.inputs["images"] + 1) / 2
    side = images.shape[-1]
    scales, grid = list(tiny["scales"]), side // patches_of(case)
    if scales[-1] != grid:
        scales.append(grid)
    tower = tiny.get("clip") or tiny["siglip"]
    model = tokenflow.convert(
        case.weights,
        image_size=side,
        scales=scales,
        num_heads=tower.get("heads") or tower["num_attention_heads"],
        semantic_heads=tiny["sem_decoder_heads"],
    ).eval()
    vq, seen = model.quantizer.quantizer, []
    hook = vq.register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
    result = model(images)
    hook.remove()
    latents = model.to_latents(images)
    semantic, pixel = latents.split([model.semantic_dim, vq.dim - model.semantic_dim], dim=-1)
    case.compare("sem_feature", semantic)
    case.compare("pix_feature", pixel.movedim(-1, 1))
    for scale, (left, found) in enumerate(seen):
        case.compare(f"scale{scale}.residual_down", left.movedim(-1, 1))
        case.compare(f"scale{scale}.quant", found.quantised.movedim(-1, 1))
    case.compare("min_margin", margins(vq, [left for left, _ in seen]))

    ids = model.encode(images)
    assert torch.equal(ids, result.tokens)
    case.compare("ids", ids)
    quantised = model.quantizer.decode(ids)
    case.compare("quant", quantised.movedim(-1, 1))
    torch.testing.assert_close(model.encode_semantic(images), quantised)
    case.compare("sem_recon", model.to_teacher(quantised))
    torch.testing.assert_close(result.features, model.to_teacher(quantised))
    case.compare("pix_recon", 2 * model.to_images(quantised) - 1)
    torch.testing.assert_close(result.reconstruction, model.to_images(quantised))
    coarse = ids[:, : -model.quantizer.sizes[-1]]
    preview = model.to_images(model.quantizer.decode(coarse))
    case.compare("decode_code_partial.pix", 2 * preview - 1)
    torch.testing.assert_close(model.decode(coarse), preview.clamp(0, 1))
    case.finish(UNCOMPARED)


def usage_of(found: list[Tensor], vocab_size: int) -> Tensor:
    """Return the share of codes in the official ring of the last ones, which starts from zeros, on
    average over the scales that have just entered it."""
    ring, shares = torch.zeros(RING, dtype=torch.int64), []
    for ids in found:
        ring = torch.cat([ring, ids.flatten()])[-RING:]
        shares.append(len(ring.unique()) / vocab_size)
    return torch.tensor(shares).mean()


@pytest.mark.parametrize("folder", with_config("quantizer", "scales"))
def test_quantizer(folder):
    case = Case(folder)
    settings = case.config["quantizer"]
    semantic_dim, pixel_dim = settings["split"]
    vq = DualVQ(
        settings["n_e"],
        semantic_dim,
        pixel_dim,
        commitment=settings["beta"],
        entropy=settings["entropy_loss_ratio"],
    ).train()
    load(vq, {"embedding.weight": tokenflow.codebook(case.weights)}, "codebooks")
    seen = []
    vq.register_forward_hook(lambda module, args, result: seen.append((args[0], result.ids)))

    def compare_terms(name: str, losses: dict[str, Tensor]) -> None:
        zero = torch.zeros(())
        case.compare(f"{name}.vq_loss", losses["codebook"])
        case.compare(f"{name}.commit_loss", losses["commitment"])
        case.compare(f"{name}.entropy_loss", losses.get("entropy", zero))
        latents, ids = zip(*seen, strict=True)
        case.compare(f"{name}.codebook_usage", usage_of(ids, vq.vocab_size))
        with torch.no_grad():
            distances = [squared_distances(vq, z) for z in latents]
        for part, of_part in zip(("sem", "pix"), zip(*distances, strict=True), strict=True):
            norms = [d.square().sum(1).mean() for d in of_part]
            case.compare(f"{name}.d_{part}_norm", torch.stack(norms).mean())
        if name == "single":
            case.compare("single.min_margin", margins(vq, latents))
        seen.clear()

    z = case.inputs["z"].requires_grad_()
    result = vq(z.movedim(1, -1))
    quantised = result.quantised.movedim(-1, 1)
    case.compare("single.quant", quantised)
    case.compare("single.ids", result.ids)
    total = sum(result.losses.values()) + (quantised * case.inputs["upstream"]).sum()
    of_z, of_codes = torch.autograd.grad(total, [z, vq.embedding.weight])
    case.compare("single.grad_z", of_z)
    case.compare("single.grad_sem_codebook", of_codes[:, :semantic_dim])
    case.compare("single.grad_pix_codebook", of_codes[:, semantic_dim:])
    compare_terms("single", result.losses)

    scales = case.config["scales"]
    model = MultiScale(vq, scales, smoothers=0, jointly=False).train()
    dropped = case.config["drop_index"]
    for name, kept in (("ms", None), ("ms_drop", [i for i in range(len(scales)) if i != dropped])):
        result = model(case.inputs["features"].movedim(1, -1), kept)
        case.compare(f"{name}.quant", result.quantised.movedim(-1, 1))
        case.compare(f"{name}.ids", result.ids)
        compare_terms(name, result.losses)
    case.finish(UNCOMPARED)


@dataclass
class Result:
    """As a tokenizer's forward pass returns it, as far as losses read it."""

    reconstruction: Tensor
    features: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None


OPENAI_TO_TRANSFORMERS = (
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.", "vision_model."),
    (r"\.(class_embedding)$", r".embeddings.\1"),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.transformer\.resblocks\.", ".encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)


def clip(weights: dict[str, Tensor], tiny: dict) -> transformers.CLIPModel:
    """Return transformers' CLIP of an image tower in OpenAI's layout; its text tower is random."""
    weights = rename(weights, OPENAI_TO_TRANSFORMERS, "teacher")
    weights["visual_projection.weight"] = weights["visual_projection.weight"].T.contiguous()
    for name in [name for name in weights if ".in_proj_" in name]:
        kind = name.rpartition("_")[2]
        for part, tensor in zip("qkv", weights.pop(name).chunk(3), strict=True):
            weights[name.replace(f"in_proj_{kind}", f"{part}_proj.{kind}")] = tensor.clone()
    vision = {
        "image_size": tiny["input_resolution"],
        "patch_size": tiny["patch_size"],
        "hidden_size": tiny["width"],
        "num_hidden_layers": tiny["layers"],
        "num_attention_heads": tiny["heads"],
        "intermediate_size": 4 * tiny["width"],
    }
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1} | {
        "intermediate_size": 8,
        "vocab_size": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text, vision_config=vision, projection_dim=tiny["output_dim"]
        )
    )
    left = {k: w for k, w in model.state_dict().items() if k.startswith(("text_", "logit_"))}
    load(model, left | weights, "teacher")
    return model


def siglip(weights: dict[str, Tensor], tiny: dict) -> transformers.SiglipVisionModel:
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**tiny))
    load(model, rename(weights, [(r"^vision_model\.", "")], "teacher"), "teacher")
    return model


def teacher_of(case: Case, folder) -> Teacher:
    """Return the case's teacher, read as users read one."""
    tiny = case.config["tiny"]
    weights = under(case.weights, "teacher_model.")
    is_clip = "clip" in tiny
    size = tiny["clip"]["input_resolution"] if is_clip else tiny["siglip"]["image_size"]
    means = {}
    if is_clip:
        mean, std = (
            case.weights[f"scaling_layer.{k}"].flatten().tolist() for k in ("shift", "scale")
        )
        means = {"image_mean": mean, "image_std": std}
    (clip if is_clip else siglip)(weights, tiny["clip" if is_clip else "siglip"]).save_pretrained(
        folder
    )
    transformers.ViTImageProcessor(size={"height": size, "width": size}, **means).save_pretrained(
        folder
    )
    return Teacher(str(folder), layer="projected" if is_clip else "penultimate")


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}


@pytest.mark.parametrize("folder", with_config("loss"))
def test_losses(folder, tmp_path):
    case = Case(folder)
    settings, inputs = case.config["loss"], case.inputs
    teacher = teacher_of(case, tmp_path)
    weights = under(case.weights, "discriminator.")
    convolutions = sum(weight.ndim == 4 for weight in weights.values())
    discriminator = PatchDiscriminator(len(weights["main.0.bias"]), convolutions - 2)
    load(discriminator, weights, "discriminator")
    kind = settings["reconstruction_loss"]
    loss = TokenizerLoss(
        reconstruction=kind,
        reconstruction_weight=settings.get("reconstruction_weight", 1.0) * SCALE[kind],
        adversarial_weight=settings["disc_weight"],
        adversarial_start=settings["disc_start"],
        discriminator=discriminator,
        discriminator_weight=settings["disc_weight"],
        generator_form=settings["gen_adv_loss"],
        discriminator_form=settings["disc_loss"],
        alignment_weight=1.0,
        teacher=teacher,
    )
    images = (inputs["images"] + 1) / 2
    case.compare("teacher_target", teacher(images).flatten(1, 2))
    pixels = inputs["pix_recon"].requires_grad_()
    semantic = inputs["sem_recon"].requires_grad_()
    codebook = {k: inputs[k].squeeze() for k in ("vq_loss", "commit_loss", "entropy_loss")}
    grid = (teacher.grid, teacher.grid)
    for name, step in (("before", settings["disc_start"] - 1), ("after", settings["disc_start"])):
        result = Result((pixels + 1) / 2, semantic.unflatten(1, grid), codebook)
        total, terms = copy.deepcopy(loss).generator_loss(images, result, step, None)
        total = total + 1  # of one minus the cosine
        case.compare(f"{name}.gen_total", total)
        distance = loss.reconstruction(images, result.reconstruction)
        case.compare(f"{name}.rec_loss", SCALE[kind] * distance)
        case.compare(f"{name}.vqkd_loss", 1 + terms["alignment"])
        of_pixels, of_semantic = torch.autograd.grad(total, [pixels, semantic])
        case.compare(f"{name}.grad_pix", of_pixels)
        case.compare(f"{name}.grad_sem", of_semantic)
        logits, seen = copy.deepcopy(discriminator), []
        fake = logits(result.reconstruction)
        case.compare(
            f"{name}.generator_adv_loss", gan.generator_loss(fake, settings["gen_adv_loss"])
        )
        judged = copy.deepcopy(loss)
        judged.discriminator.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out)
        )
        case.compare(
            f"{name}.disc_total", judged.discriminator_loss(images, result.reconstruction, step)[0]
        )
        for side, out in zip(("real", "fake"), seen, strict=True):
            case.compare(f"{name}.logits_{side}", out)
    case.finish(UNCOMPARED)
