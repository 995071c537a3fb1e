"""MaskGIT-VQGAN, TiTok, TA-TiTok and One-D-Piece against their official implementations."""

import re

import pytest
import torch
import torch.nn.functional as F
from official import Case, cases

from vistok.checkpoints.titok import RULES, convert
from vistok.tokenizers.sequence import token_contribution
from vistok.training import OptimizerConfig, adamw

UNCOMPARED: dict[str, str] = {}

HEADS = {"small": 8, "base": 12, "large": 16}
# What the official optimiser leaves out of weight decay, beside vectors.
NO_DECAY = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


def of_kind(*kinds):
    return lambda description: description.get("kind") in kinds


def load(case: Case, **options):
    """Return the model of a case, in eval mode, through the importer."""
    config = case.config["model"]["vq_model"]
    heads = [config[f"vit_{side}_model_size"] for side in ("enc", "dec")]
    heads = [HEADS.get(size) or int(size.split("-")[-1]) for size in heads]
    if config.get("quantize_mode", "vq") == "vq":
        options |= {
            "l2_normalise": config["use_l2_norm"],
            "commitment": config["commitment_cost"],
            "revival": config.get("clustering_vq", False),
        }
    model = convert(case.weights, encoder_heads=heads[0], decoder_heads=heads[1], **options)
    size = case.config["dataset"]["preprocessing"]["crop_size"]
    assert model.image_size == (size, size)
    return model.eval()


def ours(name: str) -> str:
    """Return our name of an official parameter."""
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def channels_first(latents):
    """(B, K, C) to the official (B, C, 1, K)."""
    return latents.transpose(1, 2).unsqueeze(2)


def channels_last(latents):
    return latents.squeeze(2).transpose(1, 2)


class Watched:
    """Records the sequences inside the next passes of a model's transformers."""

    def __init__(self, model):
        self.seen = {}
        for side, transformer in (("enc", model.encoder), ("dec", model.decoder)):
            modules = {"ln_pre": transformer.ln_pre}
            modules |= {f"block{i}": block for i, block in enumerate(transformer.transformer)}
            for name, module in modules.items():
                module.register_forward_hook(self._record(f"{side}.{name}"))
        self.model = model

    def _record(self, name):
        return lambda module, inputs, output: self.seen.update({name: output})

    def compare(self, case):
        """Last blocks compute only the rows that are read."""
        encoder, decoder = self.model.encoder, self.model.decoder
        read = {
            f"enc.block{len(encoder.transformer) - 1}": slice(1 + encoder.num_patches, None),
            f"dec.block{len(decoder.transformer) - 1}": slice(1, 1 + decoder.num_patches),
        }
        for name, output in self.seen.items():
            rows = read.get(name, slice(None))
            case.compare(name, output, lambda t, rows=rows: t[:, rows])


def compare_gradients(case, model, prefix="grad"):
    parameters = dict(model.named_parameters())
    for name in sorted(case.left):
        if name.startswith(f"{prefix}."):
            parameter = parameters[ours(name.removeprefix(f"{prefix}."))]
            gradient = parameter.grad
            case.compare(name, torch.zeros_like(parameter) if gradient is None else gradient)


def compare_decay(case, model):
    """Hold the parameters without weight decay, and the frozen ones, against the official lists."""
    extra = case.description.get("extra", {})
    official = {ours(name): name for name in case.weights}
    parameters = dict(model.named_parameters())
    if "frozen" in extra:
        frozen = {official[n] for n, p in parameters.items() if not p.requires_grad}
        assert frozen == set(extra["frozen"])
        assert all(p.grad is None for p in parameters.values() if not p.requires_grad)
    if "no_weight_decay" in extra:
        _, plain = adamw(model, OptimizerConfig(no_decay=NO_DECAY)).param_groups
        plain = {id(p) for p in plain["params"]}
        assert {official[n] for n, p in parameters.items() if id(p) in plain} == set(
            extra["no_weight_decay"]
        )


def compare_codes(case, model):
    """Encode the image; returns what the decoder takes."""
    latents = model.to_latents(case.inputs["image"])
    case.compare("z", channels_first(latents))
    ids = model.encode(case.inputs["image"])
    case.compare("ids", ids)
    quantised = model.quantizer.decode(ids)
    case.compare("z_q", channels_first(quantised))
    return latents, ids, quantised


def compare_losses(case, losses, prefix="loss", weight=1.0):
    """Compare the quantizer's terms; returns their sum, `weight` times, as it is trained."""
    total = weight * (losses["codebook"] + losses["commitment"])
    case.compare(f"{prefix}.codebook_loss", losses["codebook"])
    case.compare(f"{prefix}.commitment_loss", losses["commitment"])
    case.compare(f"{prefix}.quantizer_loss", total)
    return total


@pytest.mark.parametrize("folder", cases("titok", of_kind("PixelVQGAN")))
def test_maskgit_vqgan(folder):
    case = Case(folder)
    model = convert(case.weights, image_size=case.config["image_hw"]).eval()
    seen = {}
    for name, modules in (("down", model.encoder.levels), ("up", model.decoder.resample)):
        for i, module in enumerate(modules):
            module.register_forward_hook(
                lambda m, inputs, output, key=f"{name}{i}": seen.update({key: output})
            )
    latents = model.to_latents(case.inputs["image"])
    case.compare("h", latents.permute(0, 3, 1, 2))
    codes = model.encode(case.inputs["image"])
    case.compare("codes", codes)
    case.compare("z_q", model.quantizer.decode(codes).permute(0, 3, 1, 2))
    wanted = case.inputs["codes"].view(-1, *model.spec.shape)
    raw = model.to_images(model.quantizer.decode(wanted))
    for i in range(len(model.encoder.levels)):
        down = seen[f"down{i}"][:1]
        last = i == len(model.encoder.levels) - 1
        case.compare(f"down{i}", down if last else F.avg_pool2d(down, 2))
        case.compare(f"up{i}", seen[f"up{i}"][:1])
    case.compare("image_raw", raw)
    with torch.inference_mode():
        case.compare("image", model.decode(wanted))
        case.compare("recon", model.decode(codes))
    case.finish(UNCOMPARED)


@pytest.mark.parametrize("folder", cases("titok", of_kind("TitokStage1")))
def test_stage_1(folder, monkeypatch):
    case = Case(folder)
    model = load(case)
    watched = Watched(model)
    _, _, quantised = compare_codes(case, model)
    case.compare("logits", model.proxy_logits(quantised))
    watched.compare(case)
    tokens = case.inputs["tokens"].squeeze(1)
    case.compare("logits_from_tokens", model.proxy_logits(model.quantizer.decode(tokens)))
    train_stage_1(case, model, monkeypatch)
    compare_gradients(case, model)
    compare_decay(case, model)
    case.finish(UNCOMPARED)


def train_stage_1(case, model, monkeypatch, prefix="", keep=None):
    side = int(model.decoder.num_patches**0.5)
    codes = case.inputs["proxy_codes"].view(-1, side, side)
    monkeypatch.setattr(model, "proxy_codes", lambda images: codes)
    model.train()  # official gradients pass the quantizer in eval, too
    logits = {}
    handle = model.decoder.register_forward_hook(lambda m, i, o: logits.update(of=o))
    output = model(case.inputs["image"], lengths=keep)
    handle.remove()
    case.compare(f"{prefix}logits", logits["of"])
    case.compare(f"{prefix}loss.reconstruction_loss", output.losses["proxy"])
    weight = case.config["losses"]["quantizer_weight"]
    quantizer_loss = compare_losses(case, output.losses, f"{prefix}loss", weight)
    total = output.losses["proxy"] + quantizer_loss
    case.compare(f"{prefix}loss.total_loss", total)
    total.backward()


@pytest.mark.parametrize("folder", cases("titok", of_kind("TitokStage2")))
def test_stage_2(folder):
    case = Case(folder)
    model = load(case)
    watched = Watched(model)
    _, _, quantised = compare_codes(case, model)
    features = {}
    model.vqgan.decoder.register_forward_pre_hook(lambda m, inputs: features.update(of=inputs[0]))
    case.compare("image", model.to_images(quantised))
    case.compare("pixel_latents", features["of"])
    watched.compare(case)
    case.compare("proxy_logits", model.proxy_logits(quantised))
    tokens = model.quantizer.decode(case.inputs["tokens"].squeeze(1))
    with torch.inference_mode():
        case.compare("image_from_tokens", model.to_images(tokens))
    output = model.train()(case.inputs["image"])
    for name in ("quantizer_loss", "commitment_loss", "codebook_loss"):
        case.compare(f"loss.{name}", sum(output.losses.values(), torch.zeros(())))
    mse = F.mse_loss(output.reconstruction, case.inputs["image"])
    case.compare("mse", mse)
    mse.backward()
    compare_gradients(case, model)
    compare_decay(case, model)
    case.finish(UNCOMPARED)


@pytest.mark.parametrize("folder", cases("titok", of_kind("TitokSingleVQ")))
def test_single_stage(folder):
    case = Case(folder)
    model = load(case)
    text = case.inputs.get("text")
    watched = Watched(model)
    latents, _, quantised = compare_codes(case, model)
    image = model.to_images(quantised, text=text)
    case.compare("image", image)
    watched.compare(case)
    tokens = case.inputs["tokens"].squeeze(1)
    with torch.inference_mode():
        from_tokens = model.to_images(model.quantizer.decode(tokens), text=text)
    case.compare("image_from_tokens", from_tokens)
    assert torch.equal(model.decode(tokens, text=text), from_tokens.clamp(0, 1))
    output = model.train()(case.inputs["image"], text)
    mse = F.mse_loss(output.reconstruction, case.inputs["image"])
    case.compare("loss.mse", mse)
    (mse + compare_losses(case, output.losses)).backward()
    compare_gradients(case, model)
    compare_decay(case, model)
    for i, given in enumerate((latents.detach(), channels_last(case.inputs.get("z2", latents))), 1):
        with torch.no_grad():
            result = model.quantizer(given)
            model.update_codebook(given)
        case.compare(f"cluster.ids{i}", result.ids)
        case.compare(f"cluster.zq{i}", channels_first(result.quantised))
        case.compare(f"cluster.codebook{i}", model.quantizer.embedding.weight)
        if model.quantizer.revival:
            case.compare(f"cluster.embed_prob{i}", model.quantizer.embed_prob)
    case.finish(UNCOMPARED)


@pytest.mark.parametrize("folder", cases("titok", of_kind("TitokVAE")))
def test_continuous(folder, monkeypatch):
    case = Case(folder)
    model = load(case, kl=case.config.get("losses", {}).get("kl_weight", 1e-6))
    image, text = case.inputs["image"], case.inputs.get("text")
    watched = Watched(model)
    moments = model.to_latents(image)
    case.compare("moments", channels_first(moments))
    mean, log_variance = model.quantizer.moments(moments)
    case.compare("mean", channels_first(mean))
    case.compare("logvar", channels_first(log_variance))
    case.compare("kl", model.quantizer.divergence(moments))
    noise = channels_last(case.inputs["noise"])
    drawn = model.quantizer.encode(moments, sample=True, noise=noise)
    case.compare("z", channels_first(drawn))
    case.compare("image", model.to_images(drawn, text=text))
    watched.compare(case)
    assert torch.equal(model.encode(image), mean)
    case.compare("image_mode", model.to_images(mean, text=text))
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    output = model.train()(image, text)
    mse = F.mse_loss(output.reconstruction, image)
    case.compare("loss.mse", mse)
    case.compare("loss.kl_mean_over_batch", output.losses["kl"] / model.quantizer.kl)
    (mse + output.losses["kl"]).backward()
    compare_gradients(case, model)
    compare_decay(case, model)
    case.finish(UNCOMPARED)


def compare_prefixes(case, name, decode, quantised):
    """Compare every length, cut off and as a mask of the whole sequence."""
    for n in case.inputs["lengths"].tolist():
        case.compare(f"{name}_len{n}", decode(quantised[:, :n]))
        case.left.add(f"{name}_len{n}")
        kept = torch.arange(quantised.shape[1]).expand(quantised.shape[:2]) < n
        case.compare(f"{name}_len{n}", decode(quantised, kept))


@pytest.mark.parametrize("folder", cases("one_d_piece", of_kind("OdpStage1")))
def test_one_d_piece_stage_1(folder, monkeypatch):
    case = Case(folder)
    model = load(case, tail_drop="uniform")
    _, _, quantised = compare_codes(case, model)
    compare_prefixes(case, "logits", model.proxy_logits, quantised)
    for i, keep in enumerate(case.inputs["keep"].tolist()):
        model.zero_grad()
        train_stage_1(case, model, monkeypatch, f"train{i}.", keep)
        compare_gradients(case, model, f"train{i}.grad")
    compare_decay(case, model)
    case.finish(UNCOMPARED)


@pytest.mark.parametrize("folder", cases("one_d_piece", of_kind("OdpStage2")))
def test_one_d_piece_stage_2(folder):
    case = Case(folder)
    model = load(case, tail_drop="uniform")
    _, ids, quantised = compare_codes(case, model)
    compare_prefixes(case, "image", model.to_images, quantised)
    absolute, squared = token_contribution(
        model, ids, case.inputs["replacement"], case.inputs["positions"].tolist()
    )
    case.compare("contrib_l1", absolute)
    case.compare("contrib_l2", squared)
    output = model.train()(case.inputs["image"], lengths=int(case.inputs["keep"][0]))
    case.compare("train.image", output.reconstruction)
    mse = F.mse_loss(output.reconstruction, case.inputs["image"])
    case.compare("train.mse", mse)
    mse.backward()
    compare_gradients(case, model, "train.grad")
    compare_decay(case, model)
    case.finish(UNCOMPARED)
