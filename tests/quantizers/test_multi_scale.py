import numpy as np
import pytest
import torch
import torch.nn.functional as F
from family import spread

from vistok.errors import IncompatibleTokensError, UserError
from vistok.layers.pyramid import resized
from vistok.quantizers import FSQ, LFQ, VQ, MultiScale
from vistok.quantizers.multi_scale import nearest_ticks
from vistok.tokens import TokenSpec

SCALES = (1, 2, (2, 3), (4, 5))
GRIDS = ((1, 1), (2, 2), (2, 3), (4, 5))


def joint(**more):
    vq = VQ(20, 3, l2_normalise=False, commitment=0.0, codebook_weight=0.0)
    return spread(MultiScale(vq, SCALES, **more))


def scale_by_scale(**more):
    return spread(MultiScale(VQ(20, 3, l2_normalise=False), SCALES, 0, jointly=False, **more))


@pytest.fixture
def latents():
    return torch.randn(2, 4, 5, 3)


@pytest.mark.parametrize("make", [joint, scale_by_scale])
def test_each_scale_codes_the_means_of_what_is_left(make, latents):
    quantizer = make().eval()
    ids = quantizer.encode(latents)
    assert quantizer.spec((4, 5)) == TokenSpec.ids(GRIDS, 20, ordered=True)
    left = latents
    for scale, own in enumerate(ids.split(quantizer.sizes, dim=1)):
        means = resized(left, GRIDS[scale], "area")
        assert torch.equal(own.view(2, *GRIDS[scale]), quantizer.quantizer.encode(means))
        grid = quantizer.quantizer.decode(own).view(2, *GRIDS[scale], 3)
        left = left - quantizer.added(grid, scale)
    torch.testing.assert_close(quantizer.decode(ids), latents - left)
    result = quantizer(latents)
    assert torch.equal(result.ids, ids)
    torch.testing.assert_close(result.quantised, quantizer.decode(ids))


def test_first_scales_decode_and_others_count_for_nothing(latents):
    quantizer = joint().eval()
    ids = quantizer.encode(latents)
    firsts = [quantizer.decode(ids[:, :length]) for length in (1, 5, 11, 31)]
    lengths = torch.tensor([5, 31])
    expected = torch.stack([firsts[1][0], firsts[3][1]])
    torch.testing.assert_close(quantizer.decode(ids, lengths), expected)
    with pytest.raises(UserError, match="end at 1, 5, 11, 31"):
        quantizer.decode(ids[:, :7])


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (4, [0, 1, 2, 3]),
        (5, [0, 1, 2, 2, 3]),
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (13, [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_four_smoothers_serve_the_published_scales(points, expected):
    assert nearest_ticks(points, 4) == expected


def test_smoothers_serve_what_is_nearest():
    assert nearest_ticks(7, 1) == [0] * 7
    for ticks in (2, 3, 5, 6):
        places = (np.arange(ticks) + 0.5) / ticks
        found = nearest_ticks(9, ticks)
        distances = np.abs(places - np.linspace(0, 1, 9)[:, None])
        chosen = distances[np.arange(9), found]
        np.testing.assert_allclose(chosen, distances.min(1), atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_smoothing_is_the_share_of_the_convolution(smoothing, latents):
    quantizer = joint(smoothing=smoothing, kernel_size=1, smoothers=1)
    (smoother,) = quantizer.smoothers
    convolved = latents @ smoother.weight[:, :, 0, 0].T + smoother.bias
    expected = (1 - smoothing) * latents + smoothing * convolved
    torch.testing.assert_close(quantizer.added(latents, 3), expected)


def test_joint_losses_compare_every_sum_and_pass_the_gradient_whole(latents):
    quantizer = joint(commitment=0.5).train()
    latents.requires_grad_()
    upstream = torch.randn_like(latents)
    result = quantizer(latents)
    ends = (1, 5, 11, 31)
    errors = [F.mse_loss(quantizer.decode(result.ids[:, :end]), latents.detach()) for end in ends]
    torch.testing.assert_close(result.losses["codebook"], sum(errors) / 4)
    torch.testing.assert_close(result.losses["commitment"], 0.5 * sum(errors) / 4)
    (grad,) = torch.autograd.grad((result.quantised * upstream).sum(), latents, retain_graph=True)
    torch.testing.assert_close(grad, upstream)
    result.losses["codebook"].backward()
    assert latents.grad is None or not latents.grad.any()
    trained = [quantizer.quantizer.embedding.weight, *quantizer.smoothers.parameters()]
    assert all(p.grad is not None for p in trained)


def test_scale_by_scale_the_quantizer_trains_on_what_is_left(latents):
    quantizer = scale_by_scale().train()
    losses, left = [], latents
    for scale in range(4):
        result = quantizer.quantizer(quantizer.shrunk(left, scale))
        losses.append(result.losses)
        left = left - quantizer.added(result.quantised, scale).detach()
    for name, loss in quantizer(latents).losses.items():
        torch.testing.assert_close(loss, sum(found[name] for found in losses) / 4)


def test_scale_dropout_leaves_out_one_scale_but_the_first(latents):
    quantizer = scale_by_scale(scale_dropout=1.0)
    lengths = {quantizer(latents).ids.shape[1] for _ in range(40)}
    assert lengths == {31 - 4, 31 - 6, 31 - 20}
    assert quantizer.eval()(latents).ids.shape[1] == 31


@pytest.mark.parametrize("inner", [FSQ([5, 5, 5]), LFQ(8), VQ(20, 3, l2_normalise="search")])
def test_any_quantizer_serves(inner):
    quantizer = MultiScale(inner, SCALES, smoothers=0).eval()
    latents = torch.randn(2, 4, 5, inner.in_dim)
    result = quantizer(latents)
    quantizer.spec((4, 5)).check(result.ids, "forward")
    assert torch.equal(result.ids, quantizer.encode(latents))


def test_the_same_weights_serve_other_scales(latents):
    quantizer = joint().eval()
    other = MultiScale.from_config({**quantizer.arguments, "scales": [1, [4, 5]]}).eval()
    other.load_state_dict(quantizer.state_dict())
    assert other.smoother_of == [0, 3]
    assert other.encode(latents).shape == (2, 21)


def test_scales_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="must be positive and not decrease"):
        MultiScale(VQ(20, 3), (1, 3, 2))
    with pytest.raises(IncompatibleTokensError, match="the last scale is 4x5, but latents are 4x4"):
        joint().spec((4, 4))


def test_a_single_scale_is_not_dropped():
    single = MultiScale(VQ(11, 6), [4], 0, jointly=False, scale_dropout=1.0)
    assert single.train()(torch.randn(2, 4, 4, 6)).ids.shape == (2, 16)
