import pytest
import torch

from vistok.errors import UserError
from vistok.quantizers import DimensionWise, Gaussian
from vistok.quantizers.dimension_wise import frequency_sums, normal_cells
from vistok.tokens import TokenSpec

LEVELS = [2, 7, 16, 64]


@pytest.mark.parametrize("levels", LEVELS)
def test_levels_are_the_means_of_equally_likely_cells(levels):
    bounds, means = normal_cells(levels, 3.0)
    normal = torch.distributions.Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    inner = normal.cdf(bounds[1:-1].double())
    torch.testing.assert_close(inner, torch.arange(1, levels) / levels, check_dtype=False)
    for low, high, mean in zip(bounds[:-1], bounds[1:], means, strict=True):
        x = torch.linspace(low.item(), high.item(), 2001, dtype=torch.float64)
        weight = normal.log_prob(x).exp()
        expected = torch.trapezoid(weight * x, x) / torch.trapezoid(weight, x)
        assert abs(mean - expected) < 3e-5
    torch.testing.assert_close(means, -means.flip(0))
    assert (means.diff() > 0).all()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("limit", [5.0, 2.0])
def test_finds_the_nearest_level(levels, limit):
    quantizer = DimensionWise(4, levels, limit)
    ids = torch.arange(levels)
    assert torch.equal(quantizer.quantise(quantizer.decode(ids)), ids)
    values = limit / 2 * torch.randn(1000, 4)
    near = (values.unsqueeze(-1) - quantizer.decode(ids)).abs()
    found = quantizer.quantise(values)
    torch.testing.assert_close(near.gather(-1, found.unsqueeze(-1))[..., 0], near.amin(-1))
    edges = torch.tensor([-torch.inf, -100 * limit, 100 * limit, torch.inf])
    assert quantizer.quantise(edges).tolist() == [0, 0, levels - 1, levels - 1]
    assert quantizer.decode(ids).abs().max() < limit


def test_of_two_levels_as_near_the_lower_is_taken():
    assert DimensionWise(1, 2).quantise(torch.zeros(3)).tolist() == [0, 0, 0]


def test_takes_the_place_of_the_gaussian():
    plain, quantizer = Gaussian(4), DimensionWise(4)
    assert (quantizer.in_dim, quantizer.draws) == (plain.in_dim, plain.draws)
    moments, noise = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 4)
    ids = quantizer.encode(moments)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, quantizer.quantise(plain.encode(moments)))
    drawn = quantizer.encode(moments, sample=True, noise=noise)
    assert torch.equal(drawn, quantizer.quantise(plain.encode(moments, sample=True, noise=noise)))
    evaluated = quantizer.eval()(moments)
    assert torch.equal(evaluated.ids, ids)
    assert torch.equal(evaluated.quantised, quantizer.decode(ids))
    torch.testing.assert_close(evaluated.losses, plain(moments).losses)


def test_gradients_pass_through():
    moments, upstream = torch.randn(2, 6, 8), torch.randn(2, 6, 4)
    results, gradients = [], []
    for quantizer in (DimensionWise(4, kl=0.1), Gaussian(4, kl=0.1)):
        torch.manual_seed(0)
        latents = moments.clone().requires_grad_()
        results.append(quantizer.train()(latents))
        (results[-1].quantised * upstream).sum().backward()
        gradients.append(latents.grad)
    torch.testing.assert_close(*gradients)
    levels = DimensionWise(4).decode(results[0].ids)
    torch.testing.assert_close(results[0].quantised, levels, atol=1e-6, rtol=0)


def test_each_channel_has_its_histogram():
    quantizer = DimensionWise(2, 4).eval()
    ids = torch.stack([torch.arange(8) % 4, torch.zeros(8, dtype=torch.int64)], -1)
    means = quantizer.decode(ids)[None]
    result = quantizer(torch.cat([means, torch.zeros_like(means)], -1))
    assert torch.equal(result.ids[0], ids)
    torch.testing.assert_close(result.usage, torch.tensor((1 + 1 / 4) / 2))
    torch.testing.assert_close(result.perplexity, torch.tensor((4 * 1) ** 0.5))


def test_numbers_are_exact_whatever_the_dtype():
    exact, cast = DimensionWise(4), DimensionWise(4).bfloat16()
    moments = torch.randn(2, 50, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = cast.eval()(moments)
    expected = exact.eval()(moments.float())
    assert torch.equal(under.ids, expected.ids)
    assert torch.equal(under.quantised, expected.quantised)
    assert exact.state_dict() == {}


@pytest.mark.parametrize("arguments", [(3,), (3, 10, 4.5, 2.5), (1, 2, 0.3)])
def test_a_spec_names_its_quantizer(arguments):
    quantizer = DimensionWise(*arguments)
    spec = quantizer.spec((2, 5))
    assert spec.tensor_shape == (2, 5, quantizer.dim)
    again = DimensionWise.of(TokenSpec.from_dict(spec.to_dict()))
    assert again.arguments == quantizer.arguments
    assert again.spec((2, 5)) == spec


def test_a_spec_of_the_published_quantizer():
    expected = TokenSpec.factorised((16, 16), (64,) * 16, values="normal(5,3)")
    assert DimensionWise(16).spec((16, 16)) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TokenSpec.ids((4,), 8), "expected factorised tokens"),
        (TokenSpec.factorised((4,), (8, 8)), "expected factorised tokens"),
        (TokenSpec.factorised((4,), (8, 4), values="normal(5,3)"), "one number of levels"),
        (TokenSpec.factorised((4,), (8, 8), values="uniform(5,3)"), "uniform is none of normal"),
        (TokenSpec.factorised((4,), (8, 8), values="normal(5)"), "expected normal\\(limit"),
        (TokenSpec.factorised((4,), (8, 8), values="normal(a,b)"), "expected normal\\(limit"),
    ],
)
def test_refuses_other_specs(spec, message):
    with pytest.raises(UserError, match=message):
        DimensionWise.of(spec)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1), "levels 1 must be at least 2"),
        ((4, 64, 0.0), "limit 0"),
        ((4, 64, 5.0, -3.0), "deviations -3"),
        ((4, 2000), "2000 levels do not fit in 3 deviations"),
    ],
)
def test_refuses_sizes(arguments, message):
    with pytest.raises(UserError, match=message):
        DimensionWise(*arguments)


def test_frequency_of_waves_is_their_own():
    x = 2 * torch.pi * torch.arange(8) / 8
    down, across = torch.cos(3 * x)[:, None].expand(8, 8), 5 + 0.1 * torch.sin(x).expand(8, 8)
    maps = torch.stack([down, across, down.roll(1, 0) * 7], -1)
    sums = frequency_sums(torch.stack([maps, 2 * maps]))
    torch.testing.assert_close(sums[0] / sums[1], torch.tensor([3, 1, 3]).double() / 8)
    torch.testing.assert_close(sums, frequency_sums(maps[None]) + frequency_sums(2 * maps[None]))
