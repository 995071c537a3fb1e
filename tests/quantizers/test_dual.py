"""Two codebooks with one index."""

import pytest
import torch
import torch.nn.functional as F

from vistok.quantizers import VQ, DualVQ, MultiScale


def dual(**options) -> DualVQ:
    torch.manual_seed(0)
    vq = DualVQ(50, 6, 3, **options)
    torch.nn.init.normal_(vq.embedding.weight)
    return vq


def halves(vectors: torch.Tensor) -> list[torch.Tensor]:
    return [F.normalize(part, dim=-1) for part in vectors.split((6, 3), dim=-1)]


@pytest.mark.parametrize("weight", [1.0, 0.3, 4.0])
def test_index_is_least_in_the_weighted_sum_of_distances(weight):
    vq, latents = dual(pixel_weight=weight), torch.randn(2, 7, 9)
    semantic, pixel = (
        torch.cdist(z, e).square()
        for z, e in zip(halves(latents), halves(vq.embedding.weight), strict=True)
    )
    expected = (semantic + weight * pixel).argmin(-1)
    assert torch.equal(vq.encode(latents), expected)
    assert torch.equal(vq(latents).ids, expected)


def test_codes_are_of_unit_length_in_both_parts():
    vq, latents = dual(), 5 * torch.randn(2, 7, 9)
    for codes in (vq(latents).quantised, vq.decode(vq.encode(latents))):
        lengths = torch.stack([part.norm(dim=-1) for part in codes.split((6, 3), dim=-1)])
        torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_the_length_of_a_part_does_not_matter():
    vq, latents = dual(), torch.randn(2, 7, 9)
    stretched = latents * torch.tensor([3.0] * 6 + [0.2] * 3)
    assert torch.equal(vq.encode(stretched), vq.encode(latents))


def test_losses_are_means_over_the_channels_of_both_parts():
    vq, latents = dual(commitment=0.5).train(), torch.randn(2, 7, 9)
    result = vq(latents)
    distance = F.mse_loss(torch.cat(halves(latents), -1), vq.decode(result.ids))
    torch.testing.assert_close(result.losses, {"codebook": distance, "commitment": 0.5 * distance})


def test_a_code_draws_on_both_tables():
    vq = dual().train()
    result = vq(torch.randn(2, 7, 9))
    sum(result.losses.values()).backward()
    used = result.ids.unique()
    for of_part in vq.embedding.weight.grad.split((6, 3), dim=1):
        assert set(of_part.any(1).nonzero().flatten().tolist()) == set(used.tolist())


def test_entropy_is_that_of_the_weighted_distances():
    vq, latents = dual(entropy=0.1, pixel_weight=0.5).train(), torch.randn(30, 9)
    parts = zip(halves(latents), halves(vq.embedding.weight), (1, 0.5), strict=True)
    distances = sum(weight * torch.cdist(z, e).square() for z, e, weight in parts)
    log_p = F.log_softmax(-distances / 0.01, dim=-1)
    mean = log_p.exp().mean(0)
    expected = -(log_p.exp() * log_p).sum(-1).mean() + (mean * torch.log(mean + 1e-5)).sum()
    torch.testing.assert_close(vq(latents).losses["entropy"], 0.1 * expected)


def test_one_part_alone_is_a_vq():
    vq = VQ(50, 6)
    both = DualVQ(50, 6, 1)
    with torch.no_grad():
        both.embedding.weight.copy_(F.pad(vq.embedding.weight, (0, 1), value=1.0))
    latents = torch.randn(4, 6)
    with_one = F.pad(latents, (0, 1), value=1.0)
    assert torch.equal(both.encode(with_one), vq.encode(latents))
    torch.testing.assert_close(both.decode(both.encode(with_one))[:, :6], vq(latents).quantised)


def test_scales_train_by_themselves():
    """The terms are means over the scales used, and what a scale adds is not seen by the next."""
    model = MultiScale(dual(), (1, 2, 4), smoothers=0, jointly=False).train()
    latents = torch.randn(2, 4, 4, 9)
    left, terms, total = latents, [], 0
    for scale in (0, 2):
        found = model.quantizer(model.shrunk(left, scale))
        added = model.added(found.quantised, scale)
        left, total = left - added.detach(), total + added
        terms.append(found.losses["codebook"])
    result = model(latents, kept=[0, 2])
    torch.testing.assert_close(result.quantised, total)
    torch.testing.assert_close(result.losses["codebook"], sum(terms) / 2)
    assert result.ids.shape == (2, 17)
