"""TokenBridge's model against its official training objective and sampler."""

import math
from itertools import pairwise

import pytest
import torch
from official import Case, cases
from torch import Tensor

from vistok.checkpoints import tokenbridge
from vistok.decoding import Decoding, Noise, Order, Schedule, decode_random
from vistok.generators import MAR
from vistok.heads import dimension_wise


def load(case: Case) -> MAR:
    sizes = case.config["model"]
    assert sizes["quant_max"] == -sizes["quant_min"]
    grid = case.inputs["latents"].shape[2:]
    return tokenbridge.generator(
        case.weights,
        shape=tuple(grid),
        num_heads=sizes["encoder_num_heads"],
        decoder_num_heads=sizes["decoder_num_heads"],
        head_heads=sizes["channel_heads"],
        limit=sizes["quant_max"],
        deviations=sizes["std_range"],
        norm_eps=sizes["norm_eps"],
    ).eval()


class InOrder(Noise):
    """Random numbers that sort into an order; of digits none is read."""

    def __init__(self, orders: Tensor):
        self.draws = [orders.argsort(dim=1).double()]
        self.batch = len(orders)

    def uniform(self, *shape: int) -> Tensor:
        return self.draws.pop() if self.draws else torch.zeros(self.batch, *shape)


@pytest.mark.parametrize("folder", cases("tokenbridge", lambda d: "model" in d["config"]))
@torch.inference_mode()
def test_model(folder, monkeypatch):
    monkeypatch.setattr(dimension_wise, "TOKENS_AT_ONCE", 2**20)  # one call of the hooks a pass
    case = Case(folder)
    model = load(case)
    check_training(case, model)
    for run in case.config["sampling"]:
        check_sampling(case, model, run)
    case.finish({})


def check_training(case: Case, model: MAR) -> None:
    given, head = case.inputs, model.head
    values = given["latents"].permute(0, 2, 3, 1)
    digits = head.quantizer.quantise(values)
    known_values = model.values(digits)
    case.compare("tokens", values)
    case.compare("ids", digits)
    case.compare("dequant", known_values)

    batch, n = given["orders"].shape
    count = math.ceil(n * given["mask_ratio"].item())
    masked, known = (part.sort().values for part in given["orders"].tensor_split([count], dim=1))
    case.compare("mask", torch.zeros(batch, n).scatter(1, masked, 1.0))
    everything = torch.arange(n).expand(batch, n)
    labels = given["labels"]
    for ending, condition in (("", labels), ("_uncond", model.null_condition(labels))):
        encoded = model.encode(known_values, model.condition(condition), known)
        case.compare(f"encoder{ending}", encoded)
        case.compare(f"decoder_z{ending}", model.decode(encoded, known, everything))
    hidden = model.hidden(known_values, labels, known, masked)
    targets = digits.flatten(1, -2).gather(1, masked[:, :, None].expand(-1, -1, digits.shape[-1]))
    in_order = targets.flatten(0, 1)[:, list(head.order)]
    case.compare("channel_logits", head.logits(hidden.flatten(0, 1), in_order))
    order = torch.cat([masked, known], dim=1)
    case.compare("loss", model.loss(known_values, labels, order, count).loss)


def check_sampling(case: Case, model: MAR, run: dict) -> None:
    """Greedy, so that hooks see all that a pass draws from."""
    name, guidance = run["name"], run["cfg"]
    orders = case.inputs[f"{name}.orders"]
    labels = case.inputs.get(f"{name}.labels")
    if labels is None:
        labels = model.null_condition(torch.zeros(run["bsz"], dtype=torch.long))
    linear = run["cfg_schedule"] == "linear"
    decoding = Decoding(
        plan=Order(f"mar({run['num_iter']})"),
        guidance=Schedule(f"linear(1,{guidance})" if linear else guidance),
        temperature=Schedule(0),
    )
    features, logits = [], []
    hooks = [
        model.head.condition.register_forward_hook(lambda _, x, y: features.append(x[0])),
        model.head.digit_logits.register_forward_hook(lambda _, x, y: logits.append(y)),
    ]
    ids = decode_random(model, labels, InOrder(orders), decoding)
    for hook in hooks:
        hook.remove()

    case.compare(f"{name}.ids", ids)
    case.compare(f"{name}.latents", model.head.quantizer.decode(ids).permute(0, 3, 1, 2))
    counts = [before - after for before, after in pairwise([*decoding.plan_of(model).masked, 0])]
    case.compare(f"{name}.tokens_per_step", len(orders) * torch.tensor(counts))
    channels = len(model.head.order)
    logits = [torch.cat(logits[i : i + channels], 1) for i in range(0, len(logits), channels)]
    for step, (feature, digits) in enumerate(zip(features, logits, strict=True)):
        case.compare(f"{name}.step{step}.feature", feature)
        case.compare(f"{name}.step{step}.logits", digits)
        case.compare(f"{name}.step{step}.ids", digits.argmax(-1))
    best = torch.cat(logits).topk(2).values
    case.compare(f"{name}.min_margin", (best[..., 0] - best[..., 1]).min())
