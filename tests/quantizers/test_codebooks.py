"""Codebooks that learn by gradient otherwise than one row at a time, and the search of all."""

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers import IBQ, VQ, SimVQ, codebook
from vistok.quantizers.codebook import largest, nearest


def test_search_in_parts_is_that_of_the_whole(monkeypatch):
    queries, keys = torch.randn(4, 50, 6), torch.randn(30, 6)
    expected = torch.cdist(queries, keys).argmin(-1)
    assert torch.equal(nearest(queries, keys), expected)
    monkeypatch.setattr(codebook, "HELD", 1)
    assert torch.equal(nearest(queries, keys), expected)
    assert nearest(queries[:0], keys).shape == (0, 50)
    assert nearest(queries[0, 0], keys) == expected[0, 0]


def test_search_takes_the_first_of_equal_keys():
    keys = torch.randn(5, 3).repeat(4, 1)
    assert nearest(torch.randn(100, 3), keys).max() < 5


def test_search_is_in_float32_under_autocast():
    queries, keys = torch.randn(500, 6), torch.randn(300, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = largest(queries, keys, torch.zeros(300))
    assert torch.equal(found, (queries @ keys.T).argmax(1))


def test_search_on_the_sphere_alone_leaves_codes_and_losses_as_they_are():
    quantizer = VQ(20, 4, l2_normalise="search")
    torch.nn.init.normal_(quantizer.embedding.weight)
    latents, codes = torch.randn(50, 4), quantizer.embedding.weight
    cosines = F.normalize(latents, dim=1) @ F.normalize(codes, dim=1).T
    result = quantizer.eval()(latents)
    assert torch.equal(result.ids, cosines.argmax(1))
    assert torch.equal(result.quantised, codes[result.ids])
    error = (latents - codes[result.ids]).square().mean()
    torch.testing.assert_close(result.losses["codebook"], error)


def test_joint_loss_pulls_both_sides():
    quantizer = VQ(20, 4, False, commitment=0.0, codebook_weight=0.0, joint=0.5)
    latents = torch.randn(6, 4, requires_grad=True)
    result = quantizer(latents)
    error = (latents - quantizer.embedding.weight[result.ids]).detach()
    sum(result.losses.values()).backward()
    torch.testing.assert_close(result.losses["joint"], 0.5 * error.square().mean())
    torch.testing.assert_close(latents.grad, 0.5 * 2 * error / error.numel())
    expected = torch.zeros(20, 4).index_add(0, result.ids, -0.5 * 2 * error / error.numel())
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected)


def test_orthogonal_loss_is_the_mean_of_squared_cosines():
    quantizer = VQ(7, 4, False, orthogonal=2.0)
    codes = F.normalize(torch.nn.init.normal_(quantizer.embedding.weight), dim=1)
    cosines = codes @ codes.T
    others = cosines.square().sum() - 7
    loss = quantizer(torch.randn(3, 4)).losses["orthogonal"]
    torch.testing.assert_close(loss, 2.0 * others / 49)


def test_diversity_is_that_of_images_at_a_position():
    quantizer = VQ(7, 4, False, diversity=0.5, diversity_temperature=0.3)
    torch.nn.init.normal_(quantizer.embedding.weight)
    latents = torch.randn(5, 2, 3, 4)
    p = torch.softmax(-torch.cdist(latents, quantizer.embedding.weight) / 0.3, dim=-1).mean(0)
    entropies = -(p * p.clamp(min=1e-5).log()).sum(-1)
    assert entropies.shape == (2, 3)
    torch.testing.assert_close(quantizer(latents).losses["diversity"], -0.5 * entropies.mean())


def test_all_codes_of_simvq_move_with_one_latent():
    quantizer = SimVQ(30, 4, frozen_dim=6)
    sgd = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    before, every = quantizer.frozen_codebook.clone(), torch.arange(30)
    codes = quantizer.decode(every).detach()
    result = quantizer(torch.randn(1, 4))
    sum(result.losses.values()).backward()
    sgd.step()
    moved = (quantizer.decode(every) - codes).norm(dim=1)
    assert (moved > 0).all()
    assert torch.equal(quantizer.frozen_codebook, before)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.25), (0.0, 0.5, 2.0)])
def test_gradient_of_ibq_is_that_of_soft_codes(weights):
    joint, commitment, codebook_weight = weights
    quantizer = IBQ(9, 4, joint, commitment, codebook_weight)
    latents, upstream = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    parameters = [latents, quantizer.embedding.weight]
    result = quantizer(latents)
    objective = (result.quantised * upstream).sum() + sum(result.losses.values())
    found = torch.autograd.grad(objective, parameters)
    codes = quantizer.embedding.weight
    soft = (latents @ codes.T).softmax(1)
    one_hot = F.one_hot(result.ids, 9).float()
    quantised = (one_hot - soft.detach() + soft) @ codes
    chosen = one_hot @ codes
    losses = (
        joint * F.mse_loss(quantised, latents)
        + commitment * F.mse_loss(latents, chosen.detach())
        + codebook_weight * F.mse_loss(chosen, latents.detach())
    )
    expected = torch.autograd.grad((quantised * upstream).sum() + losses, parameters)
    assert torch.equal(result.ids, soft.argmax(1))
    torch.testing.assert_close(found, expected)
    assert (found[1] != 0).all()
