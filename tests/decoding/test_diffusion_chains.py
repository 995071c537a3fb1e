"""Chains of diffusion: the law that they draw from, their times, and diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from vistok.decoding import Sampler
from vistok.decoding.diffusion import (
    NUM_TIMES,
    SOLVER_TIMES,
    chain,
    cosine_alphas_cumprod,
    full_process,
    kept_times,
)
from vistok.errors import UserError

ALPHAS_CUMPROD = cosine_alphas_cumprod()
MEAN, DEVIATION = 1.5, 0.5  # of the data
SPELLINGS = [("ddpm", 100), ("ddpm(950)", 25), ("sections(10,20,0,5)", 1), ("ddim", 20)]


def best_noise(x: torch.Tensor, alpha_cumprod: torch.Tensor, deviation: float) -> torch.Tensor:
    """The noise in `x` that is to be expected where the data are N(MEAN, deviation^2)."""
    variance = alpha_cumprod * deviation**2 + 1 - alpha_cumprod
    return (1 - alpha_cumprod).sqrt() * (x - alpha_cumprod.sqrt() * MEAN) / variance


@pytest.mark.parametrize("steps", [3, 10, 100])
def test_the_ancestral_chain_draws_from_the_law_of_the_data(steps):
    """Given the true posterior of each step, the law follows exactly, however few steps there are;
    all are affine, so that mean and variance say all."""
    sampler = Sampler("ddpm")
    times = kept_times(sampler, steps)[::-1]
    mean, variance = torch.zeros(1).double(), torch.ones(1).double()
    after = [*(ALPHAS_CUMPROD[time] for time in times[1:]), torch.tensor(1.0).double()]
    steps = chain(sampler, steps)
    for number, (step, time, before) in enumerate(zip(steps.steps, times, after, strict=True)):
        now = ALPHAS_CUMPROD[time]
        beta = 1 - now / before
        # How uncertain the data are, given the sample, and with them the sample before.
        of_data = 1 / (now / (1 - now) + 1 / DEVIATION**2)
        true = beta * (1 - before) / (1 - now) + beta**2 * before / (1 - now) ** 2 * of_data
        v = ((true.log() / 2 - step.level) / step.spread).expand(2)
        ends = torch.cat([mean, mean + 1])
        noise = torch.ones(2).double() if number < steps.draws else None
        silent = step(ends, best_noise(ends, now, DEVIATION), v)
        added = step(ends, best_noise(ends, now, DEVIATION), v, noise) - silent
        mean = silent[:1]
        variance = silent.diff().square() * variance + added[:1].square()
        if number < steps.draws:
            law = before.sqrt() * MEAN, before * DEVIATION**2 + 1 - before
            torch.testing.assert_close(
                torch.cat([mean, variance]), torch.stack(law), rtol=1e-6, atol=1e-3
            )
    # The last step adds nothing: what is missing is what it leaves uncertain.
    ours = torch.cat([mean, variance + of_data])
    wanted = torch.tensor([MEAN, DEVIATION**2]).double()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("spelling", "steps"), [*SPELLINGS, ("ddim(980)", 7)])
def test_data_of_one_value_are_found_in_any_number_of_steps(spelling, steps):
    steps = chain(Sampler(spelling), steps)
    x = torch.randn(5, dtype=torch.float64)
    noise = torch.randn(5, dtype=torch.float64)
    for number, step in enumerate(steps.steps):
        eps = best_noise(x, ALPHAS_CUMPROD[int(step.time)], 0.0)
        x = step(x, eps, torch.zeros_like(x), noise if number < steps.draws else None)
    torch.testing.assert_close(x, torch.full_like(x, MEAN), rtol=1e-6, atol=0)


def share_of_signal(time: float, is_solver: bool) -> torch.Tensor:
    """`ALPHAS_CUMPROD` between its times, too; DPM-Solver's node j lies at 950 (j + 1) / 951."""
    place = time / 950 * SOLVER_TIMES - 1 if is_solver else time
    low = min(int(place), NUM_TIMES - 2)
    logs = ALPHAS_CUMPROD.log()
    return torch.lerp(logs[low], logs[low + 1], place - low).exp()


@pytest.mark.parametrize("spelling", ["ddim", "dpm", "dpm_pp"])
def test_deterministic_chains_carry_the_law_of_noisy_data_to_that_of_the_data(spelling):
    """In many steps; one standard deviation to either side of the mean stays there."""
    steps = chain(Sampler(spelling), 500)
    assert steps.draws == 0
    sides = torch.tensor([-1.0, 1.0]).double()
    ends = None
    for step in steps.steps:
        share = share_of_signal(step.time, is_solver=spelling != "ddim")
        if ends is None:
            ends = share.sqrt() * MEAN + (share * DEVIATION**2 + 1 - share).sqrt() * sides
        ends = step(ends, best_noise(ends, share, DEVIATION), torch.zeros_like(ends))
    torch.testing.assert_close(ends, MEAN + DEVIATION * sides, rtol=0, atol=0.01)


def test_solvers_of_noise_and_of_data_are_one_at_first_order():
    assert chain(Sampler("dpm"), 12).steps == chain(Sampler("dpm_pp"), 12).steps
    first, *_, last = chain(Sampler("dpm"), 4).steps
    assert (first.time, last.time) == pytest.approx((950, 1000 * (0.95 - 0.75 * (0.95 - 1 / 951))))


def network(x: torch.Tensor, time: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and variance of some learned network."""
    eps = best_noise(x, ALPHAS_CUMPROD[int(time)], DEVIATION).to(x.dtype)
    return eps, (2 * x).sin()


@pytest.mark.parametrize(("spelling", "steps"), SPELLINGS)
def test_diffusers_schedulers_make_the_same_chain(spelling, steps):
    """With tables of float64 in the place of theirs."""
    ours = chain(Sampler(spelling), steps)
    options = {"num_train_timesteps": NUM_TIMES, "beta_schedule": "squaredcos_cap_v2"}
    options |= {"clip_sample": False, "prediction_type": "epsilon"}
    if ours.draws:
        scheduler = DDPMScheduler(variance_type="learned_range", **options)
        scheduler.set_timesteps(timesteps=[int(step.time) for step in ours.steps])
    else:
        scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=0, **options)
        scheduler.set_timesteps(steps)
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.alphas_cumprod = ALPHAS_CUMPROD
    scheduler.betas = full_process().betas
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    assert scheduler.timesteps.tolist() == [step.time for step in ours.steps]

    x = theirs = torch.randn(64, 4, dtype=torch.float64)
    noise, their_noise = (torch.Generator().manual_seed(1) for _ in range(2))
    for number, step in enumerate(ours.steps):
        normal = None
        if number < ours.draws:
            normal = torch.randn(x.shape, generator=noise, dtype=x.dtype)
        x = step(x, *network(x, step.time), normal)
        eps, v = network(theirs, step.time)
        if ours.draws:
            given = {"model_output": torch.cat([eps, v], dim=1), "generator": their_noise}
        else:
            given = {"model_output": eps}
        theirs = scheduler.step(timestep=int(step.time), sample=theirs, **given).prev_sample
        torch.testing.assert_close(x, theirs, rtol=1e-6, atol=1e-6)


def test_positions_add_up_before_they_are_rounded():
    differing = []
    for n in range(2, NUM_TIMES + 1):
        at_once = torch.arange(n, dtype=torch.float64) * ((NUM_TIMES - 1) / (n - 1))
        if at_once.round().tolist() != kept_times(Sampler("ddpm"), n):
            differing.append(n)
    assert len(differing) == 278
    assert differing[:4] == [21, 23, 31, 35]


@pytest.mark.parametrize(
    ("spelling", "steps", "times"),
    [
        ("ddpm", 3, [0, 500, 999]),
        ("ddpm(950)", 5, [0, 250, 500, 749, 950]),
        ("ddpm(950)", 10, [0, 111, 222, 333, 444, 555, 666, 777, 888, 950]),
        ("sections(2,0,1,3)", 1, [0, 249, 500, 750, 874, 999]),
        ("sections(1,1,2)", 1, [0, 334, 667, 999]),
        ("ddim", 4, [0, 250, 500, 750]),
        ("ddim(980)", 12, list(range(0, 1000, 84))),
        ("ddim(980)", 37, list(range(0, 999, 27))),
        ("ddim(980)", 100, list(range(0, 990, 10))),
    ],
)
def test_times(spelling, steps, times):
    assert kept_times(Sampler(spelling), steps) == times
    assert [step.time for step in chain(Sampler(spelling), steps).steps] == times[::-1]


def test_beginning_at_950_spares_the_steps_beyond():
    counts = [len(kept_times(Sampler("ddpm(950)"), n)) for n in range(1, 101)]
    assert counts == [n - max(0, (n - 2) // 20) for n in range(1, 101)]


@pytest.mark.parametrize(
    ("spelling", "steps", "reason"),
    [
        ("ddpm", 1, "2 steps or more"),
        ("ddpm", 0, "2 steps or more"),
        ("ddpm(950)", 1, "2 steps or more"),
        ("sections(0,1)", 1, "2 steps or more"),
        ("ddpm", 1001, "0 to 1000"),
        ("sections(3,400,3)", 1, "0 to 333"),
        ("ddpm(0)", 10, "from 1 to 999"),
        ("ddpm(1000)", 10, "from 1 to 999"),
        ("ddpm(9.5)", 10, "whole numbers"),
        ("ddpm(inf)", 10, "whole numbers"),
        ("ddim", 37, "no stride"),
        ("ddim(980)", 1, "no stride"),
        ("dpm", 0, "1 or more"),
    ],
)
def test_chains_that_there_are_not(spelling, steps, reason):
    with pytest.raises(UserError, match=reason) as error:
        chain(Sampler(spelling), steps)
    assert "\n" not in str(error.value)
