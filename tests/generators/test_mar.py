"""MAR's own: what its blocks are spared, squares of positions, how much it masks, other grids."""

import pytest
import torch

from vistok.errors import UserError
from vistok.generators import MAR
from vistok.generators.mar import DEVIATION, mask_ratios
from vistok.heads import DiffusionHead
from vistok.tokens import TokenSpec


def tiny(shape=(4, 6), dim=3, **more):
    sizes = {"dim": 32, "depth": 2, "num_heads": 4, "decoder_dim": 48, "buffer": 5}
    spec, head = TokenSpec.latents(shape, dim), DiffusionHead(16, 1)
    model = MAR(spec, ["a", "b"], head, **sizes, **more).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def of_all_rows(model, values, labels, is_known):
    """Every row through every layer; a mask hides from the encoder what is unknown."""
    rows = [model.condition(labels).expand(-1, model.buffer, -1), model.encoder_embed(values)]
    x = model.embed_norm(torch.cat(rows, dim=1) + model.encoder_position)
    visible = torch.nn.functional.pad(is_known, (model.buffer, 0), value=True)
    for block in model.encoder_blocks:
        x = block(x, visible=visible)
    x = model.decoder_embed(model.encoder_norm(x))
    x = torch.where(visible[:, :, None], x, model.mask_token) + model.decoder_position
    for block in model.decoder_blocks:
        x = block(x)
    return model.decoder_norm(x)[:, model.buffer :] + model.output_position


@torch.inference_mode()
@pytest.mark.parametrize("count", [0, 1, 9, 23])
def test_rows_that_nobody_asks_for_are_spared(count):
    """The encoder sees the known positions alone, the last block computes the wanted ones alone."""
    model = tiny()
    order = torch.rand(3, 24).argsort(1)
    known, wanted = order[:, :count], order[:, count : count + 7]
    values, labels = torch.randn(3, 24, 3), torch.tensor([0, 1, 1])
    is_known = torch.zeros(3, 24, dtype=torch.bool).scatter(1, known, True)
    expected = of_all_rows(model, values, labels, is_known)
    expected = expected.gather(1, wanted[:, :, None].expand(-1, -1, expected.shape[-1]))
    assert torch.allclose(model.hidden(values, labels, known, wanted), expected, atol=1e-5)


def test_the_loss_is_that_of_the_masked_positions():
    model = tiny()
    order = torch.rand(2, 24).argsort(1)
    values, labels = torch.randn(2, 24, 3), torch.tensor([0, 1])
    asked = []
    model.head.loss = lambda hidden, target: (asked.append((hidden, target)), target[..., 0])[1]
    result = model.loss(values, labels, order, 17)
    ((hidden, target),) = asked
    assert torch.equal(target, values.gather(1, order[:, :17, None].expand(-1, -1, 3)))
    assert torch.equal(hidden, model.hidden(values, labels, order[:, 17:], order[:, :17]))
    assert result.loss == target[..., 0].mean()


def test_one_vector_for_all_slots_is_that_vector_in_each():
    model, known = tiny(), torch.tensor([[3, 5]])
    values, slot = torch.randn(1, 24, 3), torch.randn(1, 1, 32)
    one, each = (model.encode(values, slots, known) for slots in (slot, slot.expand(-1, 5, -1)))
    assert torch.equal(one, each)


def test_squares_are_vectors_of_channel_row_and_column():
    model = tiny((4, 6), patch_size=2)
    assert model.decoded == TokenSpec.latents((2, 3), 12)
    tokens = torch.randn(2, 4, 6, 3)
    values = model.values(tokens)
    assert torch.equal(values[:, 4], tokens[:, 2:4, 2:4].permute(0, 3, 1, 2).flatten(1))
    assert torch.equal(model.finish(values.view(2, 2, 3, 12)), tokens)
    assert len(model.plan().masked) == 6
    for shape in ((4, 5), (24,)):
        with pytest.raises(UserError, match="patch_size 2 must divide a grid"):
            tiny(shape, patch_size=2)


@pytest.mark.parametrize("least", [0.0, 0.3, 0.7, 1.0])
def test_mask_ratios_are_quantiles_of_a_truncated_normal(least):
    ratio = torch.linspace(least, 1, 100_001, dtype=torch.float64)
    density = torch.exp(-((ratio - 1) ** 2) / (2 * DEVIATION**2))
    below = torch.cumulative_trapezoid(density, ratio)
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    drawn = mask_ratios(u, least)
    assert torch.allclose(drawn[[0, -1]], torch.tensor([least, 1.0]).double(), atol=1e-12)
    if least < 1:
        at = ((drawn[1:] - least) / (1 - least) * 100_000).round().long() - 1
        assert torch.allclose(below[at] / below[-1], u[1:], atol=1e-4)


def test_published_mean_and_median_of_the_mask_ratio():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert mask_ratios(u, 0.7).mean() == pytest.approx(0.867, abs=5e-4)
    assert mask_ratios(u[:1] * 0 + 0.5, 0.7).item() == pytest.approx(0.874, abs=5e-4)


def test_another_grid_lies_between_the_positions_of_this_one():
    model = tiny()
    same, wide = model.resized((4, 6)), model.resized((8, 12))
    for name, tensor in model.state_dict().items():
        assert torch.allclose(same.state_dict()[name], tensor, atol=1e-6)
    assert wide.spec == TokenSpec.latents((8, 12), 3)
    assert torch.equal(wide.decoder_position[:5], model.decoder_position[:5])
    grid = model.output_position.view(4, 6, -1)
    fine = wide.output_position.view(8, 12, -1)
    assert torch.allclose(fine[0, 0], grid[0, 0])
    above, below = (0.75 * grid[row, 2] + 0.25 * grid[row, 3] for row in (1, 2))
    assert torch.allclose(fine[3, 5], 0.75 * above + 0.25 * below, atol=1e-6)
    with pytest.raises(UserError, match="only grids"):
        tiny((24,)).resized((4, 6))
