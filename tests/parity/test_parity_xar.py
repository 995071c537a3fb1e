"""xAR against its official network, loss and samplers, annealed by DiSA or not."""

import math

import pytest
import torch
from official import Case, cases

from vistok.checkpoints.files import rename
from vistok.checkpoints.xar import RULES, TABLES, generator
from vistok.decoding import Decoding, Sampler, Schedule, StoredNoise, decode
from vistok.decoding.flow import flow_times, time_id

UNCOMPARED = {}


def kind(*names: str):
    return lambda description: description["config"].get("kind") in names


def load(case: Case):
    sizes = case.config["constructor"]
    side = sizes["img_size"] // sizes["vae_stride"] // sizes["patch_size"]
    model = generator(
        case.weights,
        order=f"cells({side // math.isqrt(sizes['clusters'])})",
        condition_dropout=sizes["label_drop_prob"],
    )
    assert model.spec.shape == (side, side)
    for half in ("encoder", "decoder"):
        blocks = getattr(model.trunk, half).blocks
        assert len(blocks) == sizes[f"{half}_depth"]
        assert blocks[0].attention.num_heads == sizes[f"{half}_num_heads"]
    return model.eval()


def gradient(model, published: str, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a published weight, whose gates and values are here one matrix, and whose
    tables lie in the order of the sequence."""
    (name,) = rename({published: weight}, RULES, "weights")
    for i, part in enumerate((".g.", ".x.")):
        if part in name:
            return model.get_parameter(name.replace(part, ".gate_value.")).grad.chunk(2)[i]
    found = model.get_parameter(name).grad
    return found[model.plan().joint.tokens] if name in TABLES else found


@pytest.mark.parametrize("folder", cases("xar", kind("train")))
def test_training(folder):
    case = Case(folder)
    model, given = load(case), case.inputs
    batch, plan = len(given["labels"]), model.plan()
    sequence, trunk = plan.joint.tokens, model.trunk
    inner = {}
    watched = {
        "time_embed": model.time_embedding,
        "encoder_in_ln": trunk.embed_norm,
        "encoder_block0": trunk.encoder.blocks[0],
        "encoder": trunk.encoder,
        "decoder": trunk.decoder,
        "x_t": model.latent_embed,
    }
    for name, module in watched.items():
        module.register_forward_hook(
            lambda module, args, output, name=name: inner.update(
                {name: args[0] if name == "x_t" else output}
            )
        )

    def cell_major(x):
        return x.unflatten(0, (batch, len(plan))).transpose(0, 1)

    data = model.positions(given["latents"].permute(0, 2, 3, 1))
    times = given["t"].view(len(plan), batch).T
    noise = given["noise"].transpose(0, 1).flatten(1, 2)[:, sequence.argsort()]
    case.compare("cells", data[:, sequence])
    case.compare("unclusterify", model.finish(data).permute(0, 3, 1, 2))
    case.compare("time_ids", time_id(times).T)
    dropped = given["drop_u"] < model.condition_dropout
    labels = model.condition.drop(given["labels"], dropped)
    case.compare(
        "velocity",
        model.velocity(
            torch.lerp(data, noise, times[:, plan.rank_of_position, None]), labels, times
        )[:, sequence],
    )
    loss = model.loss(data, labels, times, noise).loss
    case.compare("loss", loss)
    inner["time_embed"] = cell_major(inner["time_embed"])
    for name, found in inner.items():
        case.compare(name, found)
    loss.backward()
    for name in [name for name in case.expected if name.startswith("grad.")]:
        published = name.removeprefix("grad.")
        case.compare(name, gradient(model, published, case.weights[published]))
    case.finish(UNCOMPARED)


@pytest.mark.parametrize("folder", [*cases("xar", kind("sample")), *cases("disa", kind("xar"))])
@torch.inference_mode()
def test_sampling(folder):
    case = Case(folder)
    model, given, config = load(case), case.inputs, case.config
    plan, labels = model.plan(), given["labels"]
    if "upper" in config:
        steps = f"linear({config['upper']},{config['lower']})"
    else:
        steps = config["num_steps"]
    decoding = Decoding(
        guidance=Schedule(f"linear(1,{config['cfg']})"),
        steps=Schedule(steps),
        sampler=Sampler(config.get("sampler", "euler_maruyama")),
    )
    budgets = decoding.budgets(plan, model.head.steps)
    case.compare("cfg_by_cell", torch.tensor(decoding.scales(plan)))
    case.compare("steps_by_cell", torch.tensor(budgets))
    times = [flow_times(decoding.sampler, budget)[:-1] for budget in budgets]
    case.compare("time_ids", time_id(times[0]))

    context, calls = [], []
    draw, transformer = model.draw, model.transformer

    def watched_draw(tokens, *rest):
        context.append(tokens[: len(labels)].clone())
        calls.append([])
        return draw(tokens, *rest)

    def watched_transformer(x, *rest, **more):
        calls[-1].append((x, transformer(x, *rest, **more)))
        return calls[-1][-1][1]

    model.draw, model.transformer = watched_draw, watched_transformer
    noise = []
    for cell, budget in enumerate(budgets):
        draws = given["init_noise"][cell][:, :, None]
        if "step_noise" in given:
            after = given["step_noise"][cell, : budget - 1].permute(1, 2, 0, 3)
            draws = torch.cat([draws, after], dim=2)
        noise.append(draws)
    latents = decode(model, labels, StoredNoise(*noise), decoding)
    model.transformer = transformer
    case.compare("latents", latents.permute(0, 3, 1, 2))
    rows = latents.flatten(1, 2)
    case.compare("cells_by_step", torch.stack([rows[:, fed.predict] for fed in plan.passes]))

    def both_halves(cell: int, step: int) -> torch.Tensor:
        """What the loop found; the null half, where it left that out, by a pass over all cells."""
        x, found = calls[cell][-budgets[cell] :][step]
        if len(found) == 2 * len(labels):
            return found
        points, at = context[cell].clone(), plan.passes[cell].predict
        points[:, at] = x
        all_times = torch.zeros(len(labels), len(plan))
        all_times[:, cell] = times[cell][step]
        null = model.velocity(points, model.null_condition(labels), all_times)
        return torch.cat([found, null[:, at]])

    for name, step in (("first", 0), ("last", -1)):
        found = torch.stack([both_halves(cell, step) for cell in range(len(plan))])
        case.compare(f"velocity_{name}_call", found)
    case.finish(UNCOMPARED)
