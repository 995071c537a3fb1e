import pytest
import torch
from family import spread

from vistok.errors import UserError
from vistok.quantizers import EMAVQ, FSQ, LFQ, VQ, Gaussian, Residual, ResidualFSQ, ResidualLFQ
from vistok.tokens import TokenSpec


@pytest.fixture
def latents():
    return torch.randn(3, 7, 4)


def of_vq(layers=3, **arguments):
    return spread(Residual(VQ(9, 4, l2_normalise=False, commitment=0.5), layers, **arguments))


def test_each_layer_codes_what_is_left(latents):
    quantizer = of_vq()
    ids = quantizer.encode(latents)
    assert quantizer.spec((7,)) == TokenSpec.factorised((7,), (9, 9, 9))
    left = latents
    for k, layer in enumerate(quantizer.each):
        assert torch.equal(ids[..., k], layer.encode(left))
        left = left - layer.decode(ids[..., k])
        torch.testing.assert_close(quantizer.decode(ids[..., : k + 1]), latents - left)


def test_copies_have_codebooks_of_their_own():
    first, second = Residual(VQ(9, 4), 2).each
    assert first.arguments == second.arguments
    assert not torch.equal(first.embedding.weight, second.embedding.weight)


def test_losses_are_sums_and_every_layer_passes_the_gradient(latents):
    quantizer = of_vq()
    latents.requires_grad_()
    upstream = torch.randn_like(latents)
    result = quantizer(latents)
    (grad,) = torch.autograd.grad((result.quantised * upstream).sum(), latents, retain_graph=True)
    torch.testing.assert_close(grad, 3 * upstream)
    ends = [latents - quantizer.decode(result.ids[..., :k]) for k in (1, 2, 3)]
    commitment = 0.5 * sum(left.square().mean() for left in ends)
    torch.testing.assert_close(result.losses["commitment"], commitment)
    torch.testing.assert_close(
        torch.autograd.grad(result.losses["commitment"], latents),
        torch.autograd.grad(
            0.5 * sum((latents - (latents - e).detach()).square().mean() for e in ends), latents
        ),
    )


@pytest.mark.parametrize("layers", [1, 2, torch.tensor(2)])
def test_layers_left_out_are_not_trained(latents, layers):
    quantizer = of_vq()
    latents.requires_grad_()
    result = quantizer(latents, layers)
    assert torch.equal(result.ids, quantizer.encode(latents))
    torch.testing.assert_close(result.quantised, quantizer.decode(result.ids[..., :layers]))
    first = Residual(list(quantizer.each)[: int(layers)])(latents)
    torch.testing.assert_close(result.losses, first.losses)
    (result.quantised.sum() + sum(result.losses.values())).backward()
    for k, layer in enumerate(quantizer.each):
        assert layer.embedding.weight.grad.any() == (k < layers)


def test_dropout_draws_each_number_of_layers(latents):
    quantizer = of_vq(least_layers=2)
    ids = quantizer.encode(latents)
    codes = [quantizer.decode(ids[..., :k]) for k in (2, 3)]

    def drawn(seed):
        torch.manual_seed(seed)
        result = quantizer(latents).quantised
        return [torch.allclose(result, code, atol=1e-5) for code in codes].index(True)

    found = [drawn(seed) for seed in range(20)]
    assert set(found) == {0, 1}
    assert found == [drawn(seed) for seed in range(20)]
    assert torch.equal(quantizer.eval()(latents).quantised, codes[1])


def test_one_shared_codebook(latents):
    quantizer = of_vq(shared=True)
    assert list(quantizer.state_dict()) == ["quantizers.0.embedding.weight"]
    apart = of_vq()
    for layer in apart.each:
        layer.load_state_dict(quantizer.quantizers[0].state_dict())
    result, expected = quantizer(latents), apart(latents)
    assert torch.equal(result.ids, expected.ids)
    assert torch.equal(result.quantised, expected.quantised)
    assert result.losses == expected.losses


@pytest.mark.parametrize("layers", [1, None])
def test_update_gives_each_layer_its_residuals(latents, layers):
    quantizer = Residual(EMAVQ(9, 4, decay=0.5), 2)
    first, second = (EMAVQ(9, 4, decay=0.5) for _ in range(2))
    for one, layer in zip((first, second), quantizer.each, strict=True):
        one.load_state_dict(layer.state_dict())
    left = latents - first.decode(first.encode(latents))
    first.update(latents)
    if layers is None:
        second.update(left)
    quantizer.update(latents, layers)
    for one, layer in zip((first, second), quantizer.each, strict=True):
        torch.testing.assert_close(layer.state_dict(), one.state_dict())


def test_a_shared_codebook_of_averages_takes_one_step_per_layer(latents):
    quantizer = Residual(EMAVQ(9, 4, decay=0.5), 3, shared=True)
    one = EMAVQ(9, 4, decay=0.5)
    one.load_state_dict(quantizer.quantizers[0].state_dict())
    ids = quantizer.encode(latents)
    for k in range(3):
        one.accumulate(latents - (quantizer.decode(ids[..., :k]) if k else 0), ids[..., k])
    one.refresh(latents)
    quantizer.update(latents)
    torch.testing.assert_close(quantizer.quantizers[0].state_dict(), one.state_dict())


def test_first_codebooks_are_made_layer_by_layer(latents):
    quantizer = Residual(EMAVQ(21, 4, kmeans=1), 2)
    quantizer.update(latents)  # as many codes as latents: nothing is left for the second layer
    codebook = quantizer.each[1].codebook
    torch.testing.assert_close(codebook, torch.zeros_like(codebook), atol=1e-3, rtol=0)


def test_layers_of_fsq_part_cells():
    quantizer = ResidualFSQ([5, 4], 3)
    latents = 0.9 * torch.rand(50, 2) - 0.45
    limit = torch.tensor([1 + 1 / 4, 1 + 1 / 3])
    soft = limit * torch.tanh(latents / limit)
    ids = quantizer.encode(latents)
    for k in (1, 2, 3):
        error = (quantizer.decode(ids[..., :k]) - soft).abs()
        widths = torch.tensor([5.0, 4.0]) ** (1 - k) / torch.tensor([4.0, 3.0])
        assert (error <= widths + 1e-5).all()
    assert quantizer.spec((50,)).levels == (20, 20, 20)


def test_layers_of_lfq_halve():
    quantizer = ResidualLFQ(2, 4)
    latents = 3.6 * torch.rand(50, 2) - 1.8
    error = quantizer.decode(quantizer.encode(latents)) - latents
    assert error.abs().max() <= 0.125 + 1e-6


def test_a_config_makes_the_same_quantizer():
    for quantizer in (of_vq(shared=True), Residual([FSQ([4, 4]), LFQ(2)]), ResidualLFQ(3, 2)):
        again = type(quantizer).from_config(quantizer.arguments)
        assert again.arguments == quantizer.arguments
        again.load_state_dict(quantizer.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VQ(9, 4),), "how often one quantizer is used must be 1 or more"),
        (([VQ(9, 4), VQ(9, 4)], 3), "a list of 2 quantizers"),
        (([VQ(9, 4)], None, True), "a list of 1 quantizers"),
        (([VQ(9, 4), VQ(9, 3)],), "layers of 4 and 3 channels"),
        ((Gaussian(4), 2), "Gaussian draws latents"),
        ((VQ(9, 4), 2, False, 3), "least_layers 3 must be from 1 to 2"),
    ],
)
def test_refuses_quantizers(arguments, message):
    with pytest.raises(UserError, match=message):
        Residual(*arguments)
