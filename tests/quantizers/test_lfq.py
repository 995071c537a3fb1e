import math

import pytest
import torch
import torch.nn.functional as F

from vistok.errors import UserError
from vistok.quantizers import BSQ, LFQ, reverse_bits
from vistok.tokens import TokenSpec


def test_ids_are_the_signs_first_channel_least_significant():
    latents = torch.tensor([[0.1, -1, -1], [-1, 0, 2], [3, 1, 1]])
    assert LFQ(3).encode(latents).tolist() == [1, 4, 7]
    assert LFQ(3, scale=0.5).decode(torch.tensor([1, 4])).tolist() == [
        [0.5, -0.5, -0.5],
        [-0.5, -0.5, 0.5],
    ]
    torch.testing.assert_close(BSQ(4).decode(torch.tensor(5)), torch.tensor([1, -1, 1, -1]) / 2)


def test_reversed_bits_have_the_first_channel_most_significant():
    latents = torch.randn(50, 7)
    ids = LFQ(7).encode(latents)
    leading = ((latents > 0) * 2 ** torch.arange(6, -1, -1)).sum(-1)
    assert torch.equal(reverse_bits(leading, 7), ids)
    assert torch.equal(reverse_bits(ids, 7), leading)


def test_62_bits_fit_an_id():
    latents = torch.randn(10, 62)
    quantizer = LFQ(62, entropy=0.0)
    result = quantizer.eval()(latents)
    assert (result.ids >= 0).all()
    assert torch.equal(quantizer.decode(result.ids), latents.sign())
    torch.testing.assert_close(result.perplexity, torch.tensor(10.0))


@pytest.mark.parametrize(
    "quantizer",
    [LFQ(6, temperature=2.0), LFQ(5, temperature=0.5, scale=0.5), BSQ(5, bitwise=False), LFQ(1)],
    ids=["lfq", "lfq-odd", "bsq", "one-bit"],
)
@pytest.mark.parametrize("clamped", [False, True])
def test_entropies_are_those_of_the_softmax_over_all_codes(quantizer, clamped):
    quantizer.clamped = clamped
    latents = 0.5 * torch.randn(3, 4, quantizer.dim)
    compared = F.normalize(latents, dim=-1) if isinstance(quantizer, BSQ) else latents
    codes = quantizer.decode(torch.arange(quantizer.vocab_size))
    distances = torch.cdist(compared.reshape(-1, quantizer.dim).double(), codes.double()).square()
    p = torch.softmax(-distances / quantizer.temperature, dim=1)
    mean = p.mean(0)
    log = torch.log(mean.clamp(min=1e-5) if clamped else mean + 1e-5)
    of_each, of_mean = quantizer.entropies(latents)
    torch.testing.assert_close(of_each, torch.special.entr(p).sum(1).mean().float())
    torch.testing.assert_close(of_mean, -(mean * log).sum().float())


def test_bitwise_entropy_is_that_of_the_bits():
    latents = 0.1 * torch.randn(50, 5)
    together = LFQ(5, temperature=0.5)
    apart = LFQ(5, temperature=0.5, bitwise=True)
    p = torch.sigmoid(4 * latents / 0.5).mean(0)
    expected = (torch.special.entr(p) + torch.special.entr(1 - p)).sum()
    torch.testing.assert_close(apart.entropies(latents)[1], expected, atol=1e-3, rtol=0)
    assert torch.equal(apart.entropies(latents)[0], together.entropies(latents)[0])
    assert together.entropies(latents)[1] <= apart.entropies(latents)[1] + 1e-3


@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_losses_and_gradients(kind):
    quantizer = kind(4, entropy=0.3, gamma=2.0, commitment=0.5, temperature=1.0)
    latents = torch.randn(6, 4, requires_grad=True)
    upstream = torch.randn(6, 4)
    result = quantizer(latents)
    prepared = F.normalize(latents, dim=-1) if kind is BSQ else latents
    codes = quantizer.decode(result.ids)
    of_each, of_mean = quantizer.entropies(latents)
    commitment = 0.5 * (prepared - codes).square().mean()
    entropy = 0.3 * (of_each - 2 * of_mean)
    torch.testing.assert_close(result.losses, {"commitment": commitment, "entropy": entropy})
    objective = (result.quantised * upstream).sum() + sum(result.losses.values())
    (grad,) = torch.autograd.grad(objective, latents)
    expected = (prepared * upstream).sum() + commitment + entropy
    torch.testing.assert_close(grad, *torch.autograd.grad(expected, latents))


def test_even_use_of_codes_is_the_largest_entropy():
    latents = LFQ(4).decode(torch.arange(16))
    of_each, of_mean = LFQ(4).entropies(latents)
    torch.testing.assert_close(of_each, torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(of_mean, torch.tensor(4 * math.log(2)), atol=1e-3, rtol=0)


def test_factors_are_digits_of_the_id():
    quantizer, whole = LFQ(8, factors=(3, 5)), LFQ(8)
    latents = torch.randn(4, 6, 8)
    ids, numbers = quantizer.encode(latents), whole.encode(latents)
    assert torch.equal(ids, torch.stack([numbers % 8, numbers // 8], dim=-1))
    assert torch.equal(quantizer.decode(ids), whole.decode(numbers))
    assert quantizer.spec((4, 6)) == TokenSpec.factorised((4, 6), (8, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 63}, "dim 63 must be from 1 to 62"),
        ({"dim": 4, "temperature": 0.0}, "temperature 0.0 and scale 1.0 must be positive"),
        ({"dim": 25}, "set bitwise, or make a Product"),
        ({"dim": 8, "factors": (3, 4)}, r"factors \[3, 4\] must be positive and add up to 8"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        LFQ(**arguments)
