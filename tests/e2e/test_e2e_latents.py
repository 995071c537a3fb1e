"""A KL autoencoder from its published file to scaled, quantised and cached latents."""

import re

import pytest
import torch
from commands import run
from diffusers import AutoencoderKL

from vistok.data import Emoji, EvaluationImages, TokenCache, Transform
from vistok.quantizers import FSQ, Gaussian
from vistok.tokenizers import ConvTokenizer, KLAutoencoder, KLTokenizer, TiTok, Tokenizer

DATA = ("--data", "Emoji", "--data.split", "held-out", "--num_workers", 0)
CLI = "vistok/cli.py"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """Directory of an autoencoder whose latents are far from unit variance."""
    torch.manual_seed(0)
    vae = KLAutoencoder(3, [8, 8], 1, 4, shift_factor=[0.0, 5.0, 0.0])
    torch.nn.init.normal_(vae.vae.quant_conv.weight[:3], std=3.0)  # the means' rows
    folder = tmp_path_factory.mktemp("kl")
    KLTokenizer(Gaussian(3), vae, 8).save_pretrained(folder)
    return str(folder)


@torch.inference_mode()
def draws(model: Tokenizer) -> torch.Tensor:
    """Return latents of every picture, (n, 3)."""
    images = EvaluationImages(Emoji("held-out"), Transform("resize-center-crop", 8))
    pictures = torch.stack([images[i]["image"] for i in range(len(images))])
    return model.draw(model.statistics(pictures)).flatten(0, -2)


@pytest.mark.parametrize("per_channel", ["true", "false"])
def test_latents_of_unit_variance(tokenizer, tmp_path, capfd, per_channel):
    command = ("latents", "--tokenizer", tokenizer, *DATA, "--per_channel", per_channel)
    code, text, err = run(capfd, CLI, *command, "--output", tmp_path)
    assert code == 0, err
    before, after = (draws(Tokenizer.from_pretrained(f).eval()) for f in (tokenizer, tmp_path))
    printed = re.findall(r"mean +(\S+)  deviation (\S+)", text)
    expected = [(x.mean(), x.std()) for x in (before, *before.unbind(1))]
    for found, numbers in zip(printed, expected, strict=True):
        assert [*map(float, found)] == pytest.approx([n.item() for n in numbers], rel=0.02, abs=0.1)
    assert f"written to {tmp_path}" in text
    if per_channel == "true":
        torch.testing.assert_close(after.std(0), torch.ones(3), atol=0.02, rtol=0)
        torch.testing.assert_close(after.mean(0), torch.zeros(3), atol=0.02, rtol=0)
    else:
        torch.testing.assert_close(after.std(), torch.tensor(1.0), atol=0.02, rtol=0)
        assert "shift_factor" not in text


def test_levels_from_a_cache_of_moments(tokenizer, tmp_path, capfd):
    scaled, quantised, cache = (tmp_path / name for name in ("scaled", "quantised", "tokens"))
    code, _, err = run(
        capfd, CLI, "latents", "--tokenizer", tokenizer, *DATA, "--count", 50, "--output", scaled
    )
    assert code == 0, err
    command = ("quantize", "--tokenizer", scaled, "--output", quantised, "--levels", 16)
    code, text, err = run(capfd, CLI, *command, "--limit", 4)
    assert code == 0, err
    assert "4x4 latents of dim 3 as 4x4 factorised" in text
    assert "192 bits an image" in text

    code, text, err = run(capfd, CLI, "cache", "--tokenizer", quantised, *DATA, "--output", cache)
    assert code == 0, err
    model, tokens = Tokenizer.from_pretrained(quantised).eval(), TokenCache(cache)
    tokens.check(model.fingerprint(), Transform("resize-center-crop", 8))
    assert tokens.spec == model.statistics_spec
    moments = torch.stack([tokens.get(i, torch.Generator())["tokens"] for i in range(20)])
    first, second = model.draw(moments), model.draw(moments)
    model.spec.check(first, "test")
    assert 0 <= first.min() < first.max() <= 15
    assert not torch.equal(first, second)
    assert abs(model.quantizer.decode(first).std() - 1) < 0.2


def test_published_files_become_tokenizers(tmp_path, capfd):
    AutoencoderKL(latent_channels=2, norm_num_groups=4).save_pretrained(tmp_path / "sd")
    command = ("import", "autoencoder-kl", tmp_path / "sd", "--output", tmp_path / "run")
    code, text, err = run(capfd, CLI, *command, "--options.image_size", 16)
    assert code == 0, err
    assert "KLTokenizer" in text
    assert "16x16 latents of dim 2" in text
    model = Tokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert model.vae.arguments["scaling_factor"] == 0.18215
    torch.save({"model": {"encoder.conv_in.bias": torch.zeros(4)}}, tmp_path / "kl16.ckpt")
    command = ("import", "kl16", tmp_path / "kl16.ckpt", "--output", tmp_path / "other")
    code, _, err = run(capfd, CLI, *command)
    assert code == 2
    assert "kl16.ckpt: not an AutoencoderKL" in err


VIT = {f"{part}_{k}": n for part in ("encoder", "decoder") for k, n in (("width", 8), ("heads", 1))}
OTHERS = {
    "codes": lambda: ConvTokenizer(FSQ([4, 4]), 8, 8, [1], num_res_blocks=1, z_channels=8),
    "titok": lambda: TiTok(Gaussian(3), 8, 4, 5, encoder_depth=1, decoder_depth=1, **VIT),
}


@pytest.mark.parametrize(
    ("command", "other", "message"),
    [
        ("latents", "codes", "makes 8x8 ids of 16, which are not drawn"),
        ("latents", "titok", "TiTok has no factors"),
        ("quantize", "codes", "only tokenizers of continuous latents"),
        ("quantize", "kl", "not scaled"),
    ],
)
def test_wrong_tokenizers(tokenizer, tmp_path, capfd, command, other, message):
    source = tokenizer
    if other in OTHERS:
        source = tmp_path / "source"
        OTHERS[other]().save_pretrained(source)
    data = DATA if command == "latents" else ()
    out = tmp_path / "out"
    code, _, err = run(capfd, CLI, command, "--tokenizer", source, *data, "--output", out)
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0
    assert not out.exists()


def test_titok_is_measured_and_quantised(tmp_path, capfd):
    OTHERS["titok"]().save_pretrained(tmp_path / "titok")
    code, text, err = run(
        capfd, CLI, "latents", "--tokenizer", tmp_path / "titok", *DATA, "--count", 20
    )
    assert code == 0, err
    assert "20 of 433 pictures" in text
    assert text.count("deviation") == 4
    command = ("quantize", "--tokenizer", tmp_path / "titok", "--output", tmp_path / "levels")
    code, text, err = run(capfd, CLI, *command)
    assert code == 0, err
    assert "5 factorised with levels (64, 64, 64) of values normal(5,3)" in text
