"""FlowAR against its official network, loss and sampler, annealed by DiSA or not."""

import pytest
import torch
from official import Case, cases

from vistok.checkpoints.files import rename
from vistok.checkpoints.flowar import RULES, generator
from vistok.decoding import Decoding, Sampler, Schedule, StoredNoise, decode
from vistok.layers.pyramid import pyramid, upscaled

UNCOMPARED = {}


def kind(name: str):
    return lambda description: description["config"].get("kind") == name


def load(case: Case):
    return generator(case.weights, case.config["constructor"]["scale"]).eval()


def gradient(model, published: str, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a published weight, whose gates and values are here one matrix."""
    (name,) = rename({published: weight}, RULES, "weights")
    for i, part in enumerate((".g.", ".x.")):
        if part in name:
            return model.get_parameter(name.replace(part, ".gate_value.")).grad.chunk(2)[i]
    return model.get_parameter(name).grad


@pytest.mark.parametrize("folder", cases("disa", kind("ftrain")))
def test_training(folder):
    case = Case(folder)
    model, given = load(case), case.inputs
    stacks = {"encoder": model.trunk.encoder, "decoder": model.trunk.decoder}
    for name, stack in stacks.items():
        stack.register_forward_hook(lambda *args, name=name: case.compare(name, args[-1]))
    scales = pyramid(given["latents"].permute(0, 2, 3, 1), model.scales).split(model.sizes, dim=1)
    told = [
        upscaled(before, side, model.scales[-1])
        for before, side in zip(scales[:-1], model.scales[1:], strict=True)
    ]
    case.compare("scale_inputs", torch.cat(told, dim=1))

    dropped = given["drop_u"] < case.config["constructor"]["label_drop_prob"]
    hidden = model.teacher_forced(scales, model.condition.drop(given["labels"], dropped))
    case.compare("z", torch.cat(hidden, dim=1))

    velocities = []
    model.head.register_forward_hook(lambda *args: velocities.append(args[-1]))
    noise = given["noise"].split(model.sizes, dim=1)
    output = model.summed(map(model.head.loss_at, hidden, scales, given["t"], noise))
    case.compare("velocity", torch.cat(velocities, dim=1))
    case.compare("loss", output.loss)
    output.loss.backward()
    for name in [name for name in case.expected if name.startswith("grad.")]:
        published = name.removeprefix("grad.")
        case.compare(name, gradient(model, published, case.weights[published]))
    case.finish(UNCOMPARED)


@pytest.mark.parametrize("folder", cases("disa", kind("fsample")))
@torch.inference_mode()
def test_sampling(folder):
    case = Case(folder)
    model, given, config = load(case), case.inputs, case.config
    batch, cfg = len(given["labels"]), config["cfg"]
    decoding = Decoding(
        guidance=Schedule(f"linear(1,{cfg})"),
        steps=Schedule(f"linear({config['upper']},{config['lower']})"),
        sampler=Sampler(f"flowar({config['guidance']})"),
    )
    plan = model.plan()
    case.compare("cfg_by_scale", torch.tensor(decoding.scales(plan)))
    case.compare("steps_by_scale", torch.tensor(decoding.budgets(plan, model.head.steps)))

    hidden, scales, calls = [], [], []
    step = model.step
    model.step = lambda *args: hidden.append(step(*args)) or hidden[-1]
    model.head.register_forward_hook(lambda *args: calls.append(len(hidden)))
    noise = given["init_noise"][:batch, :, None].split(model.sizes, dim=1)
    latents = decode(
        model,
        given["labels"],
        StoredNoise(*noise),
        decoding,
        on_pass=lambda t, tokens: scales.append(tokens.clone()),
    )
    case.compare("network_calls_by_scale", torch.tensor(calls).bincount()[1:])
    case.compare("z_by_scale", torch.cat(hidden, dim=1))
    case.compare("scales", scales[-1])
    case.compare("latents", latents.permute(0, 3, 1, 2))
    case.finish(UNCOMPARED)
