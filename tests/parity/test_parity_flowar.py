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
    sizes = case.config["constructor"]
    heads = (sizes["encoder_num_heads"], sizes["decoder_num_heads"])
    model = generator(case.weights, sizes["scale"])
    assert heads == tuple(
        stack.blocks[0].attention.num_heads for stack in (model.trunk.encoder, model.trunk.decoder)
    )
    assert model.condition_dropout == 0.1
    return model.eval()


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
    inner = {}
    for name, stack in (("encoder", model.trunk.encoder), ("decoder", model.trunk.decoder)):
        stack.register_forward_hook(lambda *args, name=name: inner.update({name: args[-1]}))
    scales = pyramid(given["latents"].permute(0, 2, 3, 1), model.scales).split(model.sizes, dim=1)
    told = [
        upscaled(before, side, model.scales[-1])
        for before, side in zip(scales[:-1], model.scales[1:], strict=True)
    ]
    case.compare("scale_inputs", torch.cat(told, dim=1))

    dropped = given["drop_u"] < case.config["constructor"]["label_drop_prob"]
    hidden = model.teacher_forced(scales, model.condition.drop(given["labels"], dropped))
    case.compare("encoder", inner["encoder"])
    case.compare("decoder", inner["decoder"])
    case.compare("z", torch.cat(hidden, dim=1))

    velocities, velocity = [], model.head.velocity
    model.head.velocity = lambda *args: velocities.append(velocity(*args)) or velocities[-1]
    noise = given["noise"].split(model.sizes, dim=1)
    output = model.summed(map(model.head.loss_at, given["t"], noise, hidden, scales))
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
    step, velocity = model.step, model.head.velocity
    model.step = lambda *args: hidden.append(step(*args)) or calls.append(0) or hidden[-1]

    def counted(*args):
        calls[-1] += 1
        return velocity(*args)

    model.head.velocity = counted
    noise = given["init_noise"][:batch, :, None].split(model.sizes, dim=1)
    latents = decode(
        model,
        given["labels"],
        StoredNoise(*noise),
        decoding,
        on_pass=lambda t, tokens: scales.append(tokens.clone()),
    )
    case.compare("network_calls_by_scale", torch.tensor(calls))
    case.compare("z_by_scale", torch.cat(hidden, dim=1))
    case.compare("scales", scales[-1])
    case.compare("latents", latents.permute(0, 3, 1, 2))
    case.finish(UNCOMPARED)
