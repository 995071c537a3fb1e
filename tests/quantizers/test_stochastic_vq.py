import pytest
import torch
import torch.nn.functional as F

from vistok.errors import UserError
from vistok.quantizers import VQ, StochasticVQ


@pytest.fixture
def quantizer():
    quantizer = StochasticVQ(6, 3, temperature=0.5)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def test_codes_follow_the_softmax_of_cosines(quantizer):
    latent = torch.randn(3)
    cosines = F.normalize(latent, dim=0) @ F.normalize(quantizer.embedding.weight, dim=1).T
    ids = quantizer(latent.expand(20_000, 3)).ids
    found = torch.bincount(ids, minlength=6) / len(ids)
    expected = torch.softmax(cosines / 0.5, dim=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_stored_numbers_choose_the_codes(quantizer):
    latents, uniform = torch.randn(50, 3), torch.rand(50)
    codes = F.normalize(quantizer.embedding.weight, dim=1)
    p = torch.softmax(F.normalize(latents, dim=1) @ codes.T / 0.5, dim=1)
    expected = (p.cumsum(1) <= uniform[:, None]).sum(1)
    assert torch.equal(quantizer.encode(latents, uniform), expected)


def test_outside_training_the_nearest_code_is_taken(quantizer):
    nearest = VQ(6, 3)
    nearest.load_state_dict(quantizer.state_dict())
    latents = torch.randn(50, 3)
    expected = nearest.eval()(latents)
    for found in (quantizer.eval()(latents), StochasticVQ.forward(quantizer, latents)):
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.quantised, expected.quantised)
    assert torch.equal(quantizer.train().encode(latents), expected.ids)


def test_losses_and_gradients_are_those_of_the_drawn_codes(quantizer):
    latents = torch.randn(50, 3, requires_grad=True)
    result = quantizer(latents)
    error = F.normalize(latents, dim=1) - quantizer.decode(result.ids)
    torch.testing.assert_close(result.losses["codebook"], error.square().mean())
    torch.testing.assert_close(result.losses["commitment"], 0.25 * error.square().mean())
    (result.quantised.square().sum() + sum(result.losses.values())).backward()
    assert latents.grad.any()
    assert quantizer.embedding.weight.grad.any()


def test_refuses_a_negative_temperature():
    with pytest.raises(UserError, match="temperature >= 0"):
        StochasticVQ(6, 3, temperature=-1.0)
