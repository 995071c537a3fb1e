import json

import pytest
import torch
import torch.nn.functional as F
from family import POSITIONS, QUANTIZERS, spread

from vistok.errors import UserError
from vistok.quantizers import FSQ, VQ, code_statistics

every_quantizer = pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)


def latents_of(quantizer):
    return torch.randn(2, *POSITIONS, quantizer.in_dim)


@every_quantizer
def test_the_three_paths_agree(make):
    quantizer = make()
    latents = latents_of(quantizer)
    trained = quantizer(latents)
    evaluated = quantizer.eval()(latents)
    quantizer.spec(POSITIONS).check(evaluated.ids, "forward")
    assert evaluated.ids.dtype == torch.int64
    assert torch.equal(evaluated.ids, quantizer.encode(latents))
    assert torch.equal(evaluated.quantised, quantizer.decode(evaluated.ids))
    if not quantizer.draws:
        assert torch.equal(evaluated.ids, trained.ids)
        torch.testing.assert_close(trained.quantised, evaluated.quantised)


@every_quantizer
def test_autocast_leaves_float32_arithmetic(make):
    quantizer = make().eval()
    latents = latents_of(quantizer).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = quantizer(latents)
    assert under.quantised.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in under.losses.values())
    assert torch.equal(under.ids, quantizer.encode(latents.float()))
    assert torch.equal(under.quantised, quantizer(latents.float()).quantised)


@every_quantizer
def test_statistics_describe_the_batch(make):
    quantizer = make().eval()
    result = quantizer(latents_of(quantizer))
    digits = quantizer.spec(POSITIONS).levels
    codes = result.ids.reshape(-1, len(digits or [0]))
    codebooks = digits or [quantizer.vocab_size]
    hit = [len(codes[:, i].unique()) for i in range(len(codebooks))]
    assert result.dead_codes == sum(codebooks) - sum(hit)
    shares = [used / size for used, size in zip(hit, codebooks, strict=True)]
    torch.testing.assert_close(result.usage, torch.tensor(sum(shares) / len(shares)))
    assert 1 <= result.perplexity <= max(hit) + 1e-3
    assert list(result.statistics) == ["codebook_usage", "codebook_perplexity", "dead_codes"]


@every_quantizer
def test_is_rebuilt_from_its_config(make):
    quantizer = make()
    plain = json.loads(json.dumps(quantizer.arguments))
    again = type(quantizer)(**type(quantizer).revive(plain, "config"))
    again.load_state_dict(quantizer.state_dict())
    latents = latents_of(quantizer)
    assert torch.equal(again.encode(latents), quantizer.encode(latents))
    assert again.arguments == quantizer.arguments


def test_code_statistics():
    usage, perplexity, dead = code_statistics(torch.arange(8).repeat(3), 8)
    assert (usage, dead) == (1, 0)
    torch.testing.assert_close(perplexity, torch.tensor(8.0))
    assert code_statistics(torch.full((5, 2), 3), 8) == (1 / 8, 1, 7)


def test_code_statistics_of_several_codebooks():
    ids = torch.tensor([[0, 2], [1, 2], [1, -1], [0, -1]])
    usage, perplexity, dead = code_statistics(ids, (2, 4))
    torch.testing.assert_close(usage, torch.tensor((1 + 1 / 4) / 2))
    torch.testing.assert_close(perplexity, torch.tensor((2 + 1) / 2))
    assert dead == 3


@pytest.mark.parametrize("levels", [[8, 5, 4], [3, 7], [8, 8, 8], [2, 3]])
def test_fsq_reaches_every_code(levels):
    quantizer = FSQ(levels)
    ids = torch.arange(quantizer.vocab_size)
    codes = quantizer.decode(ids)
    assert len(codes.unique(dim=0)) == len(ids)
    assert codes.min() == -1
    # Invert tanh(z + shift) * half_width - offset at the centre of each level.
    n = torch.tensor(levels)
    half_width, offset = (n - 1) * 1.001 / 2, (n % 2 == 0) / 2
    latents = torch.atanh((codes * (n // 2) + offset) / half_width) - torch.atanh(
        offset / half_width
    )
    assert torch.equal(quantizer.encode(latents), ids)


def test_fsq_first_channel_is_least_significant():
    codes = FSQ([3, 5, 4]).decode(torch.arange(60)).reshape(4, 5, 3, 3)
    assert codes[0, 0, :, 0].tolist() == [-1, 0, 1]
    assert codes[0, :, 0, 1].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert codes[:, 0, 0, 2].tolist() == [-1, -0.5, 0, 0.5]


def test_fsq_gradient_passes_through_rounding():
    latents = torch.randn(7, 2, requires_grad=True)
    upstream = torch.randn(7, 2)
    (FSQ([5, 7])(latents).quantised * upstream).sum().backward()
    half_width = torch.tensor([4, 6]) * 1.001 / 2
    slope = (1 - torch.tanh(latents).square()) * half_width / torch.tensor([2, 3])
    torch.testing.assert_close(latents.grad, upstream * slope)


@pytest.mark.parametrize("levels", [[], [8, 1]])
def test_fsq_refuses_levels(levels):
    with pytest.raises(UserError, match="at least 2"):
        FSQ(levels)


@pytest.mark.parametrize("l2_normalise", [True, False])
def test_vq_finds_the_nearest_code(l2_normalise):
    torch.manual_seed(0)
    quantizer = spread(VQ(50, 4, l2_normalise=l2_normalise))
    latents, codes = torch.randn(300, 4), quantizer.embedding.weight
    if l2_normalise:
        latents, codes = F.normalize(latents, dim=1), F.normalize(codes, dim=1)
    assert torch.equal(quantizer.encode(latents), torch.cdist(latents, codes).argmin(1))


def test_vq_losses_and_gradients():
    torch.manual_seed(0)
    quantizer = spread(VQ(9, 4, l2_normalise=False, commitment=0.5, codebook_weight=2.0))
    latents = torch.randn(6, 4, requires_grad=True)
    upstream = torch.randn(6, 4)
    result = quantizer(latents)
    error = latents.detach() - quantizer.decode(result.ids)
    assert set(result.losses) == {"codebook", "commitment"}
    torch.testing.assert_close(result.losses["codebook"], 2.0 * error.square().mean())
    torch.testing.assert_close(result.losses["commitment"], 0.5 * error.square().mean())
    ((result.quantised * upstream).sum() + sum(result.losses.values())).backward()
    torch.testing.assert_close(latents.grad, upstream + 0.5 * 2 * error / error.numel())
    expected = torch.zeros(9, 4).index_add(0, result.ids, -2.0 * 2 * error / error.numel())
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected)


@pytest.mark.parametrize("l2_normalise", [True, False])
def test_vq_rotates_the_gradient(l2_normalise):
    torch.manual_seed(0)
    quantizer = spread(VQ(9, 4, l2_normalise, commitment=0.0, rotation=True))
    latents = torch.randn(6, 4, requires_grad=True)
    upstream = torch.randn(6, 4)
    result = quantizer(latents)
    codes = quantizer.decode(result.ids)
    torch.testing.assert_close(result.quantised, codes, atol=1e-5, rtol=1e-4)
    compared = F.normalize(latents, dim=1) if l2_normalise else latents
    (grad,) = torch.autograd.grad((result.quantised * upstream).sum(), latents, retain_graph=True)
    rows = []
    for e, code in zip(compared.detach(), codes.detach(), strict=True):
        u, q = e / e.norm(), code / code.norm()
        w = (u + q) / (u + q).norm()
        rotation = torch.eye(4) - 2 * w.outer(w) + 2 * q.outer(u)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), atol=1e-5, rtol=1e-4)
        rows.append(rotation * code.norm() / e.norm())
    mapped = torch.einsum("nij,nj->ni", torch.stack(rows), compared)
    (expected,) = torch.autograd.grad((mapped * upstream).sum(), latents)
    torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-3)


def test_vq_entropy_loss():
    torch.manual_seed(0)
    quantizer = spread(VQ(9, 4, entropy=0.3))
    latents = torch.randn(6, 4, requires_grad=True)
    losses = quantizer(latents).losses
    distances = torch.cdist(F.normalize(latents), F.normalize(quantizer.embedding.weight)).square()
    p = torch.softmax(-distances / 0.01, dim=1)
    per_latent = -torch.special.xlogy(p, p).sum(1).mean()
    of_mean = -(p.mean(0) * torch.log(p.mean(0) + 1e-5)).sum()
    torch.testing.assert_close(
        losses["entropy"], 0.3 * (per_latent - of_mean), rtol=1e-4, atol=1e-5
    )
    losses["entropy"].backward()
    assert latents.grad.isfinite().all()
    assert quantizer.embedding.weight.grad.isfinite().all()


def test_revival_moves_dead_codes_only():
    torch.manual_seed(0)
    quantizer = VQ(4, 2, l2_normalise=False, revival=True)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 0], [10, 0], [0, 10], [90, 90]]))
    # The first three codes share all latents; the last is nearest to (2, 9) but never chosen.
    latents = torch.tensor([[0.0, 1], [9, 0], [2, 9]])
    before = quantizer.embedding.weight.clone()
    quantizer.update(latents)
    after = quantizer.embedding.weight
    torch.testing.assert_close(after[:3], before[:3], rtol=0, atol=1e-3)
    torch.testing.assert_close(after[3], torch.tensor([2.0, 9.0]), rtol=0, atol=0.2)
    torch.testing.assert_close(quantizer.embed_prob, torch.tensor([1, 1, 1, 0]) * 0.01 / 3)


def test_update_without_revival_changes_nothing():
    quantizer = VQ(4, 2)
    before = quantizer.embedding.weight.clone()
    quantizer.update(torch.randn(5, 2))
    assert torch.equal(quantizer.embedding.weight, before)
