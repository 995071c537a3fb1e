import json

import pytest
import torch

from vistok.errors import UserError
from vistok.quantizers import FSQ, DimensionWise, Gaussian
from vistok.tokenizers import ConvTokenizer, KLAutoencoder, KLTokenizer, TiTok, Tokenizer
from vistok.tokens import TokenSpec

SMALL = {
    "latent_channels": 3,
    "block_channels": [8, 12, 8],
    "layers_per_block": 1,
    "norm_groups": 4,
}
SCALES, SHIFTS = [0.5, 2.0, 1.5], [0.3, -1.0, 0.0]
VARIANTS = {
    "plain": {},
    "attention": {"encoder_attention": [0, 2], "decoder_attention": [1]},
    "bare": {"mid_attention": False, "quant_conv": False, "post_quant_conv": False},
    "scaled": {"scaling_factor": SCALES, "shift_factor": SHIFTS},
}
VIT = {"width": 24, "depth": 1, "heads": 2}
QUANTIZERS = {"gaussian": Gaussian, "dimension-wise": DimensionWise}
close = torch.testing.assert_close


def tokenizer(quantizer=Gaussian, **changes) -> KLTokenizer:
    return KLTokenizer(quantizer(3), KLAutoencoder(**(SMALL | changes)), (16, 24)).eval()


def pictures(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 16, 24)


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_trains_saves_and_loads(changes, quantizer, tmp_path):
    model = tokenizer(quantizer, **changes).train()
    result = model(pictures())
    (result.reconstruction.square().mean() + result.losses["kl"]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert result.usage["deviation"] > 0
    model.eval().save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path).eval()
    assert loaded.fingerprint() == model.fingerprint()
    images = pictures()
    tokens = model.encode(images)
    model.spec.check(tokens, "test")
    assert torch.equal(loaded.encode(images), tokens)
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))


def test_reads_checkpoints_without_the_later_arguments(tmp_path):
    model = tokenizer(scaling_factor=0.5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["vae"] = {k: config["vae"][k] for k in ("_class_name", *SMALL, "scaling_factor")}
    file.write_text(json.dumps(config))
    assert Tokenizer.from_pretrained(tmp_path).fingerprint() == model.fingerprint()


def test_attention_is_where_it_is_asked_for():
    vae = KLAutoencoder(**SMALL, **VARIANTS["attention"]).vae
    with_attention = [hasattr(block, "attentions") for block in vae.encoder.down_blocks]
    assert with_attention == [True, False, True]
    # The decoder's blocks begin at the coarsest level.
    with_attention = [hasattr(block, "attentions") for block in vae.decoder.up_blocks]
    assert with_attention == [False, True, False]


@torch.inference_mode()
def test_latents_are_shifted_then_scaled():
    model = tokenizer(**VARIANTS["scaled"])
    images = pictures()
    unscaled, log_variance = model.vae.moments(images).chunk(2, dim=1)
    scale, shift = (torch.tensor(numbers)[:, None, None] for numbers in (SCALES, SHIFTS))
    expected = (unscaled - shift) * scale
    close(model.encode(images), expected.movedim(1, -1))
    close(model.vae.encode(images), expected)
    mean, scaled = model.quantizer.moments(model.statistics(images))
    close(mean, expected.movedim(1, -1))
    close(scaled, (log_variance + 2 * scale.log()).movedim(1, -1))
    decoded = (model.vae.vae.decode(unscaled).sample + 1) / 2
    close(model.decode(model.encode(images)), decoded.clamp(0, 1))


@torch.inference_mode()
def test_factors_are_exact_whatever_the_dtype():
    model = tokenizer(scaling_factor=0.2325, shift_factor=0.1)
    moments = torch.randn(1, 6, 4, 6)
    expected = model.vae.scaled(moments)
    model.bfloat16()
    assert torch.equal(model.vae.scaled(moments), expected)
    assert model.vae.encode(pictures()).dtype == torch.bfloat16
    assert model.decode(model.encode(pictures())).dtype == torch.float32


@torch.inference_mode()
@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_statistics_are_what_tokens_are_drawn_from(quantizer):
    model = tokenizer(quantizer)
    images = pictures()
    statistics = model.statistics(images)
    assert model.statistics_spec == TokenSpec.latents((4, 6), 6)
    model.statistics_spec.check(statistics, "test")
    first, second = model.draw(statistics), model.draw(statistics)
    model.spec.check(first, "test")
    assert not torch.equal(first, second)
    certain = torch.cat([statistics[..., :3], torch.full_like(statistics[..., :3], -30)], -1)
    drawn, encoded = model.draw(certain), model.encode(images)
    close(drawn, encoded, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_rescaling_gives_unit_variance_and_the_same_pictures():
    model = tokenizer(**VARIANTS["scaled"])
    images = pictures(4)
    latents = model.encode(images)
    deviations, means = latents.std((0, 1, 2)).tolist(), latents.mean((0, 1, 2)).tolist()
    apart = model.rescaled(deviations, means)
    close(apart.encode(images).std((0, 1, 2)), torch.ones(3))
    close(apart.encode(images).mean((0, 1, 2)), torch.zeros(3), atol=1e-4, rtol=0)
    together = model.rescaled(latents.std().item())
    close(together.encode(images).std(), torch.tensor(1.0))
    for other in (apart, together):
        close(other.decode(other.encode(images)), model.decode(latents), atol=1e-5, rtol=0)
    assert tokenizer().rescaled(4.0).vae.arguments["scaling_factor"] == 0.25


@torch.inference_mode()
@pytest.mark.parametrize("family", ["kl", "titok"])
def test_quantised_is_the_same_but_for_the_levels(family):
    vit = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in VIT.items()}
    model = tokenizer() if family == "kl" else TiTok(Gaussian(3, 0.1), 16, 4, 5, **vit).eval()
    images = torch.rand(2, *model.input_shape)
    coarse, fine = model.quantised(16, limit=4.0), model.quantised(512)
    assert type(coarse) is type(model)
    spec = TokenSpec.factorised(model.spec.shape, (16,) * 3, values="normal(4,3)")
    assert (coarse.spec, coarse.statistics_spec) == (spec, model.statistics_spec)
    assert coarse.quantizer.kl == model.quantizer.kl
    latents = model.encode(images)
    assert torch.equal(coarse.encode(images), coarse.quantizer.quantise(latents))
    assert torch.equal(
        coarse.decode(coarse.encode(images)), coarse(images).reconstruction.clamp(0, 1)
    )
    errors = [
        (other.decode(other.encode(images)) - model.decode(latents)).abs().mean()
        for other in (coarse, fine)
    ]
    assert 0 < errors[1] < errors[0] / 4
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), fine.state_dict().values(), strict=True)
    )


def test_only_continuous_latents_are_quantised():
    model = ConvTokenizer(FSQ([4, 4]), 16, 8, [1, 1], num_res_blocks=1, z_channels=8)
    with pytest.raises(UserError, match="only tokenizers of continuous latents"):
        model.quantised()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": [1.0, 2.0]}, "expected one number or 3, one per channel"),
        ({"shift_factor": [1.0]}, "shift_factor .* expected one number or 3"),
        ({"scaling_factor": 0.0}, "scaling_factor 0.0 must be positive"),
        ({"encoder_attention": [3]}, "attention at levels \\[3\\], expected 0 to 2"),
    ],
)
def test_refuses_sizes(changes, message):
    with pytest.raises(UserError, match=message):
        tokenizer(**changes)


@pytest.mark.parametrize(
    ("measured", "message"),
    [((0.0,), "deviation 0.0 must be positive"), ((1.0, [0.0]), "mean .* expected one number")],
)
def test_refuses_measures(measured, message):
    with pytest.raises(UserError, match=message):
        tokenizer().rescaled(*measured)


def test_published_halves():
    with torch.device("meta"):
        vae = KLAutoencoder(16, [128, 128, 256, 256, 512], encoder_attention=[4]).vae
    halves = (vae.encoder, vae.quant_conv), (vae.decoder, vae.post_quant_conv)
    counts = [sum(p.numel() for part in half for p in part.parameters()) / 1e6 for half in halves]
    assert counts == pytest.approx([28.27, 38.19], abs=0.005)
    assert len(vae.state_dict()) == 312
