"""The diffusion head (MAR), its samplers and annealed steps (DiSA) against the official ones."""

import re

import pytest
import torch
from official import Case, cases
from torch import Tensor

from vistok.checkpoints import mar
from vistok.decoding import Decoding, Order, Sampler, Sampling, Schedule
from vistok.decoding.diffusion import NUM_TIMES, Process, chain, full_process, kept_times
from vistok.decoding.flow import flow_times, time_id
from vistok.generators.mar import mask_ratios
from vistok.heads import DiffusionHead
from vistok.layers.positions import time_features

SAMPLERS = {"DiSA": "ddpm(950)", "DDIM": "ddim(980)", "DPM_Solver": "dpm", "DPM_Solver++": "dpm_pp"}
# Annealing from the first to the second number of steps, which is the fork's constant.
ANNEALING = {
    "linear": "linear({},{})",
    "cosine": "cosine({},{})",
    "two-stage": "two_stage({},{})",
    "constant": "{1}",
}
DISA = Sampler("ddpm(950)")


def of_kind(kind: str):
    return lambda description: description["config"].get("kind") == kind


def spelt(respacing: str) -> tuple[Sampler, int]:
    """A published respacing as a sampler and its number of steps."""
    if respacing.startswith("ddim"):
        return Sampler("ddim"), int(respacing.removeprefix("ddim"))
    if "," in respacing:
        return Sampler(f"sections({respacing})"), 1
    return Sampler("ddpm"), int(respacing)


def run(
    head: DiffusionHead,
    given: dict[str, Tensor],
    sampler: Sampler,
    steps: int,
    temperature: float = 1.0,
    guidance: float | None = None,
) -> Tensor:
    """The samples (steps, rows, c) of a chain from the recorded noise."""
    noise = given["x"][None]
    draws = chain(sampler, steps).draws
    if draws:
        noise = torch.cat([noise, given["step_noise"][:draws]])
    null = None if guidance is None else given["z_uncond"][None]
    sampling = Sampling(temperature, sampler=sampler)
    noise = noise.transpose(0, 1)[None]
    path = head.path(given["z"][None], null, guidance or 1.0, noise, sampling, steps)
    return torch.cat(list(path))


@pytest.mark.parametrize("folder", cases("mar", of_kind("diff")))
@torch.no_grad()
def test_head(folder):
    case = Case(folder)
    head, given, config = mar.head(case.weights), case.inputs, case.config
    check_network(case, head)
    check_loss(case, head)
    for respacing in config["respacings"]:
        check_tables(case, respacing)
    for respacing in config["single_steps"]:
        check_single_steps(case, head, respacing)
    for respacing in config["chains"]:
        sampler, steps = spelt(respacing)
        settings = (sampler, steps, config["temperature"])
        case.compare(f"chain.{respacing}", run(head, given, *settings))
        case.compare(f"chain_cfg.{respacing}", run(head, given, *settings, config["cfg"])[-1])
    for respacing in config["ddim"]:
        case.compare(f"ddim_eta0.{respacing}", run(head, given, *spelt(respacing))[-1])
    for tokens, passes in config["token_schedules"]:
        masked = Order(f"mar({passes})")((tokens,)).masked
        case.compare(f"tokens_per_step.{tokens}_{passes}", -torch.tensor([*masked, 0]).diff())
    check_mask_ratios(case)
    case.finish({})


def check_network(case, head):
    x, t, z = (case.inputs[name] for name in ("x", "t", "z"))
    case.compare("t_embed", time_features(t.float(), 256, highest=1.0, span=10000.0))
    case.compare("time_embed", head.net.time(t))
    out = head.net(x, t, z)
    case.compare("net", out)
    eps, v = out.chunk(2, dim=-1)
    rows = [chain(Sampler("ddpm"), NUM_TIMES).steps[NUM_TIMES - 1 - time] for time in t.tolist()]
    means = [step(*row) for step, *row in zip(rows, x, eps, v, strict=True)]
    case.compare("p_mean", torch.stack(means))
    levels = [2 * (step.level + step.spread * row) for step, row in zip(rows, v, strict=True)]
    case.compare("p_log_variance", torch.stack(levels))
    noise_share = (1 - full_process().alphas_cumprod[t, None]).sqrt()
    case.compare("pred_xstart_times_sqrt_abar", x - noise_share * eps)


def check_loss(case, head):
    noisy = []
    hook = head.net.register_forward_pre_hook(lambda module, taken: noisy.append(taken[0]))
    given = [case.inputs[name] for name in ("z", "target", "t", "noise")]
    mse, vb = head.loss_at(*given)
    hook.remove()
    case.compare("x_t", noisy[0])
    case.compare("mse", mse)
    case.compare("vb", vb)
    mask = case.inputs["mask"]
    case.compare("loss_masked", (mask * (mse + vb)).sum() / mask.sum())


def check_tables(case, respacing):
    process = Process(tuple(kept_times(*spelt(respacing))))
    ours = {
        "timesteps": torch.tensor(process.times),
        "alphas_cumprod": process.alphas_cumprod,
        "betas": process.betas,
        "posterior_mean_coef1": process.data_weight,
        "posterior_mean_coef2": process.sample_weight,
        "posterior_log_variance_clipped": process.log_variance,
    }
    for name, numbers in ours.items():
        case.compare(f"{name}.{respacing}", numbers)


def check_single_steps(case, head, respacing):
    """A step from each time of a chain, over what it magnifies errors by."""
    given, temperature = case.inputs, case.config["temperature"]
    process = Process(tuple(kept_times(*spelt(respacing))))
    factor = (process.data_weight / process.alphas_cumprod.sqrt()).clamp(min=1)
    case.compare(f"amplification.{respacing}", factor)
    ours = []
    steps = chain(*spelt(respacing))
    for number, step in enumerate(steps.steps):
        times = torch.full((len(given["x"]),), step.time)
        eps, v = head.net(given["x"], times, given["z"]).chunk(2, dim=-1)
        noise = temperature * given["step_noise"][0] if number < steps.draws else None
        ours.insert(0, step(given["x"], eps, v, noise))
    case.compare(f"single_step.{respacing}", torch.stack(ours) / factor[:, None, None])


@torch.enable_grad()
def check_mask_ratios(case):
    u = case.inputs["mask_u"].requires_grad_()
    ratios = mask_ratios(u, case.config["mask_ratio_min"])
    case.compare("mask_rate", ratios)
    # The density is one over the slope of the quantiles.
    (slope,) = torch.autograd.grad(ratios.sum(), u)
    case.compare("mask_rate_pdf", 1 / slope)


@pytest.mark.parametrize("folder", cases("disa", of_kind("diff")))
@torch.no_grad()
def test_samplers(folder):
    case = Case(folder)
    head, config = mar.head(case.weights), case.config
    sizes, passes = config["constructor"], config["num_iter"]
    steps = ANNEALING["linear"].format(sizes["diff_upper_steps"], sizes["diff_lower_steps"])
    for name in config["samplers"]:
        sampler = Sampler(SAMPLERS[name])
        decoding = Decoding(steps=Schedule(steps), sampler=sampler)
        budgets = decoding.budgets(Order(f"mar({passes})")((passes,)), head.steps)
        for at in config["at_steps"]:
            drawn = run(head, case.inputs, sampler, budgets[at], config["temperature"])
            case.compare(f"{name}.step{at}", drawn[-1])
            case.compare(f"{name}.times{at}", chain(sampler, budgets[at]).times(drawn.device))
    case.compare("train_timesteps_count", torch.tensor(len(kept_times(DISA, NUM_TIMES))))
    case.finish({})


@pytest.mark.parametrize("folder", cases("disa", of_kind("sched")))
def test_schedules(folder):
    case = Case(folder)
    config = case.config

    def compare_budgets(name: str, spelling: str, plan) -> list[int]:
        budgets = Decoding(steps=Schedule(spelling)).budgets(plan, Schedule(1))
        case.compare(name, torch.tensor(budgets))
        return budgets

    for form, most, least, n in config["mar"]:
        spelling, plan = ANNEALING[form].format(most, least), Order(f"mar({n})")((n,))
        budgets = compare_budgets(f"mar.{form}.{most}_{least}_{n}", spelling, plan)
        called = torch.tensor([len(kept_times(DISA, steps)) for steps in budgets])
        case.compare(f"mar_effective.{form}.{most}_{least}_{n}", called)
    for most, least, n in config["xar"]:
        plan = Order("cells(1)")((1, n))
        compare_budgets(f"xar.{most}_{least}_{n}", f"linear({most},{least})", plan)
    for most, least, sides in config["flowar"]:
        plan = Order(f"scales({','.join(map(str, sides))})")((sides[-1], sides[-1]))
        name = f"flowar.{most}_{least}_{'-'.join(map(str, sides))}"
        compare_budgets(name, f"linear({most},{least})", plan)

    for n in config["timesteps"]:
        case.compare(f"timesteps.{n}", torch.tensor(kept_times(DISA, n)))
        case.compare(f"ddim_timesteps.{n}", torch.tensor(kept_times(Sampler("ddim(980)"), n)))
    for kind, sampler in (("flow", "flowar"), ("em", "euler_maruyama")):
        for n in config[f"{kind}_times"]:
            times = flow_times(sampler, n)[:-1]
            case.compare(f"{kind}_times.{n}", times)
            case.compare(f"{kind}_time_ids.{n}", time_id(times))
    for name in list(case.left):
        if match := re.fullmatch(r"effective_count_(\d+)_(\d+)", name):
            counts = range(int(match[1]), int(match[2]) + 1)
            case.compare(name, torch.tensor([len(kept_times(DISA, n)) for n in counts]))
    case.finish({})
