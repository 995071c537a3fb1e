import pytest
import torch
from family import spread

from vistok.errors import UserError
from vistok.quantizers import (
    EMAVQ,
    FSQ,
    LFQ,
    VQ,
    Gaussian,
    MultiScale,
    Product,
    Projected,
    Residual,
)
from vistok.tokens import TokenSpec


def test_pieces_are_coded_apart():
    quantizer = spread(Product([VQ(9, 4), FSQ([5, 3]), LFQ(6, factors=(2, 4))]))
    latents = torch.randn(3, 7, 12)
    pieces = latents.split([4, 2, 6], dim=-1)
    found = [part(piece) for part, piece in zip(quantizer.each, pieces, strict=True)]
    result = quantizer(latents)
    assert quantizer.spec((7,)) == TokenSpec.factorised((7,), (9, 15, 4, 16))
    assert torch.equal(result.ids[..., :2], torch.stack([r.ids for r in found[:2]], dim=-1))
    assert torch.equal(result.ids[..., 2:], found[2].ids)
    assert torch.equal(result.quantised, torch.cat([r.quantised for r in found], dim=-1))
    commitment = found[0].losses["commitment"] + found[2].losses["commitment"]
    torch.testing.assert_close(result.losses["commitment"], commitment / 3)


def test_losses_are_means_over_the_whole_latent():
    quantizer = spread(Product(VQ(9, 2, l2_normalise=False, commitment=1.0), 3))
    latents = torch.randn(5, 6)
    result = quantizer(latents)
    error = latents - quantizer.decode(result.ids)
    torch.testing.assert_close(result.losses["commitment"], error.square().mean())


def test_a_shared_codebook_meets_pieces_as_latents():
    shared, apart = Product(EMAVQ(9, 2), 3, shared=True), Product(EMAVQ(9, 2), 3)
    for part in apart.each:
        part.load_state_dict(shared.quantizers[0].state_dict())
    latents = torch.randn(2, 5, 6)
    result, expected = shared(latents), apart(latents)
    assert torch.equal(result.ids, expected.ids)
    assert torch.equal(result.quantised, expected.quantised)
    torch.testing.assert_close(result.losses, expected.losses)
    assert torch.equal(shared.decode(result.ids), apart.decode(result.ids))
    one = apart.each[0]
    one.update(latents.unflatten(-1, (3, 2)))
    shared.update(latents)
    torch.testing.assert_close(shared.quantizers[0].codebook, one.codebook)


def test_grouped_residual_ids_go_group_by_group():
    quantizer = spread(Product(Residual(VQ(9, 2), 3), 2))
    latents = torch.randn(2, 5, 4)
    groups = zip(quantizer.each, latents.chunk(2, dim=-1), strict=True)
    expected = torch.cat([group.encode(half) for group, half in groups], dim=-1)
    assert torch.equal(quantizer.encode(latents), expected)
    assert quantizer.spec((5,)).levels == (9,) * 6


def test_pieces_may_be_scales():
    quantizer = spread(Product(MultiScale(VQ(9, 2), (1, 2, 4), smoothers=1), 2)).eval()
    latents = torch.randn(2, 4, 4, 4)
    result = quantizer(latents)
    spec = quantizer.spec((4, 4))
    assert spec == TokenSpec.factorised(((1, 1), (2, 2), (4, 4)), (9, 9), ordered=True)
    spec.check(result.ids, "ids")
    assert torch.equal(quantizer.decode(result.ids), result.quantised)


def test_projections_stand_around_the_whole():
    quantizer = spread(Projected(Residual(VQ(9, 2, l2_normalise=False), 2), 5))
    latents = torch.randn(3, 5, requires_grad=True)
    result = quantizer(latents)
    inner = quantizer.quantizer(quantizer.project_in(latents))
    assert torch.equal(result.ids, inner.ids)
    torch.testing.assert_close(result.quantised, quantizer.project_out(inner.quantised))
    torch.testing.assert_close(quantizer.decode(result.ids), result.quantised)
    assert quantizer.spec((3,)).levels == (9, 9)
    result.quantised.sum().backward()
    assert latents.grad.any()


def test_refuses_latents_that_are_drawn():
    with pytest.raises(UserError, match="Gaussian draws latents"):
        Product(Gaussian(4), 2)
    with pytest.raises(UserError, match="Gaussian draws latents"):
        Projected(Gaussian(4), 2)
