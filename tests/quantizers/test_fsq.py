import pytest
import torch

from vistok.errors import UserError
from vistok.quantizers import FSQ


@pytest.mark.parametrize("levels", [[2, 3], [5, 4, 2]])
def test_symmetric_levels_are_evenly_spread(levels):
    quantizer = FSQ(levels, symmetric=True)
    ids = torch.arange(quantizer.vocab_size)
    codes = quantizer.decode(ids)
    for channel, count in enumerate(levels):
        torch.testing.assert_close(codes[:, channel].unique(), torch.linspace(-1, 1, count))
    inside = torch.atanh(codes * 0.999)
    assert torch.equal(quantizer.encode(inside), ids)


def test_symmetric_zero_is_a_level_above():
    assert torch.equal(FSQ([2, 4], symmetric=True).encode(torch.zeros(1, 2)), torch.tensor([5]))


def test_symmetric_gradient_passes_through_rounding():
    latents = torch.randn(7, 2, requires_grad=True)
    upstream = torch.randn(7, 2)
    (FSQ([2, 5], symmetric=True)(latents).quantised * upstream).sum().backward()
    torch.testing.assert_close(latents.grad, upstream * (1 - torch.tanh(latents).square()))


def test_scaled_levels_are_nearest_and_saturate():
    quantizer = FSQ([5, 2], symmetric=True, scale=[0.5, 0.1])
    latents = torch.tensor([[0.13, -0.01], [0.12, 3.0], [-9.0, 0.01]], requires_grad=True)
    result = quantizer(latents)
    expected = torch.tensor([[0.25, -0.1], [0.0, 0.1], [-0.5, 0.1]])
    torch.testing.assert_close(result.quantised, expected)
    result.quantised.sum().backward()
    torch.testing.assert_close(latents.grad, torch.tensor([[1.0, 1], [1, 0], [0, 1]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([4] * 32,), "more codes than int64"),
        (([4, 4], False, [1.0, 1.0]), "a scale is for symmetric levels"),
        (([4, 4], True, [1.0]), "one for each channel, 2: got 1"),
    ],
)
def test_refuses_levels_and_scales(arguments, message):
    with pytest.raises(UserError, match=message):
        FSQ(*arguments)
