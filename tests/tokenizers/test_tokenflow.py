"""TokenFlow: its two branches, its stages, its previews and what it offers to understand by."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
import transformers

from vistok.errors import UserError
from vistok.layers.image_towers import CLIPTower, SigLIPTower, TimmTower, interpolated
from vistok.losses import Teacher, TokenizerLoss, alignment
from vistok.quantizers import FSQ, DualVQ, Gaussian, MultiScale
from vistok.tokenizers import ConvTokenizer, TokenFlow, Tokenizer

TINY = {
    "teacher_dim": 10,
    "semantic_depth": 1,
    "semantic_heads": 2,
    "channels": 8,
    "channel_multipliers": (1, 2, 1),
    "num_res_blocks": 1,
    "z_channels": 12,
}


def tokenflow(image_size: int = 16, scales=(1, 2, 4), siglip: bool = False, **options):
    torch.manual_seed(0)
    vq = DualVQ(40, 6, 3)
    if siglip:
        tower = SigLIPTower(4, width=16, depth=2, num_heads=2, hidden_width=20, grid=4)
    else:
        tower = CLIPTower(4, width=16, depth=2, num_heads=2, grid=4)
    quantizer = MultiScale(vq, scales, smoothers=0, jointly=False, scale_dropout=0.1)
    return TokenFlow(quantizer, tower, image_size, 6, **TINY | options)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small | {"num_hidden_layers": 1, "vocab_size": 8} | {"eos_token_id": 1},
        vision_config=small | {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4},
        projection_dim=10,
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size=16, crop_size=16).save_pretrained(folder)
    return Teacher(str(folder), layer="projected")


@pytest.mark.parametrize("siglip", [False, True])
def test_each_encoder_makes_its_channels(siglip):
    model, images = tokenflow(siglip=siglip).eval(), torch.rand(2, 3, 16, 16)
    latents = model.to_latents(images)
    rows = model.to_semantic(model.semantic_encoder(images))
    torch.testing.assert_close(latents[..., :6].flatten(1, 2), rows)
    pixels = model.quant_conv(model.encoder(2 * images - 1)).movedim(1, -1)
    torch.testing.assert_close(latents[..., 6:], pixels)
    quantised = model.quantizer(latents).quantised
    other = torch.cat([torch.randn_like(quantised[..., :6]), quantised[..., 6:]], dim=-1)
    assert torch.equal(model.to_images(other), model.to_images(quantised))
    other = torch.cat([quantised[..., :6], torch.randn_like(quantised[..., 6:])], dim=-1)
    assert torch.equal(model.to_teacher(other), model.to_teacher(quantised))


def test_pixels_are_drawn_without_the_semantic_decoder():
    model = tokenflow().eval()
    model.semantic_decoder.forward = None
    assert model.decode(model.encode(torch.rand(1, 3, 16, 16))).shape == (1, 3, 16, 16)


def test_a_margin_around_the_patches_is_resized_away():
    model, images = tokenflow(18, siglip=True).eval(), torch.rand(1, 3, 18, 18)
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    latents = model.to_latents(images)
    assert latents.shape == (1, 4, 4, 9)
    torch.testing.assert_close(seen[0], F.interpolate(2 * images - 1, (16, 16), mode="bicubic"))
    cut = model.semantic_encoder(images[..., :16, :16])
    torch.testing.assert_close(model.semantic_encoder(images), cut)
    drawn = model.decoder(model.post_quant_conv(latents[..., 6:].movedim(-1, 1)))
    drawn = F.interpolate(drawn, (18, 18), mode="bicubic") / 2 + 0.5
    torch.testing.assert_close(model.to_images(latents), drawn)


def test_siglip_sees_clamped_images():
    tower, images = tokenflow(siglip=True).semantic_encoder, 3 * torch.rand(1, 3, 16, 16) - 1
    torch.testing.assert_close(tower(images), tower(images.clamp(0, 1)))


def test_first_scales_are_previews():
    model = tokenflow().eval()
    tokens = model.encode(torch.rand(2, 3, 16, 16))
    assert model.spec.lengths == (1, 5, 21)
    for length in model.spec.lengths:
        latents = model.quantizer.decode(tokens[:, :length])
        drawn = model.to_images(latents).clamp(0, 1)
        torch.testing.assert_close(model.decode(tokens[:, :length]), drawn)
    each = model.decode(tokens, lengths=torch.tensor([1, 5]))
    torch.testing.assert_close(each[:1], model.decode(tokens[:1, :1]))
    torch.testing.assert_close(each[1:], model.decode(tokens[1:, :5]))
    with pytest.raises(UserError, match="expected"):
        model.decode(tokens[:, :4])


def test_what_is_understood_by():
    model, images = tokenflow().eval(), torch.rand(2, 3, 16, 16)
    latents = model.quantizer.decode(model.encode(images))
    torch.testing.assert_close(model.encode_semantic(images), latents)
    for part, expected in (
        ("semantic", latents[..., :6]),
        ("pixel", latents[..., 6:]),
        ("teacher", model.to_teacher(latents)),
    ):
        torch.testing.assert_close(model.encode_semantic(images, part), expected)
        torch.testing.assert_close(model.features(images)[part], expected.flatten(1, 2))
    torch.testing.assert_close(model.features(images)["tokens"], latents.flatten(1, 2))
    of_scales = [model.encode_semantic(images, scale=scale) for scale in range(3)]
    torch.testing.assert_close(sum(of_scales), latents)
    torch.testing.assert_close(model.encode_semantic(images, scale=-1), of_scales[-1])
    single = TokenFlow(
        FSQ([8, 5, 4]), CLIPTower(4, 16, 1, 2, 4), 16, 1, **TINY | {"teacher_dim": None}
    )
    assert set(single.features(images)) == {"tokens", "semantic", "pixel"}
    assert single.encode_semantic(images).shape == (2, 4, 4, 3)
    with pytest.raises(UserError, match="no semantic decoder"):
        single.encode_semantic(images, "teacher")
    with pytest.raises(UserError, match="has no scales"):
        single.encode_semantic(images, scale=0)


def test_stage_1_trains_everything_towards_pixels_and_teacher(teacher):
    model, images = tokenflow().train(), torch.rand(2, 3, 16, 16)
    loss = TokenizerLoss(reconstruction_weight=4.0, alignment_weight=1.0, teacher=teacher)
    result = model(images)
    objective, terms = loss.generator_loss(images, result, 0, model.last_layer)
    assert terms.keys() == {"reconstruction", "codebook", "commitment", "alignment"}
    torch.testing.assert_close(
        terms["alignment"], alignment(result.features, teacher(images)).mean().detach()
    )
    objective.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    only = tokenflow().train()
    alignment(only(images).features, teacher(images)).mean().backward()
    for part in (only.semantic_encoder, only.to_semantic, only.semantic_decoder):
        assert all(p.grad.abs().sum() > 0 for p in part.parameters() if p.ndim > 1)


def test_training_leaves_out_scales():
    model, images = tokenflow().train(), torch.rand(1, 3, 16, 16)
    model.quantizer.scale_dropout = 1.0
    torch.manual_seed(0)
    lengths = {model(images).tokens.shape[1] for _ in range(8)}
    assert lengths == {21 - 4, 21 - 16}, "any but the first"
    assert model.eval()(images).tokens.shape[1] == 21


def test_stage_2_trains_the_pixel_decoder_alone():
    model, images = tokenflow(stage=2).train(), torch.rand(2, 3, 16, 16)
    result = model(images)
    assert (result.losses, result.features) == ({}, None)
    result.reconstruction.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}
    before = model.quantizer.quantizer.embedding.weight.clone()
    model.update_codebook(result.latents)
    assert torch.equal(model.quantizer.quantizer.embedding.weight, before)


def test_stage_2_starts_from_stage_1():
    first = tokenflow()
    same, enhanced = (
        tokenflow(stage=2),
        tokenflow(stage=2, decoder_channels=16, decoder_res_blocks=2),
    )
    own = {name: p.clone() for name, p in enhanced.decoder.state_dict().items()}
    for later in (same, enhanced):
        torch.nn.init.zeros_(later.post_quant_conv.weight)
        later.start_from(first)
        kept = {k: p for k, p in later.state_dict().items() if not k.startswith("decoder.")}
        assert all(torch.equal(p, first.state_dict()[name]) for name, p in kept.items())
    assert torch.equal(same.last_layer, first.last_layer)
    assert all(torch.equal(p, own[name]) for name, p in enhanced.decoder.state_dict().items())
    with pytest.raises(UserError, match="do not fit"):
        tokenflow(decoder_channels=16).start_from(first)
    with pytest.raises(UserError, match="do not fit"):
        same.start_from(ConvTokenizer(FSQ([8, 5, 4]), 16, 8, (1, 2), num_res_blocks=1))


def test_other_sizes_interpolate_positions(tmp_path):
    model = tokenflow().eval()
    wide = model.at(24, (1, 2, 4, 6))
    assert wide.spec.num_tokens == 57
    images = torch.rand(1, 3, 24, 24)
    assert torch.equal(
        wide.quantizer.quantizer.embedding.weight, model.quantizer.quantizer.embedding.weight
    )
    assert wide.encode_semantic(images, "teacher").shape == (1, 6, 6, 10)
    assert wide.decode(wide.encode(images)).shape == images.shape
    wide.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images), wide.encode(images))
    with pytest.raises(UserError, match="the last scale is 4x4, but latents are 6x6"):
        model.at(24, (1, 2, 4))


def cubic(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Return what each of `side` values counts at positions (Keys, 1981, with a slope of -0.75)."""
    weights = torch.zeros(len(positions), side, dtype=torch.float64)
    for row, position in zip(weights, positions.tolist(), strict=True):
        for tap in range(int(position // 1) - 1, int(position // 1) + 3):
            x = abs(position - tap)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            row[min(max(tap, 0), side - 1)] += near if x <= 1 else far
    return weights.float()


def test_positions_lie_a_tenth_of_one_too_close():
    side, size, table = 7, (8, 10), torch.randn(49, 3)
    assert interpolated(table, (side, side)) is table
    rows, columns = (
        cubic((torch.arange(n, dtype=torch.float64) + 0.5) * side / (n + 0.1) - 0.5, side)
        for n in size
    )
    expected = torch.einsum("ir,jc,rcd->ijd", rows, columns, table.unflatten(0, (side, side)))
    torch.testing.assert_close(interpolated(table, size), expected.flatten(0, 1))


def test_wrong_sizes_are_refused():
    with pytest.raises(UserError, match="1 decoder_channel_multipliers for 3"):
        tokenflow(decoder_channel_multipliers=(1,))
    with pytest.raises(UserError, match="semantic_dim 3 must leave some"):
        TokenFlow(FSQ([8, 5, 4]), CLIPTower(4, 16, 1, 2, 4), 16, 3, **TINY)
    with pytest.raises(UserError, match="a Gaussian reads 6 channels for 3"):
        TokenFlow(Gaussian(3), CLIPTower(4, 16, 1, 2, 4), 16, 1, **TINY)


TIMM = importlib.util.find_spec("timm") is not None


@pytest.mark.skipif(TIMM, reason="timm is installed")
def test_networks_of_timm_need_timm():
    with pytest.raises(UserError, match="needs timm"):
        TimmTower()


@pytest.mark.skipif(not TIMM, reason="timm is not installed")
def test_networks_of_timm():
    with torch.device("meta"):
        for name in ("vitamin_small_224", "vit_tiny_patch16_224"):
            tower = TimmTower(name, image_size=64)
            assert tower(torch.rand(2, 3, 64, 64)).shape == (2, 16, tower.width)
    with pytest.raises(UserError, match="timm knows no network 'vitamine'"):
        TimmTower("vitamine")
