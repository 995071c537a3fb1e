"""FlowAR's head: tokens of a scale flow together; what is constant is made once; guidance is of the
velocity, where it is allowed."""

from itertools import pairwise

import pytest
import torch

from vistok.decoding import Noise, Sampler
from vistok.decoding.flow import flow_times, time_id
from vistok.decoding.sampling import Sampling
from vistok.errors import IncompatibleTokensError, UserError
from vistok.heads import FlowTransformerHead
from vistok.tokens import TokenSpec

SPEC = TokenSpec.latents(((1, 1), (2, 2), (4, 4)), 3)
HIDDEN_DIM = 24


@pytest.fixture(params=[False, True], ids=["joint", "cross"])
def head(request):
    """A head with random weights everywhere, so that no modulation is trivial."""
    head = FlowTransformerHead(64, 2, request.param).fitted(HIDDEN_DIM, SPEC).eval()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return head


def inputs(head, batch=2, side=4):
    hidden = torch.randn(batch, side * side, HIDDEN_DIM)
    return hidden, head.draw_noise(Noise(3, range(batch)), side * side)


def velocity(head, x, time, hidden):
    """The velocity with everything made anew."""
    embedded = head.time_embedding(time_id(torch.tensor([time])))[:, None]
    return head(x, embedded, head.given(hidden))


@torch.inference_mode()
@pytest.mark.parametrize("sampler", ["flowar", "flowar(0.6)", "euler"])
@pytest.mark.parametrize("side", [1, 2, 4])
def test_samples_are_those_of_plain_euler_steps(head, sampler, side):
    hidden, noise = inputs(head, side=side)
    null, scale, steps = torch.randn_like(hidden), 2.5, 7
    sampling = Sampling(sampler=Sampler(sampler))
    drawn = head.sample(hidden, null, scale, noise, sampling, steps)

    x, latest = noise[:, :, 0], sampling.sampler.numbers or (1.0,)
    times = flow_times(sampler, steps).tolist()
    for time, after in pairwise(times):
        v = velocity(head, x, time, hidden)
        if time <= latest[0]:
            of_null = velocity(head, x, time, null)
            v = of_null + scale * (v - of_null)
        x = x + (after - time) * v
    torch.testing.assert_close(drawn, x, atol=2e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_null_half_is_computed_where_it_counts(head):
    hidden, noise = inputs(head)
    batches = []
    head.register_forward_hook(lambda module, given, out: batches.append(len(out)))
    sampling = Sampling(sampler=Sampler("flowar(0.5)"))
    head.sample(hidden, torch.randn_like(hidden), 3.0, noise, sampling, 6)
    assert batches == [2 if time > 0.5 else 4 for time in flow_times("flowar", 6)[:-1]]
    assert set(batches) == {2, 4}
    batches.clear()
    head.sample(hidden, None, 1.0, noise, sampling, 6)
    assert batches == [2] * 6


def test_limits_of_guidance_are_compared_as_written():
    """0.9 and 0.7 are among the even times of 50 steps, and guided."""
    times = flow_times("flowar", 50).tolist()
    for limit in (0.9, 0.7):
        assert limit in times
        assert sum(time <= Sampler(f"flowar({limit})").numbers[0] for time in times) == (
            round(50 * limit) + 1
        )


@torch.inference_mode()
def test_tokens_of_a_scale_flow_together_and_samples_apart(head):
    hidden, noise = inputs(head)
    x = noise[:, :, 0]
    other = x.clone()
    other[0, 3] += 1
    change = (velocity(head, other, 0.4, hidden) - velocity(head, x, 0.4, hidden)).abs().amax(-1)
    assert (change[0] > 1e-5).all()
    assert not change[1].any()


@torch.inference_mode()
def test_self_attention_sees_hidden_states_unless_they_are_attended_to(head):
    """What the first block's attention is given changes with a hidden state in its own row, or in
    none."""
    single = FlowTransformerHead(64, 1, head.cross).fitted(HIDDEN_DIM, SPEC).eval()
    hidden, noise = inputs(head)
    other = hidden.clone()
    other[:, 3] += 1
    inside = []
    block = single.blocks[0]
    block.attention.register_forward_hook(lambda module, given, out: inside.append(given[0]))
    for states in (hidden, other):
        velocity(single, noise[:, :, 0], 0.4, states)
    changed = (inside[0] - inside[1]).abs().amax((0, 2)) > 1e-6
    assert changed.sum() == (0 if head.cross else 1)


@torch.inference_mode()
def test_places_matter_by_the_scale_that_they_are_of(head):
    """Tokens in another order are not the same in another order, and a place is that of the whole
    picture, whatever the scale."""
    hidden, noise = inputs(head)
    turned = velocity(head, noise[:, :, 0].flip(1), 0.4, hidden.flip(1)).flip(1)
    assert not torch.allclose(turned, velocity(head, noise[:, :, 0], 0.4, hidden), atol=1e-4)
    assert head.rotary.shape == (2, 21, 64)
    coarse, fine = head.given(hidden[:, :4]).rotary, head.given(hidden).rotary
    assert torch.equal(coarse, fine[:, [0, 2, 8, 10]])


def test_the_loss_is_that_of_straight_paths(head):
    hidden, target = torch.randn(3, 4, HIDDEN_DIM), torch.randn(3, 4, 3)
    times, noise = torch.tensor([0.0, 0.3, 1.0]), torch.randn(3, 4, 3)
    loss = head.loss_at(hidden, target, times, noise)
    x = (1 - times)[:, None, None] * target + times[:, None, None] * noise
    assert torch.equal(x[0], target[0])
    assert torch.equal(x[2], noise[2])
    for i, time in enumerate(times.tolist()):
        v = velocity(head, x[i : i + 1], time, hidden[i : i + 1])
        expected = (v - (noise - target)[i]).square().mean(-1)[0]
        torch.testing.assert_close(loss[i], expected, atol=1e-5, rtol=1e-5)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


@torch.inference_mode()
def test_autocast_leaves_the_head_alone(head):
    hidden, noise = inputs(head)
    drawn = head.sample(hidden, hidden / 2, 2.0, noise, Sampling(), 4)
    torch.manual_seed(0)
    loss = head.loss(hidden, drawn)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.sample(hidden, hidden / 2, 2.0, noise, Sampling(), 4), drawn)
        assert torch.equal(head.loss(hidden, drawn), loss)


@torch.inference_mode()
def test_temperature_is_of_the_noise_at_the_start(head):
    hidden, noise = inputs(head)
    cooler = head.sample(hidden, None, 1.0, noise, Sampling(0.5), 4)
    assert torch.equal(cooler, head.sample(hidden, None, 1.0, noise / 2, Sampling(), 4))


def test_what_it_cannot_model_is_refused():
    with pytest.raises(IncompatibleTokensError, match="scales of a pyramid jointly, not 4x4"):
        FlowTransformerHead().fitted(8, TokenSpec.latents((4, 4), 3))
    with pytest.raises(UserError, match="width 100 must be a multiple of 64"):
        FlowTransformerHead(100)


@pytest.mark.parametrize(
    ("arguments", "hidden_dim", "millions"),
    [((1024, 2), 768, 42), ((1024, 12, True), 1024, 281), ((1536, 12, True), 1536, 633)],
)
def test_published_sizes(arguments, hidden_dim, millions):
    spec = TokenSpec.latents(tuple((s, s) for s in (1, 2, 4, 8, 16)), 16)
    with torch.device("meta"):
        head = FlowTransformerHead(*arguments).fitted(hidden_dim, spec)
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(millions * 1e6, abs=0.6e6)
