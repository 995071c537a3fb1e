"""MaskGIT (TiTok, One-D-Piece) against its official network, loss and sampler."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from official import Case, cases

from vistok.checkpoints.files import rename
from vistok.checkpoints.maskgit import RULES, generator, uvit_rules
from vistok.decoding import Decoding, Order, Schedule, StoredNoise, decode_masked
from vistok.generators.maskgit import random_masks

UNCOMPARED = {}
CONFIG = Path(__file__).parents[2] / "configs" / "generators" / "maskgit_titok_l32.yaml"
NO_DECAY = yaml.safe_load(CONFIG.read_text())["optimizer"]["no_decay"]


def load(case: Case):
    sizes = case.config["model"]["generator"]
    losses = case.config.get("losses", {})
    return generator(
        case.weights,
        num_heads=sizes["num_attention_heads"],
        label_smoothing=losses.get("label_smoothing", 0.1),
        visible_weight=losses.get("loss_weight_unmasked_token", 0.1),
    ).eval()


def decoding_of(settings: dict, randomness: float) -> Decoding:
    """The official settings, whose two conventions of guidance are here one."""
    w, decay = settings["guidance_scale"], settings["guidance_decay"]
    forms = {
        "constant": f"{1 + w}",
        "linear": f"linear(1,{1 + w})",
        "power-cosine": f"power_cosine(1,{w},{settings['guidance_scale_pow']})",
    }
    anneals = settings["softmax_temperature_annealing"]
    return Decoding(
        plan=Order(f"maskgit({settings['num_sample_steps']})"),
        guidance=Schedule(forms[decay]),
        temperature=Schedule("linear(1.3,0.5)" if anneals else 1),
        randomness=Schedule(f"linear({randomness},0)"),
    )


def renamed(case: Case) -> dict[str, str]:
    """Published names of weights to those that the importer first gives them, where queries, keys,
    values and tables are not yet joined or split."""
    weights = rename(case.weights, RULES, "weights")
    if "pos_embed" in case.weights:
        weights = rename(weights, uvit_rules(weights), "weights")
    ours = {id(tensor): name for name, tensor in weights.items()}
    return {name: ours[id(tensor)] for name, tensor in case.weights.items()}


def gradient(model, published: str, ours: str) -> torch.Tensor:
    """The gradient of a published weight, from that of ours."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    if "token_type" in published:  # a part of all positions
        first = grads["position_embedding"].sum(0)
        return torch.stack([first, torch.zeros_like(first)])
    if ours == "embeddings":
        return torch.cat([grads["token_embedding.weight"], grads["condition.weight"]])
    parts = ("query", "key", "value")
    for i, part in enumerate(parts):
        if f".{part}." in ours:
            return grads[ours.replace(part, "in_proj")].chunk(3)[i]
    return grads[ours]


@pytest.mark.parametrize("folder", cases("maskgit"))
def test_maskgit(folder):
    case = Case(folder)
    model, given = load(case), case.inputs

    def with_dropped(labels, uniforms, probability):
        return model.condition.drop(labels, uniforms < probability)

    labels = with_dropped(given["cond"], given["drop_u"], given["drop_prob"])
    case.compare("logits", model.head.logits(model.hidden(given["ids"], labels)))

    masked = random_masks(given["mlm.u_t"], given["mlm.u_perm"])
    tokens = given["mlm.tokens"]
    case.compare("mlm.masks", masked)
    corrupted = tokens.masked_fill(masked, model.mask_token)
    case.compare("mlm.masked_tokens", corrupted)
    labels = with_dropped(given["cond"], given["mlm.drop_u"], 0.1)
    case.compare("mlm.logits", model.head.logits(model.hidden(corrupted, labels)))
    result = model.loss(tokens, labels, masked)
    result.loss.backward()
    case.compare("mlm.loss", result.loss)
    case.compare("mlm.correct_tokens", result.metrics["accuracy"])
    for name in case.expected:
        if name.startswith("mlm.grad."):
            published = name.removeprefix("mlm.grad.")
            case.compare(name, gradient(model, published, renamed(case)[published]))

    check_sampling(case, model)
    check_weight_decay(case, model)
    case.finish(UNCOMPARED)


@torch.inference_mode()
def check_sampling(case, model):
    settings, labels = case.config["sampling"], case.inputs["cond"]
    decoding = decoding_of(settings, settings["randomize_temperature"])
    fed = [torch.full_like(case.inputs["ids"], model.mask_token)]
    noise = StoredNoise(*(case.inputs[name].transpose(0, 1) for name in ("u_logits", "u_conf")))
    ids = decode_masked(
        model, labels, noise, decoding, on_pass=lambda t, tokens: fed.append(tokens.clone())
    )
    case.compare("ids", ids)
    case.compare("step_ids", torch.stack(fed[:-1]))
    conditional, null = [], []
    scales = decoding.scales(model.plan(decoding.plan))
    for tokens, scale in zip(fed[:-1], scales, strict=True):
        # Their power-cosine runs both halves where its scale is 1, too.
        both = scale != 1 or settings["guidance_decay"] == "power-cosine"
        conditional.append(model.head.logits(model.hidden(tokens, labels)))
        logits = model.head.logits(model.hidden(tokens, model.null_condition(labels)))
        null.append(logits if both else torch.zeros_like(logits))
    case.compare("cond_logits", torch.stack(conditional))
    case.compare("uncond_logits", torch.stack(null))
    masked = [(tokens[0] == model.mask_token).sum().item() for tokens in fed[:-1]]
    assert masked == case.description["extra"].get("masked_per_step", masked)
    assert masked == list(model.plan(decoding.plan).masked)

    passes, n = len(model.plan(decoding.plan)), model.spec.num_tokens
    silence = StoredNoise(*torch.full((2, len(labels), passes, n), 0.5))
    case.compare("greedy_ids", decode_masked(model, labels, silence, decoding_of(settings, 0)))


def check_weight_decay(case, model):
    """The configs' name fragments spare the weights that the official optimiser spares."""
    parameters = dict(model.named_parameters())
    for published, ours in renamed(case).items():
        ours = re.sub("query|key|value", "in_proj", ours)
        tables = ("token_embedding.weight", "condition.weight")
        for name in tables if ours == "embeddings" else (ours,):
            if name in parameters:
                spared = parameters[name].ndim < 2 or any(part in name for part in NO_DECAY)
                assert spared == (published in case.description["extra"]["no_weight_decay"]), name
