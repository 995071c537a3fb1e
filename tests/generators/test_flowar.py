"""FlowAR: what a scale is fed and sees, its loss, its decoding beside a plain one, other heads."""

import pytest
import torch

from vistok.decoding import Decoding, Noise, Order, Sampler, Schedule, decode
from vistok.decoding.sampling import Sampling
from vistok.errors import IncompatibleTokensError, UserError
from vistok.generators import FlowAR
from vistok.heads import DiffusionHead, FlowTransformerHead
from vistok.layers.pyramid import pyramid, upscaled
from vistok.tokens import TokenSpec

SPEC = TokenSpec.latents((4, 4), 3)
SIZES = {"dim": 32, "depth": 2, "num_heads": 4, "decoder_depth": 1, "decoder_num_heads": 2}
LABELS = torch.tensor([0, 2, 1])


def tiny(spec=SPEC, scales=(1, 2, 4), **more) -> FlowAR:
    """A model with random weights everywhere, so that no gate is shut."""
    more = {"head": FlowTransformerHead(64, 1, cross=True), **SIZES, **more}
    model = FlowAR(spec, ["a", "b", "c"], scales=scales, **more).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(params=[(1, 2, 4), (1, 4), (2, 3, 4), (4,)], ids=str)
def model(request):
    return tiny(scales=request.param)


def scales_of(model, batch=3):
    return pyramid(torch.randn(batch, 4, 4, 3), model.scales).split(model.sizes, dim=1)


@torch.inference_mode()
def test_cached_steps_give_the_hidden_states_of_training(model):
    scales, plan = scales_of(model), model.plan()
    state = model.new_state(len(LABELS), plan)
    tokens = torch.cat(scales, dim=1)
    for fed, expected in zip(plan.passes, model.teacher_forced(scales, LABELS), strict=True):
        hidden = model.step(tokens, LABELS, fed, state)
        torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_scale_sees_those_before_and_is_told_by_the_last_of_them():
    model = tiny(scales=(1, 2, 3, 4))
    scales = scales_of(model)
    before = model.teacher_forced(scales, LABELS)
    for changed in range(4):
        others = [scale + (i == changed) for i, scale in enumerate(scales)]
        after = model.teacher_forced(others, LABELS)
        for i in range(4):
            moved = (before[i] - after[i]).abs().amax(-1)
            assert (moved > 1e-6).all() if i > changed else not moved.any()


@torch.inference_mode()
def test_decoding_is_plain_next_scale_generation(model):
    """The same as whole forward passes over both halves, of which the head takes what it needs."""
    decoding = Decoding(
        guidance=Schedule("linear(1,3)"),
        steps=Schedule("linear(6,3)"),
        sampler=Sampler("flowar(0.8)"),
    )
    seen = []
    tokens = decode(
        model, LABELS, Noise(5, range(3)), decoding, on_pass=lambda t, x: seen.append(x.clone())
    )
    plan, noise, scales = model.plan(), Noise(5, range(3)), []
    ramp = [1 + 2 * k / max(1, len(plan) - 1) for k in range(len(plan))]
    null = model.null_condition(LABELS)
    for k, size in enumerate(model.sizes):
        # Hidden states see no scale but those before: any values stand for the others.
        rest = [torch.zeros(3, n, 3) for n in model.sizes[k:]]
        halves = [model.teacher_forced([*scales, *rest], c)[k] for c in (LABELS, null)]
        steps = int(6 - 3 * k / max(1, len(plan) - 1) + 1e-9)
        sampling = Sampling(sampler=decoding.sampler)
        share = model.head.draw_noise(noise, size, sampling, steps)
        scales.append(model.head.sample(*halves, ramp[k], share, sampling, steps))
    torch.testing.assert_close(seen[-1], torch.cat(scales, dim=1), atol=2e-4, rtol=1e-3)
    assert torch.equal(tokens, seen[-1][:, -16:].view(3, 4, 4, 3))
    model.spec.check(tokens, "decoded")


@torch.inference_mode()
def test_the_first_scale_has_no_null_half():
    """Where the ramp is still 1."""
    model, batches = tiny(), []
    model.head.register_forward_hook(lambda module, given, out: batches.append(out.shape[:2]))
    decoding = Decoding(guidance=Schedule("linear(1,2)"), steps=Schedule(2))
    decode(model, LABELS, Noise(0, range(3)), decoding)
    assert batches == [(3, 1)] * 2 + [(6, 4)] * 2 + [(6, 16)] * 2


def test_the_loss_weighs_scales_by_their_size(model):
    scales = scales_of(model)
    hidden = model.teacher_forced(scales, LABELS)
    torch.manual_seed(3)
    by_token = [model.head.loss(h, x) for h, x in zip(hidden, scales, strict=True)]
    expected = sum(
        loss.mean() * side**2 / model.scales[-1] ** 2
        for loss, side in zip(by_token, model.scales, strict=True)
    )
    torch.manual_seed(3)
    assert torch.isclose(model(scales[-1].view(3, 4, 4, 3), LABELS).loss, expected, rtol=1e-5)


def test_classes_are_dropped_in_training_alone():
    model = tiny(condition_dropout=1.0)
    seen = []
    model.condition.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    for training in (True, False):
        model.train(training)(torch.randn(3, 4, 4, 3), LABELS)
        assert all(torch.equal(x, torch.full_like(x, 3) if training else LABELS) for x in seen)
        seen.clear()


@torch.inference_mode()
def test_what_a_scale_is_fed():
    model = tiny()
    first = model.rows(LABELS, None, 1)
    assert torch.equal(first, model.condition(LABELS))
    scale = torch.randn(3, 4, 3)
    fed = model.rows(LABELS, scale, 4)
    assert torch.equal(fed, model.latent_embed(upscaled(scale, 4, 4)))


@torch.inference_mode()
def test_any_head_of_numbers_draws_the_tokens_of_a_scale():
    model = tiny(head=DiffusionHead(32, 2))
    decoding = Decoding(steps=Schedule(4), guidance=Schedule(2), sampler=Sampler("ddpm(950)"))
    model.spec.check(decode(model, LABELS, Noise(0, range(3)), decoding), "decoded")
    assert model(torch.randn(3, 4, 4, 3), LABELS).loss.isfinite()


def test_the_trunk_learns_under_every_head():
    for head in (FlowTransformerHead(64, 1), DiffusionHead(32, 1)):
        model = tiny(head=head).train()
        model(torch.randn(8, 4, 4, 3), torch.arange(8) % 3).loss.backward()
        assert all(p.grad is not None for p in model.parameters())


def test_unfit_scales_and_orders_are_refused():
    for scales in ((1, 2, 3), (2, 1, 4), (1, 2, 4, 8)):
        with pytest.raises(UserError, match="of which the last is the grid of 4x4"):
            tiny(scales=scales)
    with pytest.raises(UserError, match="the last is the grid of 4x6"):
        tiny(TokenSpec.latents((4, 6), 3))
    with pytest.raises(UserError, match="needs a grid"):
        tiny(TokenSpec.latents((16,), 3))
    with pytest.raises(IncompatibleTokensError, match="FlowAR models tokens of kind latents"):
        tiny(TokenSpec.ids((4, 4), 8))
    with pytest.raises(UserError, match=r"decodes by scales\(1,2,4\), not by scales\(4\)"):
        tiny().plan(Order("scales(4)"))
