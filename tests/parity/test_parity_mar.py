"""MAR, its sampling in annealed steps (DiSA) and its trunk on other grids (Harmon) against the
official ones."""

import math
from itertools import pairwise

import pytest
import torch
from official import Case, cases
from torch import Tensor, nn
from torch.func import functional_call

from vistok.checkpoints import mar
from vistok.decoding import Decoding, Order, Sampler, Schedule, StoredNoise, decode_random
from vistok.generators.mar import mask_ratios

SAMPLERS = {"DiSA": "ddpm(950)", "DDIM": "ddim(980)", "DPM_Solver": "dpm", "DPM_Solver++": "dpm_pp"}


def of_kind(kind):
    return lambda description: description["config"].get("kind") == kind


def load(case: Case, **options):
    sizes = case.config["constructor"]
    return mar.generator(
        case.weights,
        num_heads=sizes["encoder_num_heads"],
        decoder_num_heads=sizes["decoder_num_heads"],
        patch_size=sizes["patch_size"],
        batch_mul=sizes["diffusion_batch_mul"],
        **options,
    ).eval()


def record(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What the module takes and returns from now on."""
    taken, returned = [], []

    def keep(module, x, y):
        taken.append(x[0])
        returned.append(y)

    module.register_forward_hook(keep)
    return taken, returned


class Step(nn.Module):
    """What a training step computes, and on the way."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, given: dict[str, Tensor], labels: Tensor, count: int) -> dict[str, Tensor]:
        model, (batch, n) = self.model, given["orders"].shape
        values = model.values(given["latents"].permute(0, 2, 3, 1))
        masked, known = (part.sort().values for part in given["orders"].tensor_split([count], 1))
        all_positions = torch.arange(n).expand(batch, n)
        times = given["t"].view(-1, batch, n)
        noise = given["noise"].view(*times.shape, -1)

        embedded, _ = record(model.encoder_blocks[0])
        _, decoded = record(model.decoder_norm)
        noisy, _ = record(model.head.net.input)
        _, predicted = record(model.head.net.output)
        slots = model.condition(labels)
        model.encode(values, slots, all_positions)
        encoded = model.encode(values, slots, known)
        z = model.decode(encoded, known, all_positions)
        error, bound = model.head.loss_at(z, values, times, noise)

        def head_loss(hidden, target):
            at = masked.expand(len(times), batch, count)
            noise_at = noise.gather(2, at[..., None].expand(*at.shape, noise.shape[-1]))
            return sum(model.head.loss_at(hidden, target, times.gather(2, at), noise_at)).mean(0)

        model.head.loss = head_loss
        return {
            "tokens": values,
            "mask": torch.zeros(batch, n).scatter(1, masked, 1.0),
            "encoder_in_ln": embedded[0],
            "encoder": encoded,
            "decoder_norm": decoded[0],
            "z": z,
            "x_t": noisy[0],
            "net_out": predicted[0],
            "mse": error,
            "vb": bound,
            "loss": model.loss(values, labels, torch.cat([masked, known], dim=1), count).loss,
        }


@pytest.mark.parametrize("folder", cases("mar", of_kind("train")))
def test_training_step(folder):
    case = Case(folder)
    model, given, sizes = load(case), case.inputs, case.config["constructor"]
    # Through the importer, so that the gradients are those of the published weights.
    published = {name: tensor.clone().requires_grad_() for name, tensor in case.weights.items()}
    weights = {f"model.{name}": tensor for name, tensor in mar.renamed(published).items()}
    dropped = given["drop_u"] < sizes["label_drop_prob"]
    labels = model.condition.drop(given["labels"], dropped)
    count = math.ceil(given["orders"].shape[1] * case.config["mask_rate"])
    computed = functional_call(Step(model), weights, (given, labels, count))
    computed["loss"].backward()
    without_slots = {"decoder_norm": lambda rows: rows[:, model.buffer :]}  # which nothing reads
    for name, ours in computed.items():
        case.compare(name, ours, without_slots.get(name))
    for name in case.config["grads"]:
        case.compare(f"grad.{name}", published[name].grad)
    case.finish({})


def decoding_of(config: dict) -> Decoding:
    sizes = config["constructor"]
    if "num_sampling_steps" in sizes:
        steps = sizes["num_sampling_steps"]
        sampler = f"sections({steps})" if "," in steps else "ddim" if "ddim" in steps else "ddpm"
        steps = 1 if "," in steps else steps.removeprefix("ddim")
    elif sizes["diff_sampler"] == "default":
        sampler, steps = "ddpm", sizes["diff_upper_steps"]
    else:
        sampler = SAMPLERS[sizes["diff_sampler"]]
        upper, lower = (sizes[f"diff_{end}_steps"] for end in ("upper", "lower"))
        name = sizes["diff_annealing_strategy"].replace("-", "_")
        steps = lower if name == "constant" else f"{name}({upper},{lower})"
    linear = config["cfg_schedule"] == "linear"
    return Decoding(
        plan=Order(f"mar({config['num_iter']})"),
        guidance=Schedule(f"linear(1,{config['cfg']})" if linear else config["cfg"]),
        temperature=Schedule(config["temperature"]),
        steps=Schedule(steps),
        sampler=Sampler(sampler),
    )


def by_pass(rows: Tensor, batch: int, counts: list[int]):
    """Rows of all passes, (..., rows, C), as (B, tokens, ..., C) of each."""
    for part in rows.split([batch * count for count in counts], dim=-2):
        yield part.unflatten(-2, (batch, -1)).movedim((-3, -2), (0, 1))


@torch.inference_mode()
@pytest.mark.parametrize(
    "folder", [*cases("mar", of_kind("sample")), *cases("disa", of_kind("mar"))]
)
def test_sampling(folder):
    case = Case(folder)
    model, given, decoding = load(case), case.inputs, decoding_of(case.config)
    plan, batch = decoding.plan_of(model), len(given["orders"])
    budgets = decoding.budgets(plan, model.head.steps)
    chains = [model.head.chain(decoding.sampling(0.0), budget) for budget in budgets]
    counts = [before - after for before, after in pairwise([*plan.masked, 0])]
    firsts = by_pass(given["init_noise"], batch, counts)
    others = by_pass(given["step_noise"], batch, counts)
    noise = [
        torch.cat([first[:, :, None], other[:, :, : chain.draws]], dim=2)
        for first, other, chain in zip(firsts, others, chains, strict=True)
    ]
    labels = given.get("labels")
    if labels is None:
        labels = model.null_condition(torch.zeros(batch, dtype=torch.long))

    conditional, null, drawn = [], [], []
    sample = model.head.sample

    def recorded(hidden, unconditional, *how):
        conditional.append(hidden.flatten(0, 1))
        if unconditional is not None:
            null.append(unconditional.flatten(0, 1))
        tokens = sample(hidden, unconditional, *how)
        drawn.append(tokens.flatten(0, 1))
        return tokens

    model.head.sample = recorded
    _, predicted = record(model.head.net.output)
    # The loop sorts uniforms into the order.
    uniforms = given["orders"].argsort(dim=1).double()
    tokens = decode_random(model, labels, StoredNoise(uniforms, *noise), decoding)

    case.compare("latents", tokens.permute(0, 3, 1, 2))
    case.compare("tokens_by_step", torch.cat(drawn))
    case.compare("z_cond_by_step", torch.cat(conditional))
    if null:
        case.compare("z_uncond_by_step", torch.cat(null))
    case.compare("net_first_call", predicted[0])
    case.compare("rows_per_step", batch * torch.tensor(counts))
    case.compare("cfg_by_step", torch.tensor(decoding.scales(plan)))
    case.compare("nominal_steps", torch.tensor(budgets))
    case.compare("diffusion_steps", torch.tensor([len(chain) for chain in chains]))
    for budget, chain in zip(budgets, chains, strict=True):
        times = torch.tensor([step.time for step in chain.steps])
        case.compare("timesteps", times)
        case.compare(f"timesteps.{budget}", times.flip(0))
    case.finish({})


@torch.inference_mode()
@pytest.mark.parametrize("folder", cases("disa", of_kind("harmon")))
def test_another_grid(folder):
    case = Case(folder)
    grid = load(case, shape=case.config["image_shape"])
    slots = case.inputs["buffer_embed"]
    slots = slots if slots.ndim == 3 else slots[:, None]

    def known_of(mask: Tensor) -> Tensor:
        visible = int((mask[0] == 0).sum())
        return mask.argsort(dim=1, stable=True)[:, :visible]

    tokens, known = case.inputs["tokens"], known_of(case.inputs["mask"])
    encoded = grid.encode(tokens, slots, known)
    everything = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    case.compare("encoder", encoded)
    case.compare("z", grid.decode(encoded, known, everything))
    case.compare("encoder_pos", grid.encoder_position)
    case.compare("diffusion_pos", grid.output_position)
    known = known_of(case.inputs["mask_grid"])
    trained = load(case).encode(case.inputs["tokens_grid"], slots, known)
    case.compare("encoder_trained_grid", trained)
    case.finish({})


@pytest.mark.parametrize("folder", cases("mar", of_kind("diff")))
def test_masks(folder):
    case = Case(folder)
    u = case.inputs["mask_u"].clone().requires_grad_()
    ratios = mask_ratios(u, case.config["mask_ratio_min"])
    (slopes,) = torch.autograd.grad(ratios.sum(), u)
    case.compare("mask_rate", ratios)
    case.compare("mask_rate_pdf", 1 / slopes)
    for n, steps in case.config["token_schedules"]:
        masked = Order(f"mar({steps})")((n,)).masked
        counts = [before - after for before, after in pairwise([*masked, 0])]
        case.compare(f"tokens_per_step.{n}_{steps}", torch.tensor(counts))
    assert not [name for name in case.left if name.startswith(("mask_rate", "tokens_per_step"))]
