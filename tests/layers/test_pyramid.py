"""Scales of a grid: means, their order, what one tells of the next, and where positions lie."""

import torch

from vistok.decoding import Order
from vistok.layers.pyramid import pyramid, pyramid_coordinates, upscaled

SIDES = (1, 2, 4, 8)


def test_scales_are_means_in_raster_order():
    latents = torch.randn(2, 8, 8, 3)
    scales = pyramid(latents, SIDES)
    order = Order("scales(1,2,4,8)")(latents.shape[1:3])
    assert scales.shape[1] == sum(len(fed.predict) for fed in order.passes)
    first, second, _, last = scales.split([side * side for side in SIDES], dim=1)
    assert torch.allclose(first[:, 0], latents.mean((1, 2)), atol=1e-6)
    quarters = [latents[:, r : r + 4, c : c + 4].mean((1, 2)) for r in (0, 4) for c in (0, 4)]
    assert torch.allclose(second, torch.stack(quarters, dim=1), atol=1e-6)
    assert torch.equal(last, latents.flatten(1, 2))


def test_sides_need_not_divide_the_grid():
    scales = pyramid(torch.randn(1, 5, 5, 2), (1, 3, 5))
    assert scales.shape == (1, 35, 2)


def test_a_flat_scale_tells_the_next_all():
    """The kernel sums to one: a constant stays, and a scale is kept where it is its own next."""
    flat = torch.randn(2, 1, 3)
    for side in SIDES:
        assert torch.allclose(upscaled(flat, side, 8), flat.expand(-1, side * side, -1), atol=1e-6)
    whole = torch.randn(2, 64, 3)
    assert torch.equal(upscaled(whole, 8, 8), whole)


def test_blowing_up_follows_the_cubic_kernel():
    """Keys' kernel of a = -3/4 between two samples at a quarter of their distance."""
    a, scale = -0.75, torch.tensor([0.0, 1.0])
    rows = scale[None, None].expand(1, 2, 2).reshape(1, 4, 1)  # varies along columns alone
    out = upscaled(rows, 4, 4).view(4, 4)
    assert torch.allclose(out, out[:1].expand(4, 4), atol=1e-6)

    def near(x):
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x):
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    # The second column lies at 1/4 between the samples, of which each edge repeats one.
    assert torch.isclose(out[0, 1], torch.tensor(near(0.75) + far(1.75)), atol=1e-6)


def test_all_scales_span_the_grid():
    coordinates = pyramid_coordinates((1, 2, 4))
    assert coordinates[:5].tolist() == [[0, 0], [0, 0], [0, 2], [2, 0], [2, 2]]
    assert coordinates[5:].tolist() == [[r, c] for r in range(4) for c in range(4)]
    assert torch.equal(pyramid_coordinates((3, 4))[:9].unique(), torch.tensor([0, 4 / 3, 8 / 3]))
