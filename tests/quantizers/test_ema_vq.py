import pytest
import torch
import torch.nn.functional as F

from vistok.errors import UserError
from vistok.quantizers import EMAVQ, NormEMAVQ

BOTH = pytest.mark.parametrize("l2_normalise", [False, True], ids=["euclidean", "cosine"])


def state(quantizer):
    return {name: buffer.clone() for name, buffer in quantizer.state_dict().items()}


@BOTH
def test_update_takes_one_step_of_the_averages(l2_normalise):
    quantizer = EMAVQ(6, 3, l2_normalise, decay=0.8)
    before, latents = state(quantizer), torch.randn(2, 5, 3)
    ids = quantizer.encode(latents).flatten()
    quantizer.update(latents)
    rows = latents.flatten(0, 1)
    rows = F.normalize(rows, dim=1) if l2_normalise else rows
    one_hot = F.one_hot(ids, 6).float()
    counts = 0.8 * before["counts"] + 0.2 * one_hot.sum(0)
    sums = 0.8 * before["sums"] + 0.2 * one_hot.T @ rows
    smoothed = (counts + 1e-5) / (counts.sum() + 6e-5) * counts.sum()
    codes = sums / smoothed.unsqueeze(1)
    torch.testing.assert_close(quantizer.counts, counts)
    torch.testing.assert_close(quantizer.sums, sums)
    expected = F.normalize(codes, dim=1) if l2_normalise else codes
    torch.testing.assert_close(quantizer.codebook, expected)


def test_forward_leaves_the_state_alone():
    quantizer = EMAVQ(6, 3, expiry=1.0, kmeans=3)
    before = state(quantizer)
    for _ in range(2):
        quantizer(torch.randn(4, 3))
    quantizer.eval()(torch.randn(4, 3))
    for name, buffer in before.items():
        assert torch.equal(quantizer.state_dict()[name], buffer)


def test_codes_have_no_gradient_and_latents_that_of_commitment():
    quantizer = EMAVQ(6, 3, commitment=0.5)
    latents = torch.randn(4, 3, requires_grad=True)
    result = quantizer(latents)
    (result.quantised.sum() + result.losses["commitment"]).backward()
    error = latents.detach() - quantizer.decode(result.ids)
    torch.testing.assert_close(latents.grad, 1 + 0.5 * 2 * error / error.numel())
    assert list(quantizer.parameters()) == []


def test_layers_that_share_a_codebook_step_apart_and_refresh_once():
    together, apart = EMAVQ(6, 3, decay=0.5), EMAVQ(6, 3, decay=0.5)
    apart.load_state_dict(together.state_dict())
    layers = torch.randn(2, 7, 3)
    ids = [together.encode(layer) for layer in layers]
    for layer, codes in zip(layers, ids, strict=True):
        together.accumulate(layer, codes)
    together.refresh(layers)
    counts, sums = apart.counts.clone(), apart.sums.clone()
    for layer, codes in zip(layers, ids, strict=True):
        one_hot = F.one_hot(codes, 6).float()
        counts = (counts + one_hot.sum(0)) / 2
        sums = (sums + one_hot.T @ layer) / 2
    torch.testing.assert_close(together.counts, counts)
    torch.testing.assert_close(together.sums, sums)
    assert together.updates == 1


def test_dead_codes_give_way_to_latents():
    quantizer = EMAVQ(5, 2, decay=0.5, expiry=0.75)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0], [50, 50], [1, 1], [60, 60], [70, 70]]))
    quantizer.sums.copy_(quantizer.codebook)
    latents = torch.tensor([[0.0, 0.1], [1, 1.1], [0.1, 0], [1.1, 1]])
    quantizer.update(latents, order=torch.tensor([2, 0, 3, 1]))
    # Codes 1, 3 and 4 are dead: they take the given rows in their order.
    assert torch.equal(quantizer.codebook[[1, 3, 4]], latents[[2, 0, 3]])
    assert torch.equal(quantizer.sums[[1, 3, 4]], 0.75 * latents[[2, 0, 3]])
    torch.testing.assert_close(quantizer.counts, torch.tensor([1.5, 0.75, 1.5, 0.75, 0.75]))


def test_resumed_updates_draw_what_uninterrupted_ones_draw():
    latents = torch.randn(6, 8, 3)
    whole = EMAVQ(20, 3, decay=0.5, expiry=0.5, kmeans=2)
    for step, batch in enumerate(latents):
        if step == 3:
            resumed = EMAVQ(20, 3, decay=0.5, expiry=0.5, kmeans=2)
            resumed.load_state_dict(state(whole))
        if step >= 3:
            torch.rand(5)  # the global generator has no say
            resumed.update(batch)
        whole.update(batch)
    for name, buffer in state(whole).items():
        assert torch.equal(resumed.state_dict()[name], buffer)


@BOTH
def test_the_first_update_finds_the_clusters(l2_normalise):
    centres = 10 * torch.eye(4)
    latents = (centres.unsqueeze(1) + 0.01 * torch.randn(4, 25, 4)).flatten(0, 1)
    quantizer = EMAVQ(4, 4, l2_normalise, kmeans=10)
    # Begin with a latent of each cluster; two of one could share it for good.
    quantizer.begin(latents, order=torch.arange(100).view(4, 25).T.flatten())
    found = quantizer.codebook[quantizer.encode(centres)]
    torch.testing.assert_close(found, centres / 10 if l2_normalise else centres, atol=0.01, rtol=0)
    torch.testing.assert_close(quantizer.counts, torch.full((4,), 25.0))


def test_only_the_first_update_makes_the_codebook_anew():
    quantizer = EMAVQ(4, 3, decay=0.99, kmeans=3)
    quantizer.update(torch.randn(30, 3))
    before = quantizer.codebook.clone()
    quantizer.update(torch.randn(30, 3) + 100)
    nearest = torch.cdist(before, quantizer.codebook).min(1).values
    assert nearest.max() < 50  # one step of an average, not the mean of the new latents


def test_lengths_do_not_count_on_the_sphere():
    long, short = EMAVQ(6, 3, True, expiry=0.9), EMAVQ(6, 3, True, expiry=0.9)
    long.load_state_dict(short.state_dict())
    latents = torch.randn(10, 3)
    long.update(7 * latents)
    short.update(latents)
    for name, buffer in state(short).items():
        torch.testing.assert_close(long.state_dict()[name], buffer)


def test_norm_ema_averages_directions():
    quantizer = NormEMAVQ(6, 3, decay=0.9)
    before, latents = state(quantizer), torch.randn(4, 3)
    ids = quantizer.encode(latents)
    quantizer.update(latents)
    assert "sums" not in before
    for code in range(6):
        mine = F.normalize(latents, dim=1)[ids == code]
        if len(mine) == 0:
            assert torch.equal(quantizer.codebook[code], before["codebook"][code])
            continue
        mean = F.normalize(mine.mean(0), dim=0)
        moved = F.normalize(0.9 * before["codebook"][code] + 0.1 * mean, dim=0)
        torch.testing.assert_close(quantizer.codebook[code], moved)


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"expiry": -1.0}, {"kmeans": -1}])
def test_refuses_what_makes_no_average(wrong):
    with pytest.raises(UserError, match=f"EMAVQ: .*{next(iter(wrong))}"):
        EMAVQ(4, 2, **wrong)
