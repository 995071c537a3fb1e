"""ReToK: what its parts compute, and that every way to a prefix is the same."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from vistok.errors import UserError
from vistok.layers.adaptive_conv import AdaptiveGroupNorm, DepthToSpace
from vistok.quantizers import FSQ, VQ
from vistok.tokenizers import ReTok
from vistok.tokenizers.retok import pooled_grids

CONFIGS = Path(__file__).parents[2] / "configs" / "tokenizers"
TINY = {
    "image_size": 16,
    "num_latent_tokens": 8,
    "num_redundant": 6,
    "tail_drop": "uniform(2,14)",
    "channels": 8,
    "channel_multipliers": (1, 2, 1),
    "num_res_blocks": 1,
    "z_channels": 12,
    "encoder_width": 16,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "decoder_width": 24,
    "decoder_depth": 3,
    "decoder_heads": 4,
}


def tiny(**changes):
    return ReTok(FSQ([8, 5, 4]), **(TINY | changes))


def images(count=3):
    return torch.rand(count, 3, 16, 16)


def test_queries_are_means_at_rising_resolution_and_the_redundant_ones_repeat_them():
    assert pooled_grids(256) == [
        (1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16)
    ]  # fmt: skip
    part = tiny().to_tokens
    part.global_proj = torch.nn.Identity()
    memory = torch.randn(2, 16, 16)
    queries = part.initial_queries(memory, (4, 4))
    grid = memory.unflatten(1, (4, 4))
    assert queries.shape == (2, 14, 16)
    torch.testing.assert_close(queries[:, 0], memory.mean(1))
    torch.testing.assert_close(queries[:, 1], memory.mean(1))
    torch.testing.assert_close(queries[:, 3], grid[:, :, 2:].mean((1, 2)))
    torch.testing.assert_close(queries[:, 6], grid[:, 2:, :2].mean((1, 2)))
    assert torch.equal(queries[:, 8:], queries[:, 2:8])


@pytest.mark.parametrize("cell_init", ["first", "multi-level"])
def test_a_prefix_is_what_a_mask_leaves(cell_init):
    model = tiny(cell_init=cell_init).eval()
    pictures = images()
    latents = model.quantizer(model.to_latents(pictures)).quantised
    lengths = torch.tensor([1, 5, 13])
    masked = model(pictures, lengths=lengths).reconstruction
    for i, k in enumerate(lengths.tolist()):
        cut = model(pictures, lengths=k).reconstruction
        torch.testing.assert_close(masked[i], cut[i], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.to_images(latents[:, :k]), cut, atol=1e-5, rtol=1e-4)
    tokens = model.encode(pictures)
    lengths = torch.tensor([2, 8, 3])
    decoded = model.decode(tokens, lengths)
    for i, k in enumerate(lengths.tolist()):
        prefix = model.decode(tokens[i : i + 1, :k])
        torch.testing.assert_close(decoded[i : i + 1], prefix, atol=1e-5, rtol=1e-4)


def test_cells_start_from_the_tokens_of_their_place():
    part = tiny(cell_init="multi-level").to_grid
    memory = torch.randn(2, 14, 24)
    cells = part.initial_cells(memory, None).unflatten(1, (4, 4))
    expected = memory[:, 0] + memory[:, 1] + memory[:, 3] + memory[:, 6]
    torch.testing.assert_close(cells[:, 2, 0], expected - memory[:, 3] + memory[:, 2])
    torch.testing.assert_close(cells[:, 3, 3], expected - memory[:, 6] + memory[:, 7])
    first = part.initial_cells(memory[:, :1], None)
    assert torch.equal(first, memory[:, :1].expand(-1, 16, -1))


def test_redundant_tokens_are_thrown_away():
    model = tiny().eval()
    pictures = images()
    tokens = model.encode(pictures, redundant=True)
    assert tokens.shape == (3, 14)
    assert torch.equal(model.encode(pictures), tokens[:, :8])
    assert model.spec.shape == (8,) and model.spec.ordered
    output = model(pictures)
    assert torch.equal(output.tokens, tokens[:, :8])
    assert output.kept is None
    assert output.latents.shape == (3, 14, 3)


def test_without_tail_drop_all_tokens_are_needed():
    model = tiny(num_redundant=0, tail_drop=None)
    assert not model.spec.ordered
    assert model(images()).kept is None
    with pytest.raises(UserError, match="expected 8 ids"):
        model.decode(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_training_keeps_a_share_of_all_tokens(scope):
    model = tiny(tail_drop=f"uniform(2,14,{scope})")
    kept = torch.cat([model(images()).kept for _ in range(12)]) * 14
    assert kept.min() >= 2 - 1e-4 and kept.max() <= 14 + 1e-4
    assert kept.max() > 8, "redundant tokens are decoded from, too"
    by_batch = kept.view(12, 3)
    assert (by_batch == by_batch[:, :1]).all() == (scope == "batch")


def test_features_to_align():
    model = tiny(alignment_dim=10, distill_depth=2, feature_weight=0.0)
    output = model(images())
    assert output.features.shape == (3, 4, 4, 10)
    output.features.square().mean().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("to_grid.layers.1.") for name in reached)
    assert any(name.startswith("encoder.") for name in reached)
    late = ("to_grid.layers.2.", "to_grid.ln_post.", "to_grid.conv_out.", "decoder.")
    assert not any(name.startswith(late) for name in reached)
    assert "feature" not in output.losses


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_feature_loss_compares_the_grids(distance):
    model = tiny(feature_loss=distance, feature_weight=0.5).eval()
    pictures = images()
    encoded = model.to_features(pictures)
    latents = model.quantizer(model.to_latents(pictures)).quantised
    decoded, _ = model.to_decoder_features(latents[:, :5])
    if distance == "mse":
        expected = (encoded - decoded).square().mean()
    else:
        unit = [F.normalize(grid, dim=1) for grid in (encoded, decoded)]
        expected = (1 - (unit[0] * unit[1]).sum(1)).mean()
    loss = model(pictures, lengths=5).losses["feature"]
    torch.testing.assert_close(loss, 0.5 * expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("query_init", ["mean", "learned"])
def test_other_queries(query_init):
    model = tiny(query_init=query_init, num_latent_tokens=7, num_redundant=5, tail_drop="uniform")
    output = model(images())
    (output.reconstruction.mean() + sum(output.losses.values())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.eval().encode(images()).shape == (3, 7)


def test_new_latents_may_be_spread():
    torch.manual_seed(0)
    latents = tiny(latent_std=1.5, z_channels=64, encoder_width=64).to_latents(images())
    assert 0.75 < latents.std() < 3


def test_plain_decoder():
    names = {name for name, _ in tiny(adaptive_gn=False, d2s_up=False).decoder.named_parameters()}
    assert not any("adaptive" in name for name in names)
    assert tiny(adaptive_gn=False, d2s_up=False)(images()).reconstruction.shape == (3, 3, 16, 16)


def test_oblong_images():
    model = tiny(image_size=(16, 32), num_latent_tokens=16).eval()
    tokens = model.encode(torch.rand(2, 3, 16, 32))
    assert tokens.shape == (2, 16)
    assert model.decode(tokens[:, :3]).shape == (2, 3, 16, 32)


def test_depth_to_space_orders_channels_by_place():
    up = DepthToSpace(3)
    x = torch.randn(1, 3, 2, 2)
    deep, wide = up.conv(x), up(x)
    for dy in (0, 1):
        for dx in (0, 1):
            block = deep[:, (dy * 2 + dx) * 3 : (dy * 2 + dx + 1) * 3]
            assert torch.equal(wide[:, :, dy::2, dx::2], block)


def test_adaptive_norm_takes_the_spread_of_the_style():
    norm = AdaptiveGroupNorm(5, 6, groups=2)
    x, style = torch.randn(2, 6, 4, 4), torch.randn(2, 5, 3, 3)
    deviation = (style.var((2, 3), unbiased=True) + 1e-6).sqrt()
    groups = x.unflatten(1, (2, 3))
    centred = groups - groups.mean((2, 3, 4), keepdim=True)
    spread = (groups.var((2, 3, 4), unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = (centred / spread).flatten(1, 2) * norm.gamma(deviation)[:, :, None, None]
    expected = expected + norm.beta(style.mean((2, 3)))[:, :, None, None]
    torch.testing.assert_close(norm(x, style), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "to_grid", "total"),
    [("retok_ss", 33.73, 136.30), ("retok_sb", 130.12, 232.69), ("gigatok_ss", 33.62, 136.07)],
)
def test_published_sizes(name, to_grid, total):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["tokenizer"]["init_args"]
    vq = config.pop("quantizer")["init_args"]
    with torch.device("meta"):
        model = ReTok(VQ(**vq), **config)
    parts = (model.encoder, model.to_grid, model.decoder, model)
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    assert [round(m, 2) for m in millions] == [26.14, to_grid, 50.16, total]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "18x18 must be divisible by 4"),
        ({"decoder_channel_multipliers": (1, 2)}, "counts must be equal"),
        ({"num_latent_tokens": 12}, "power of two"),
        ({"num_redundant": 9}, "no more redundant tokens"),
        ({"num_latent_tokens": 64}, "cannot be pooled to 4x8"),
        ({"tail_drop": "uniform(2,15)"}, "within 1 to 14"),
        ({"encoder_heads": 3}, "width 16 must be a multiple of 3"),
        ({"alignment_dim": 4, "distill_depth": 4}, "within 1 to decoder_depth 3"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)
