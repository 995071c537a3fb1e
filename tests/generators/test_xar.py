"""xAR over every entity of the paper: what is remembered, what is skipped, what flows."""

from itertools import pairwise

import pytest
import torch

from vistok.decoding import Decoding, Noise, Order, Sampler, Schedule, decode
from vistok.decoding.flow import flow_times, integrate, time_id
from vistok.errors import UserError
from vistok.generators import XAR, xar
from vistok.generators.xar import CLEAN
from vistok.tokens import TokenSpec

GRID, WIDE = TokenSpec.latents((4, 4), 3), TokenSpec.latents((2, 6), 3)
ORDERS = [
    (GRID, "cells(1)"),
    (GRID, "cells(2)"),
    (GRID, "cells(4)"),
    (WIDE, "cells(2)"),
    (GRID, "subsamples(2)"),
    (WIDE, "subsamples(2)"),
    (GRID, "scales(1,2,4)"),
    (GRID, "scales(1,3,4)"),
]
LABELS = torch.tensor([0, 2, 1])
GUIDED = Decoding(guidance=Schedule("linear(1,3)"), steps=Schedule("linear(4,2)"))


def tiny(spec=GRID, order="cells(2)", **more) -> XAR:
    """A model with random weights everywhere, so that nothing is trivially zero."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "num_heads": 4, "decoder_depth": 1, "decoder_num_heads": 2}
    model = XAR(spec, ["a", "b", "c"], order, **{**sizes, **more}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(params=ORDERS, ids=lambda p: f"{p[0].shape}-{p[1]}")
def model(request):
    return tiny(*request.param)


def plainly(model, noise, decoding):
    """Decode without a cache: every step is a pass over all entities, and both halves take part."""
    plan, batch = model.plan(), len(LABELS)
    sampler = decoding.sampler or model.head.samplers[0]
    budgets = decoding.budgets(plan, model.head.steps)
    points = torch.zeros(batch, model.decoded.num_tokens, model.spec.dim)
    for t, (fed, scale) in enumerate(zip(plan.passes, decoding.scales(plan), strict=True)):
        times = torch.zeros(batch, len(plan))

        def velocity(x, step, t=t, fed=fed, scale=scale, times=times):
            points[:, fed.predict] = x
            times[:, t] = flow_times(sampler, budgets[t])[step]
            null = model.velocity(points, model.null_condition(LABELS), times)
            found = null + scale * (model.velocity(points, LABELS, times) - null)
            return found[:, fed.predict]

        share = model.head.draw_noise(noise, len(fed.predict), decoding.sampling(0.0), budgets[t])
        points[:, fed.predict] = integrate(velocity, share, sampler, budgets[t])
    return model.finish(points)


@torch.inference_mode()
@pytest.mark.parametrize("sampler", [None, "euler"])
@pytest.mark.parametrize("guidance", ["linear(1,3)", "interval(3,0,0.4)"])
def test_cached_steps_are_passes_over_all_entities(model, sampler, guidance):
    decoding = GUIDED.changed(guidance=Schedule(guidance), sampler=sampler and Sampler(sampler))
    cached = decode(model, LABELS, Noise(3, range(3)), decoding)
    expected = plainly(model, Noise(3, range(3)), decoding)
    assert torch.allclose(cached, expected, atol=1e-3, rtol=1e-3)
    assert cached.shape == (3, *model.spec.tensor_shape)


@torch.no_grad()
def test_one_prefill_is_the_released_first_call():
    """There, the first step of an entity runs over the one before, at time 0, and its own."""
    model = tiny()
    before, now = model.plan().passes[:2]
    places = torch.cat([before.predict, now.predict])
    tokens, x = torch.randn(3, 16, 3), torch.randn(3, 4, 3)
    times = torch.tensor([[CLEAN, 640]]).expand(3, -1)
    conditions = model.conditions(LABELS, times)
    both = torch.cat([tokens[:, before.predict], x], dim=1)
    mask = torch.tensor([0] * 4 + [1] * 4)
    mask = mask <= mask[:, None]
    released = model.transformer(both, places, conditions, mask=mask)[:, 4:]

    state = model.new_state(3, model.plan())
    model.step(tokens, LABELS, now, state)
    modulations = model.modulations([640], LABELS, state)
    for _ in range(2):  # a step leaves no trace
        ours = model.transformer(x, now.predict, modulations, caches=state.cache)
        assert torch.allclose(ours, released, atol=1e-5)


def test_every_position_is_decoded_once(model):
    plan = model.plan()
    predicted = torch.cat([fed.predict for fed in plan.passes])
    assert torch.equal(predicted.sort().values, torch.arange(model.decoded.num_tokens))
    assert torch.equal(plan.joint.tokens, predicted)
    for before, fed in pairwise(plan.passes):
        assert torch.equal(fed.tokens, before.predict)


def test_tokens_and_images_are_cells():
    token, image = (tiny(order=order).plan() for order in ("cells(1)", "cells(4)"))
    assert [fed.predict.tolist() for fed in token.passes] == [[i] for i in range(16)]
    assert token.joint.is_causal
    assert len(image) == 1
    assert image.joint.mask is None
    decoding = Decoding(guidance=Schedule("linear(1,3)"))
    assert decoding.scales(image) == [1]
    assert decoding.scales(token)[::5] == pytest.approx([1, 5 / 3, 7 / 3, 3])


def test_scales_are_means_of_the_latents():
    model, tokens = tiny(order="scales(1,2,4)"), torch.randn(2, 4, 4, 3)
    positions = model.positions(tokens)
    assert positions.shape == (2, 21, 3)
    assert torch.allclose(positions[:, 0], tokens.mean((1, 2)), atol=1e-6)
    assert torch.allclose(positions[:, 1], tokens[:, :2, :2].mean((1, 2)), atol=1e-6)
    assert torch.equal(model.finish(positions), tokens)
    assert model.coordinates()[1:5].tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]


def test_what_is_computed(monkeypatch):
    """A call for each step and one for each entity remembered; no null half where guidance is off;
    modulations once for all steps of all entities."""
    model, steps, rows, made = tiny(), 3, [], []
    transformer, modulations = model.transformer, model.trunk.modulations
    monkeypatch.setattr(
        model, "transformer", lambda x, *r, **m: rows.append(x.shape[:2]) or transformer(x, *r, **m)
    )
    monkeypatch.setattr(
        model.trunk, "modulations", lambda c: made.append(c.shape[1]) or modulations(c)
    )
    decoding = Decoding(guidance=Schedule("linear(1,3)"), steps=Schedule(steps))
    decode(model, LABELS, Noise(0, range(3)), decoding)
    assert rows == [(3, 4)] * steps + [(6, 4)] * 3 * (1 + steps)
    assert made == [1 + steps]
    rows.clear()
    decode(model, LABELS, Noise(0, range(3)), Decoding(steps=Schedule(steps)))
    assert rows == [(3, 4)] * steps + [(3, 4)] * 3 * (1 + steps)


@pytest.mark.parametrize("room", [1, 3, 6])
def test_less_room_for_modulations_changes_nothing(monkeypatch, room):
    model = tiny()
    expected = decode(model, LABELS, Noise(0, range(3)), GUIDED)
    monkeypatch.setattr(xar, "MOST_AHEAD", room * 6 * 3 * 6 * 32)
    state = model.new_state(6, model.plan())
    found = decode(model, LABELS, Noise(0, range(3)), GUIDED, state)
    assert torch.allclose(found, expected, atol=1e-4)
    assert len(state.modulations) <= room


def test_weights_by_columns_are_for_few_rows(monkeypatch):
    """Of the tokens they change nothing; a state that is used again holds none of other weights."""
    model, decoded = tiny(), []
    state = model.new_state(6, model.plan())
    for most in (24, 23):  # rows of both halves
        monkeypatch.setattr(xar, "MOST_ROWS", most)
        decoded.append(decode(model, LABELS, Noise(0, range(3)), GUIDED, state))
        assert len(state.weights) == (1 + 3 * 4 if most == 24 else 0)
    assert torch.allclose(*decoded, atol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_are_dense_masks():
    """What training without dropout takes on a GPU and what it takes on a CPU."""
    model = tiny()
    rows = model.plan().joint
    conditions = model.conditions(LABELS, torch.tensor([[10, 500, 200, 900]]).expand(3, -1))
    x = torch.randn(3, 16, 3)
    found = [
        model.transformer(x, rows.tokens, conditions, mask=mask)
        for mask in (rows.mask, rows.block_mask)
    ]
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize(("spec", "order"), [o for o in ORDERS if o[1] != "cells(4)"])
def test_later_entities_are_hidden_and_earlier_ones_noisy(spec, order):
    model = tiny(spec, order)
    plan = model.plan()
    x, times = torch.randn(3, model.decoded.num_tokens, 3), torch.rand(3, len(plan))
    first, second = plan.passes[0].predict, plan.passes[1].predict
    with torch.no_grad():
        velocity = model.velocity(x, LABELS, times)
        x[:, second] += 1
        times[:, 1] = 1 - times[:, 1]
        changed = model.velocity(x, LABELS, times)
        assert torch.allclose(changed[:, first], velocity[:, first], atol=1e-5)
        assert not torch.allclose(changed[:, second], velocity[:, second], atol=1e-2)
        times[:, 0] = 1 - times[:, 0]
        again = model.velocity(x, LABELS, times)
        assert not torch.allclose(again[:, second], changed[:, second], atol=1e-3)


@pytest.mark.parametrize("times", ["logit_normal", "uniform", "stratified"])
def test_one_image_trains(model, times):
    model = XAR.from_config({**model.arguments, "flow_times": times}).train()
    model(torch.randn(1, *model.spec.tensor_shape), LABELS[:1]).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_whole_times_modulate():
    """The network knows thousandths alone."""
    model, x = tiny(), torch.randn(3, 16, 3)
    times = torch.full((3, 4), 0.1234)
    with torch.no_grad():
        floored = model.velocity(x, LABELS, time_id(times) / 1000 + 1e-4)
        assert torch.equal(model.velocity(x, LABELS, times), floored)


@pytest.mark.parametrize(("sampler", "least"), [("euler", 1), ("euler_maruyama", 2)])
def test_fewest_steps(sampler, least):
    model, decoding = tiny(), GUIDED.changed(sampler=Sampler(sampler))
    fewest = decoding.changed(steps=Schedule(least))
    assert decode(model, LABELS, Noise(0, range(3)), fewest).isfinite().all()
    if least > 1:
        with pytest.raises(UserError, match="takes 2 steps or more, not 1"):
            decode(model, LABELS, Noise(0, range(3)), decoding.changed(steps=Schedule(1)))


@pytest.mark.parametrize("order", ["raster", "mar(4)", "cells(3)", "scales(1,2)"])
def test_orders_that_are_no_entities_are_refused(order):
    with pytest.raises(UserError, match=Order(order).name):
        tiny(order=order)


def test_published_initialisation():
    """Xavier's bounds for all linear maps, of which none begins at zero."""
    model = XAR(GRID, ["a"], "cells(2)", dim=64, depth=1, num_heads=2)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert not module.bias.any()
    tables = (model.condition.weight, model.trunk.encoder.position, model.trunk.decoder.position)
    assert all(0.015 < table.std() < 0.025 for table in tables)
