import re

import pytest
import torch
from safetensors.torch import save_file

from vistok.checkpoints.titok import convert
from vistok.errors import CheckpointError
from vistok.quantizers import VQ, Gaussian
from vistok.tokenizers import MaskGITVQGAN, TiTok, TwoStageTiTok

VIT = {
    "image_size": 16,
    "patch_size": 4,
    "num_latent_tokens": 6,
    "encoder_width": 24,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "decoder_width": 20,
    "decoder_depth": 1,
    "decoder_heads": 4,
}
HEADS = {"encoder_heads": 2, "decoder_heads": 4}
VQGAN = {
    "num_proxy_codes": 32,
    "vqgan_channels": 8,
    "vqgan_channel_multipliers": [2, 3, 1],
    "vqgan_res_blocks": 2,
    "vqgan_dim": 6,
}
OFFICIAL = (
    (r"^vqgan\.quantizer\.", "pixel_quantize."),
    (r"^vqgan\.", "pixel_"),
    (r"^quantizer\.", "quantize."),
    (r"^((?:pixel_)?decoder)\.levels\.(\d+)\.", r"\1.up.\2.block."),
    (r"^encoder\.levels\.(\d+)\.", r"encoder.down.\1.block."),
    (r"\.resample\.(\d+)\.conv\.", r".up.\1.upsample_conv."),
    (r"\.in_proj\.", ".in_proj_"),
    (r"^encoder\.proj_out\.", "encoder.conv_out."),
    (r"^decoder\.head\.proj\.", "decoder.ffn.0."),
)


def published(model) -> dict[str, torch.Tensor]:
    """The model's tensors under their official names."""
    head = "decoder.ffn.2." if isinstance(model, TwoStageTiTok) else "decoder.conv_out."
    weights = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in (*OFFICIAL, (r"^decoder\.head\.conv_out\.", head)):
            name = re.sub(pattern, replacement, name)
        if name == "encoder.conv_out.weight" and isinstance(model, TiTok):
            tensor = tensor[..., None, None]
        weights[name] = tensor[None] if name == "decoder.mask_token" else tensor
    return weights


def vqgan(**options) -> MaskGITVQGAN:
    return MaskGITVQGAN(VQ(32, 6, l2_normalise=False), 16, **{"channels": 8} | options)


def two_stage(stage, **options) -> TwoStageTiTok:
    return TwoStageTiTok(VQ(40, 5), stage, **{"decoder_patch_size": 4} | VIT | VQGAN | options)


@pytest.mark.parametrize(
    "options",
    [
        {"channel_multipliers": [2, 1, 3], "num_res_blocks": 1},
        {"channel_multipliers": [1], "num_res_blocks": 2},
        {"channel_multipliers": [4, 2], "num_res_blocks": 1},
    ],
)
def test_vqgan_sizes_are_read_from_shapes(options):
    model = vqgan(**options)
    assert convert(published(model), image_size=16).fingerprint() == model.fingerprint()
    assert convert(published(model), image_size=[16, 24]).image_size == (16, 24)


@pytest.mark.parametrize(
    "model",
    [
        lambda: TiTok(VQ(40, 5, l2_normalise=False), **VIT, decoder_patch_size=8),
        lambda: TiTok(Gaussian(5), **VIT, decoder_patch_size=2, text_length=3, text_dim=7),
        lambda: two_stage(1, vqgan_channels=None),
        lambda: two_stage(2),
    ],
)
def test_titok_sizes_are_read_from_shapes(model):
    model = model()
    imported = convert(published(model), **HEADS)
    assert type(imported) is type(model)
    wanted = model.state_dict()
    assert all(torch.equal(wanted[k], v) for k, v in imported.state_dict().items())
    ignored = ("vqgan_channel_multipliers", "vqgan_res_blocks", "vqgan_dim", "decoder_patch_size")
    bare = {} if model.config.get("vqgan_channels") else dict.fromkeys(ignored)
    assert imported.arguments | bare == model.arguments | bare


def test_the_use_of_codes_counts_for_training_alone():
    model = TiTok(VQ(40, 5, l2_normalise=False, revival=True), **VIT, decoder_patch_size=4)
    model.quantizer.embed_prob.uniform_()
    weights = published(model)
    assert convert(weights, **HEADS, revival=True).fingerprint() == model.fingerprint()
    assert not convert(weights, **HEADS).quantizer.revival
    del weights["quantize.embed_prob"]
    assert (convert(weights, **HEADS, revival=True).quantizer.embed_prob == 0).all()


@torch.no_grad()
def test_a_vqgan_completes_stage_1(tmp_path):
    bare = two_stage(1, vqgan_channels=None)
    teacher = vqgan(channel_multipliers=[2, 3, 1])
    path = tmp_path / "vqgan.safetensors"
    save_file(published(teacher), path)
    images = torch.rand(2, 3, 16, 16)
    for source in (published(teacher), str(path)):
        model = convert(published(bare), **HEADS, vqgan=source)
        assert torch.equal(model.encode(images), bare.encode(images))
        assert torch.equal(model.proxy_codes(images), teacher.encode(images))
    with pytest.raises(CheckpointError, match="decodes to pixels itself, and takes no vqgan"):
        convert(published(two_stage(2)), **HEADS, vqgan=str(path))


def test_one_d_piece_has_prefixes():
    model = convert(published(two_stage(2)), **HEADS, tail_drop="uniform(1,5)")
    assert model.spec.has_prefixes and model.tail_drop.high == 5


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.ln_pre.bias", None, "1 missing tensor(s) for TwoStageTiTok: encoder.ln_pre.bias"),
        ("encoder.extra", torch.zeros(2), "1 unexpected tensor(s)"),
        ("decoder.ln_pre.bias", torch.zeros(2), "1 mismatched tensor(s)"),
        ("decoder.mask_token", None, "not a TiTok (no usable tensor 'decoder.mask_token')"),
        ("decoder.positional_embedding", torch.zeros(0, 20), "not a TiTok"),
        ("pixel_quantize.embedding.weight", None, "not a TiTok"),
    ],
)
def test_what_does_not_fit_is_refused(name, tensor, message):
    weights = published(two_stage(2))
    weights.pop(name, None)
    if tensor is not None:
        weights[name] = tensor
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        convert(weights, where="there", **HEADS)
    assert str(error.value).startswith("there: ") and "\n" not in str(error.value)
    del weights["latent_tokens"]
    with pytest.raises(CheckpointError, match="neither a TiTok nor a MaskGIT-VQGAN"):
        convert(weights)
