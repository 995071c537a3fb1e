import torch

from vistok.quantizers import Gaussian
from vistok.tokens import TokenSpec


def moments(mean: float, log_variance: float, n: int = 20000) -> torch.Tensor:
    return torch.tensor([mean, log_variance]).expand(1, n, 2).contiguous()


def test_draws_have_the_mean_and_the_variance():
    drawn = Gaussian(1).encode(moments(0.7, -1.0), sample=True)
    assert abs(drawn.mean() - 0.7) < 0.02
    assert abs(drawn.var() - torch.tensor(-1.0).exp()) < 0.02
    assert torch.equal(Gaussian(1).encode(moments(0.7, -1.0)), torch.full((1, 20000, 1), 0.7))


def test_divergence_is_that_of_torch():
    latents = torch.randn(3, 4, 10)
    mean, log_variance = latents.chunk(2, dim=-1)
    ours = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    unit = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(ours, unit).sum(-1)
    torch.testing.assert_close(Gaussian(5).divergence(latents), expected)
    result = Gaussian(5, kl=0.5).train()(latents)
    torch.testing.assert_close(result.losses["kl"], 0.5 * expected.sum(1).mean())


def test_stored_noise_makes_the_draw():
    latents, noise = torch.randn(2, 3, 8), torch.randn(2, 3, 4)
    drawn = Gaussian(4).encode(latents, sample=True, noise=noise)
    mean, log_variance = latents.chunk(2, dim=-1)
    torch.testing.assert_close(drawn, mean + (0.5 * log_variance).exp() * noise)


def test_latents_are_the_tokens():
    quantizer = Gaussian(4)
    assert quantizer.in_dim == 8 and quantizer.vocab_size is None
    assert quantizer.spec((6,)) == TokenSpec.latents((6,), 4)
    result = quantizer.eval()(torch.randn(2, 6, 8))
    assert torch.equal(quantizer.decode(result.ids), result.quantised)
    assert result.statistics == {}
