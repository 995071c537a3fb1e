"""The modulated block of xAR and FlowAR, and its times."""

import math

import pytest
import torch

from vistok.layers.cache import KVCache
from vistok.layers.gated_transformer import GatedBlock, gated_width, modulated, rms_normed
from vistok.layers.positions import TimeEmbedding, time_features
from vistok.layers.rotary import rotary_factors, rotary_table, rotate

CONDITION = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return GatedBlock(32, 4, gated_width(32)).eval()


@torch.no_grad()
def test_the_six_numbers_are_gates_scales_shifts(block):
    x = torch.randn(2, 5, 32)
    modulation = block.modulate(CONDITION)
    gate, mlp_gate, scale, mlp_scale, shift, mlp_shift = modulation.unbind(2)
    hidden = x + gate * block.attention(rms_normed(x) * (1 + scale) + shift)
    expected = hidden + mlp_gate * block.feed_forward(
        rms_normed(hidden) * (1 + mlp_scale) + mlp_shift
    )
    assert torch.allclose(block(x, modulation), expected, atol=1e-5)
    shut = modulation.clone()
    shut[:, :, :2] = 0
    assert torch.equal(block(x, shut), x)


@torch.no_grad()
def test_rows_may_have_modulations_of_their_own(block):
    x = torch.randn(2, 5, 32)
    modulation = block.modulate(CONDITION)
    assert torch.allclose(block(x, modulation.repeat(1, 5, 1, 1)), block(x, modulation), atol=1e-6)


@torch.no_grad()
def test_tentative_rows_of_some_sequences_read_the_prefix(block):
    """The steps of a flow: rows appended anew each time after a prefix that stays."""
    x = torch.randn(2, 7, 32)
    modulation = block.modulate(CONDITION)
    cache = KVCache(1, 2, 4, 7, 8, x.dtype, x.device)
    rank = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    full = block(x, modulation, mask=rank <= rank[:, None])
    block(x[:, :3], modulation, cache=cache)
    cache.advance(3)
    block(torch.randn(2, 4, 32), modulation, cache=cache)
    assert torch.allclose(block(x[:, 3:], modulation, cache=cache), full[:, 3:], atol=1e-5)
    first = block(x[:1, 3:], modulation[:1], cache=cache)
    assert torch.allclose(first, full[:1, 3:], atol=1e-5)


def test_norms_have_no_weight_and_survive_half_precision():
    x = 300 * torch.randn(1, 3, 32)  # whose squares overflow
    assert torch.allclose(rms_normed(x).square().mean(-1), torch.ones(1, 3), atol=1e-4)
    assert torch.isfinite(rms_normed(x.half())).all()
    nothing = torch.zeros(1, 1, 32)
    assert torch.equal(modulated(x, nothing, nothing), rms_normed(x))
    assert not any("norm" in name for name, _ in GatedBlock(32, 4, 85).named_parameters())


def test_published_widths():
    assert [gated_width(dim) for dim in (768, 1024, 1280)] == [2048, 2730, 3413]


def test_times_are_features_of_whole_numbers():
    features = time_features(torch.tensor([0.0, 941.0]), 256, highest=1.0, span=10000.0)
    angles = [941 * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    expected = [f(angle) for f in (math.cos, math.sin) for angle in angles]
    assert torch.equal(features[0], torch.tensor([1.0] * 128 + [0.0] * 128))
    assert torch.allclose(features[1], torch.tensor(expected), atol=1e-4)
    embedding = TimeEmbedding(16)
    embedded = embedding(torch.tensor([0, 941]))
    assert torch.equal(embedded, torch.nn.Sequential.forward(embedding, features))


def test_rotary_factors_take_points_between_those_of_a_grid():
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0))
    assert torch.equal(rotary_factors(grid, 16), rotary_table((3, 4), 16))
    x = torch.randn(1, 1, 2, 16)
    shifted = [
        rotate(x, rotary_factors(torch.tensor([[0.5, 1.0], [2.0, 0.25]]) + by, 16)) for by in (0, 3)
    ]
    scores = [turned[..., 0, :] @ turned[..., 1, :].mT for turned in shifted]
    assert torch.allclose(*scores, atol=1e-4)
