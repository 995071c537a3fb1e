"""Flows of tokens: against diffusers, against the exact solution, and what their times are."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vistok.decoding import Sampler
from vistok.decoding.flow import flow_times, integrate, num_draws, time_id
from vistok.errors import UserError


def noise_of(sampler, steps, rows=3):
    generator = torch.Generator().manual_seed(steps)
    return torch.randn(rows, 4, num_draws(sampler, steps), 5, generator=generator)


@pytest.mark.parametrize("sampler", ["euler", "flowar"])
@pytest.mark.parametrize("steps", [50, 25, 20, 15, 2])
def test_euler_steps_are_those_of_diffusers(sampler, steps):
    """Its scheduler, given the times, makes the same steps and has the same whole times."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    times = flow_times(sampler, steps)
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    mixing = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)) / 5

    def velocity(x, time):
        return torch.tanh(x @ mixing) + time

    noise = noise_of(sampler, steps)
    x = noise[:, :, 0]
    for time in scheduler.timesteps:
        x = scheduler.step(velocity(x, time / 1000), time, x).prev_sample
    ours = integrate(lambda x, step: velocity(x, times[step].float()), noise, sampler, steps)
    assert torch.allclose(ours, x, atol=2e-6)
    assert time_id(times[:-1]).tolist() == scheduler.timesteps.floor().long().tolist()


@pytest.mark.parametrize("sampler", ["euler", "euler_maruyama", "flowar"])
def test_many_steps_reach_the_distribution_of_the_data(sampler):
    """For data of mean m and deviation s, whose velocity has a closed form."""
    mean, std, steps = 2.0, 0.5, 400
    times = flow_times(sampler, steps).tolist()

    def velocity(x, step):
        t = times[step]
        share = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        return share * (x - (1 - t) * mean) - mean

    x = integrate(velocity, noise_of(sampler, steps, rows=500), sampler, steps)
    assert x.mean().item() == pytest.approx(mean, abs=0.03)
    assert x.std().item() == pytest.approx(std, abs=0.03)


def test_the_stochastic_step_follows_the_score():
    """Drift v - w/2 * score and diffusion w = 2t, where the score is -((1 - t) v + x) / t."""
    times = flow_times("euler_maruyama", 6).tolist()
    noise = noise_of("euler_maruyama", 6).double()
    x = noise[:, :, 0]
    for step, (t, after) in enumerate(pairwise(times)):
        v = x.cos()
        score = -((1 - t) * v + x) / t
        x = x + (v - t * score) * (after - t)
        if step < 5:
            x = x + math.sqrt(2 * t * (t - after)) * noise[:, :, step + 1]
    ours = integrate(lambda x, step: x.cos(), noise.float(), "euler_maruyama", 6)
    assert torch.allclose(ours, x.float(), atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "euler_maruyama", "flowar(0.9)"])
@pytest.mark.parametrize("steps", [2, 3, 16, 17, 50])
def test_times_fall_from_one_to_zero(sampler, steps):
    times = flow_times(Sampler(sampler), steps)
    assert times.dtype == torch.float64
    assert (times[0], times[-1]) == (1, 0)
    assert (times.diff() < 0).all()
    called = []
    integrate(lambda x, step: (called.append(step), x)[1], noise_of(sampler, steps), sampler, steps)
    assert called == list(range(len(times) - 1))
    assert len(called) == (2 * (steps // 2) if sampler == "flowar(0.9)" else steps)


def test_whole_times_are_products_of_float32():
    """Those of 50 steps of xAR as published; a product of float64 would shift some."""
    times = flow_times("euler_maruyama", 50)
    assert time_id(times)[:5].tolist() == [1000, 980, 960, 941, 921]
    assert time_id(times)[-3:].tolist() == [59, 40, 0]
    shifted = (flow_times("flowar", 50).float().double() * 1000).floor().long()
    assert (shifted != time_id(flow_times("flowar", 50))).sum() == 26


def test_guidance_ends_at_times_hit_exactly():
    """As FlowAR compares them: 0.9 and 0.7 are among the 50 even times, and 0.9 among those of 16;
    but what would be 0.7 there lies above it."""
    even, uneven = (flow_times("flowar", steps).tolist() for steps in (50, 16))
    assert 0.9 in even
    assert 0.7 in even
    assert 0.9 in uneven
    assert math.nextafter(0.7, 1) in uneven


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 0), ("euler_maruyama", 1), ("flowar", 1)])
def test_too_few_steps_are_refused(sampler, steps):
    with pytest.raises(UserError, match=f"{sampler}: takes .* or more, not {steps}"):
        flow_times(sampler, steps)
