"""VAR's multi-scale tokenizer and its generator against the official ones: training, sampling,
smooth pictures, and editing."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from official import Case, cases

from vistok.checkpoints import var
from vistok.checkpoints.files import rename
from vistok.decoding import (
    Corrected,
    Decoding,
    Given,
    Sampling,
    Schedule,
    StoredNoise,
    decode,
    sample_categorical,
)
from vistok.decoding.editing import box, kept_of_scales
from vistok.generators import VAR
from vistok.generators.smooth import Smooth
from vistok.quantizers.multi_scale import nearest_ticks

UNCOMPARED = {}


def part(weights, prefix):
    return {k.removeprefix(prefix): w.clone() for k, w in weights.items() if k.startswith(prefix)}


def codes_options(config):
    return {
        "smoothing": abs(float(config["quant_resi"])),
        "commitment": float(config["beta"]),
        "cosine": bool(config["using_znorm"]),
    }


def tokenizer_of(weights, config, images, scales):
    return var.tokenizer(
        weights,
        tuple(images.shape[-2:]),
        scales,
        groups=config["num_groups"],
        dropout=float(config["dropout"]),
        **codes_options(config),
    )


def our_tokenizer_weights(weights):
    return var.run_order(var.split_attention(rename(weights, var.TOKENIZER_RULES, "weights")))


def our_weights(weights):
    return var.without_first_axes(rename(weights, var.RULES, "weights"))


def our_codes(weights):
    return {k.removeprefix("quantizer."): w for k, w in rename(weights, var.CODE_RULES, "").items()}


def gradient(model, published, weights, ours):
    """The gradient of a published weight, of which ours may be several parts."""
    storage = weights[published].untyped_storage().data_ptr()
    found = [
        (tensor.data_ptr(), name)
        for name, tensor in ours(weights).items()
        if tensor.untyped_storage().data_ptr() == storage
    ]
    return torch.cat([model.get_parameter(name).grad for _, name in sorted(found)])


def compare_gradients(case, prefix, model, weights, ours, published=""):
    for name in [name for name in case.expected if name.startswith(prefix)]:
        known = published + name.removeprefix(prefix)
        case.compare(name, gradient(model, known, weights, ours))


def lists_in(value):
    """All lists of sizes in a case's description."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from lists_in(inner)
    elif isinstance(value, list) and value:
        if all(isinstance(v, int) or (isinstance(v, list) and len(v) == 2) for v in value):
            yield [(v, v) if isinstance(v, int) else tuple(v) for v in value]
        for inner in value:
            yield from lists_in(inner)


def encoded_by(case):
    """The scales that the case encodes by, which need not be those of the constructor."""
    counts = [case.expected[f"ids.scale{k}"].shape[1] for k in range(scale_count(case, "ids"))]
    described = [case.config["v_patch_nums"], case.description]
    for scales in itertools.chain.from_iterable(map(lists_in, ({"own": described[0]}, described))):
        if [h * w for h, w in scales] == counts:
            return scales
    raise AssertionError(f"no list of scales has {counts} positions")


def scale_count(case, name):
    scales = [n for n in case.expected if n.startswith(f"{name}.scale")]
    return 1 + max((int(n.removeprefix(f"{name}.scale")) for n in scales), default=-1)


def compare_scales(case, codes, latents):
    """Ids and sums of all scales; return the ids."""
    config = case.config
    built = config["share_quant_resi"] or config["default_qresi_counts"]
    points = len(case.expected.get("phi_index", codes.scales))
    serving = nearest_ticks(points, built or len(config["v_patch_nums"]))
    case.compare("phi_index", torch.tensor(serving))
    assert codes.smoother_of in ([], nearest_ticks(len(codes.scales), len(codes.smoothers)))
    ids = codes.encode(latents)
    total = 0
    for scale, (own, grid) in enumerate(
        zip(ids.split(codes.sizes, 1), codes.codes(ids), strict=True)
    ):
        total = total + codes.added(grid, scale)
        case.compare(f"ids.scale{scale}", own)
        case.compare(f"fhat.scale{scale}", channels_first(total))
    torch.testing.assert_close(codes.decode(ids), total)
    return ids


def channels_first(grid):
    return grid.movedim(-1, 1)


def told(codes, ids):
    """What a generator is fed."""
    spec = codes.spec(codes.scales[-1])
    return VAR(spec, ["a"], copy.deepcopy(codes), dim=8, depth=1, num_heads=1).told(ids)


@pytest.mark.parametrize("folder", cases("var", lambda d: "VQVAE" in d["config"].get("class", "")))
def test_tokenizer(folder):
    case = Case(folder)
    config, images = case.config, case.inputs["image"]
    weights, scaled = part(case.weights, ""), (images + 1) / 2
    model = tokenizer_of(weights, config, images, encoded_by(case)).eval()
    with torch.no_grad():
        case.compare("encoder", model.encoder(images))
        latents = model.to_latents(scaled)
        case.compare("f", channels_first(latents))
        ids = compare_scales(case, model.quantizer, latents)
        assert torch.equal(ids, model.encode(scaled))
        for scale in range(scale_count(case, "recon")):
            first = ids[:, : sum(model.quantizer.sizes[: scale + 1])]
            case.compare(f"recon.scale{scale}", 2 * model.decode(first) - 1)
        case.compare("recon_from_ids", 2 * model.decode(ids) - 1)

    if "train.loss" in case.expected or "var_input" in case.expected:
        check_training(case, tokenizer_of(weights, config, images, config["v_patch_nums"]))
    case.finish(UNCOMPARED)


def check_training(case, model):
    """With the constructor's scales."""
    images, weights = case.inputs["image"], part(case.weights, "")
    scaled = (images + 1) / 2
    model.train()
    with torch.no_grad():
        case.compare("var_input", told(model.quantizer, model.encode(scaled)))
    result = model(scaled)
    reconstruction = 2 * result.reconstruction - 1
    vq_loss = sum(result.losses.values())
    case.compare("train.rec", reconstruction)
    case.compare("train.vq_loss", vq_loss)
    loss = 0.2 * F.l1_loss(reconstruction, images) + F.mse_loss(reconstruction, images) + vq_loss
    case.compare("train.loss", loss)
    loss.backward()
    compare_gradients(case, "train.grad.", model, weights, our_tokenizer_weights)


@pytest.mark.parametrize(
    "folder", cases("var", lambda d: "VectorQuantizer" in d["config"].get("class", ""))
)
def test_quantizer(folder):
    case = Case(folder)
    config, latents = case.config, case.inputs["f"].movedim(1, -1)
    weights = part({f"quantize.{k}": w for k, w in case.weights.items()}, "")
    own, listed = (
        var.codes_of(weights, scales, codes_options(config), "weights")
        for scales in (config["v_patch_nums"], encoded_by(case))
    )
    with torch.no_grad():
        compare_scales(case, listed, latents)
        if own.scales[-1] != latents.shape[1:3]:  # a list of another grid, for encoding alone
            case.finish(UNCOMPARED)
            return
        ids = own.encode(latents)
        case.compare("gen_fhat", channels_first(own.decode(ids)))
        inputs = told(own, ids)
        case.compare("var_input", inputs)
        for scale, means in enumerate(inputs.split(own.sizes[1:], dim=1)):
            grid = means.unflatten(1, own.scales[scale + 1])
            case.compare(f"gen_next.scale{scale}", channels_first(grid))

    if "train.vq_loss" in case.expected:
        check_quantizer_training(case, own, latents, weights)
    case.finish(UNCOMPARED)


def check_quantizer_training(case, own, latents, weights):
    own.train()
    latents = latents.clone().requires_grad_()
    result = own(latents)
    vq_loss = sum(result.losses.values())
    case.compare("train.fhat_ste", channels_first(result.quantised))
    case.compare("train.vq_loss", vq_loss)
    weight = case.inputs["loss_weight"].movedim(1, -1)
    ((result.quantised * weight).mean() + vq_loss).backward()
    case.compare("train.grad.f", channels_first(latents.grad))
    case.expected.pop("train.grad.f")  # no weight's
    compare_gradients(case, "train.grad.", own, weights, our_codes, published="quantize.")


def models_of(case):
    vae, config, images = case.config["vae"], case.config["var"], case.inputs["image"]
    tokenizer = tokenizer_of(part(case.weights, "vae."), vae, images, config["patch_nums"])
    model = var.generator(
        part(case.weights, "var."),
        part(case.weights, "vae."),
        scales=config["patch_nums"],
        num_heads=config["num_heads"],
        codes=codes_options(vae),
        norm_eps=float(config["norm_eps"]),
        drop_path=float(config["drop_path_rate"]),
    )
    assert [s for s, _ in model.spec.shape] == config["patch_nums"]
    return tokenizer.eval(), model.eval()


@pytest.mark.parametrize("folder", cases("var", lambda d: "var" in d["config"]))
def test_generator(folder):
    case = Case(folder)
    tokenizer, model = models_of(case)
    tokens = tokenizer.encode((case.inputs["image"] + 1) / 2)
    case.compare("train.ids", tokens)
    case.compare("train.input", model.told(tokens))
    case.compare("attn_bias", ~model.plan().joint.mask)

    def hook(module, name, seen):
        module.register_forward_hook(lambda *args: case.compare(name, seen(*args)))

    model.blocks[0].register_forward_pre_hook(lambda _, args: case.compare("train.x0", args[0]))
    for i, block in enumerate(model.blocks):
        hook(block.attention, f"train.attn{i}", lambda _, args, out: out)
        hook(block, f"train.block{i:02d}", lambda _, args, out: out)
    hidden = model.teacher_forced(tokens, case.inputs["label"])
    case.compare("train.head_norm", hidden)
    case.compare("train.logits", model.head.logits(hidden))
    loss = model(tokens, case.inputs["label"]).loss
    case.compare("train.loss", loss)
    loss.backward()
    compare_gradients(case, "train.grad.", model, part(case.weights, "var."), our_weights)
    for name, settings in case.description["generation"].items():
        check_generation(case, f"gen.{name}", settings, *models_of(case))
    case.finish(UNCOMPARED)


def uniforms_of(case, settings, sizes, batch):
    """The number of each position; theirs lie scale by scale, images in turn."""
    if "uniform" not in settings:
        return torch.zeros(batch, sum(sizes))
    stored = case.inputs[settings["uniform"].removeprefix("in.")]
    parts = stored[: batch * sum(sizes)].split([batch * size for size in sizes])
    return torch.cat([numbers.view(batch, -1) for numbers in parts], dim=1)


@torch.inference_mode()
def check_generation(case, name, settings, tokenizer, model):
    labels, codes = case.inputs["label"], model.codes
    batch, last = len(labels), len(model.sizes) - 1
    greedy = settings["top_k"] == 1
    decoding = Decoding(
        guidance=Schedule(f"linear(1,{1 + settings['cfg']})"),
        temperature=Schedule(0 if greedy and not settings.get("more_smooth") else 1),
        top_k=Corrected(settings["top_k"]),
        top_p=Corrected(settings["top_p"] or 1),
    )
    uniforms = uniforms_of(case, settings, model.sizes, batch)
    logits, maps = [], []
    guided, next_told = model.head.guided_logits, model.next_told
    model.head.guided_logits = lambda *args: logits.append(guided(*args)) or logits[-1]
    model.next_told = lambda *args: maps.append(next_told(*args)) or maps[-1]

    given = None
    if "edit" in settings:
        edit = dict(settings["edit"])
        outside = edit.pop("inpainting")
        corners = (float(edit[corner]) for corner in ("y0", "x0", "y1", "x1"))
        mask = box(codes.scales[-1], *corners, outside=outside)
        case.compare(f"{name}.edit_mask", mask)
        source = tokenizer.encode((case.inputs["image"] + 1) / 2)
        given = Given(source, kept_of_scales(mask, codes.scales))
    if settings.get("more_smooth"):
        noise = torch.exp(-torch.exp(-case.inputs[settings["gumbel"].removeprefix("in.")].double()))
        if given is not None:
            given = Given(codes.quantizer.decode(given.tokens), given.kept)
        total = decode(Smooth(model), labels, StoredNoise(noise), decoding, given=given)
        images = tokenizer.to_images(total).clamp(0, 1)
    else:
        tokens = decode(model, labels, StoredNoise(uniforms), decoding, given=given)
        total, images = codes.decode(tokens), tokenizer.decode(tokens)
    case.compare(f"{name}.fhat", channels_first(total))
    case.compare(f"{name}.image", images)
    for scale, numbers in enumerate(uniforms.split(model.sizes, dim=1)):
        case.compare(f"{name}.scale{scale}.logits", logits[scale])
        sampling = Sampling(float(not greedy), settings["top_k"], float(settings["top_p"] or 1))
        drawn = sample_categorical(logits[scale], numbers, sampling)
        case.compare(f"{name}.scale{scale}.ids", drawn)
        if scale < last:
            grid = maps[scale][:batch].unflatten(1, codes.scales[scale + 1])
            case.compare(f"{name}.scale{scale}.next_map", channels_first(grid))
