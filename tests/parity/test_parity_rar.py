"""RAR against its official network, loss, annealing and sampler."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from official import Case, cases

from vistok.checkpoints.files import rename
from vistok.checkpoints.rar import RULES, generator
from vistok.decoding import Decoding, Sampling, Schedule, StoredNoise, decode, probabilities

UNCOMPARED = {}
CONFIG = Path(__file__).parents[2] / "configs" / "generators" / "rar_b.yaml"
NO_DECAY = yaml.safe_load(CONFIG.read_text())["optimizer"]["no_decay"]


def load(case: Case):
    sizes, anneal = case.config["model"]["generator"], case.config["anneal"]
    side = math.isqrt(sizes["image_seq_len"])
    square = side**2 == sizes["image_seq_len"]
    total = 2 * anneal["randomness_anneal_end"]
    return generator(
        case.weights,
        shape=(side, side) if square else (sizes["image_seq_len"],),
        num_heads=sizes["num_attention_heads"],
        anneal_start=anneal["randomness_anneal_start"] / total,
        anneal_end=anneal["randomness_anneal_end"] / total,
    ).eval()


def gradient(case: Case, model, published: str) -> torch.Tensor:
    """The gradient of a published weight; tables in the rows that the case keeps."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    if published == "embeddings.weight":
        tokens, classes = grads["token_embedding.weight"], grads["condition.weight"]
        return torch.cat([tokens, torch.zeros_like(tokens[:1]), classes])
    (name,) = rename({published: case.weights[published]}, RULES, "weights")
    rows = case.expected[f"grad.{published}"].shape
    if name.endswith("_embedding"):
        before = 2 if name.startswith("target") else 0
        return F.pad(grads[name], (0, 0, before, rows[1] - before - len(grads[name])))
    return grads[name]


@pytest.mark.parametrize("folder", cases("rar"))
def test_rar(folder):
    case = Case(folder)
    model, given = load(case), case.inputs
    n, vocab_size = model.spec.num_tokens, model.spec.vocab_size
    labels = model.condition.drop(given["cond"], given["drop_u"] < given["drop_prob"])
    case.compare("cond_ids", labels + vocab_size + 1)  # theirs share one table with the codes

    def but_last(logits):
        return logits[:, :n]  # they feed the last token, too, and leave what it predicts unused

    tokens, orders = given["tokens"], given["orders"]
    shaped = tokens.view(-1, *model.spec.shape)
    raster = model.head.logits(model.teacher_forced(shaped, labels))
    case.compare("logits_raster", raster, but_last)
    target = tokens.gather(1, orders)
    case.compare("labels", target)
    hidden = model.teacher_forced(shaped, labels, orders)
    logits = model.head.logits(hidden)
    case.compare("logits_orders", logits, but_last)
    loss = model.head.loss(hidden, target).mean()
    loss.backward()
    case.compare("loss", loss)
    case.compare("correct_tokens", (logits.argmax(-1) == target).float().mean())
    for name in case.expected:
        if name.startswith("grad."):
            case.compare(name, gradient(case, model, name.removeprefix("grad.")))

    ratios = []
    for step in given["sched_steps"].tolist():
        model.set_progress(step / (2 * case.config["anneal"]["randomness_anneal_end"]))
        ratios.append(model.random_share.clone())
    case.compare("random_ratio", torch.stack(ratios))

    check_sampling(case, model)
    check_weight_decay(case, model)
    case.finish(UNCOMPARED)


@torch.inference_mode()
def check_sampling(case, model):
    settings, labels = case.config["sampling"], case.inputs["cond"]
    w, power = settings["guidance_scale"], settings["guidance_scale_pow"]
    guidance = Schedule(f"power_cosine(1,{w},{power})" if w else 1)
    temperature = settings["randomize_temperature"]
    # argmax(p / q) with q exponential is argmax(log p + g) with g = -log q.
    uniforms = torch.exp(-case.inputs["q"].double()).transpose(0, 1)
    hidden = []
    step = model.step
    model.step = lambda *given: hidden.append(step(*given)) or hidden[-1]
    decoding = Decoding(guidance=guidance, temperature=Schedule(temperature))
    case.compare("ids", decode(model, labels, StoredNoise(uniforms), decoding).flatten(1))
    model.step = step
    plan, probs = model.plan(), []
    for state, scale in zip(hidden, decoding.scales(plan), strict=True):
        half = state[len(labels) :] if len(state) > len(labels) else None
        logits = model.head.guided_logits(state[: len(labels)], half, scale)[:, 0]
        probs.append(probabilities(logits, Sampling(temperature)))
    case.compare("probs", torch.stack(probs))
    for name, chosen in (("greedy_ids", guidance), ("greedy_ids_nocfg", Schedule(1))):
        silence = StoredNoise(torch.zeros(len(labels), len(plan)))
        greedy = Decoding(guidance=chosen, temperature=Schedule(0))
        case.compare(name, decode(model, labels, silence, greedy).flatten(1))


def check_weight_decay(case, model):
    """The configs' name fragments spare the weights that the official optimiser spares."""
    parameters = dict(model.named_parameters())
    for published in case.weights:
        (ours,) = rename({published: case.weights[published]}, RULES, "weights")
        tables = ("token_embedding.weight", "condition.weight")
        for name in tables if published == "embeddings.weight" else (ours,):
            spared = parameters[name].ndim < 2 or any(part in name for part in NO_DECAY)
            assert spared == (published in case.description["extra"]["no_weight_decay"]), name
