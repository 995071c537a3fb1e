"""LlamaGen, PAR, NAR and ZipAR against their official transformers and samplers."""

import math

import pytest
import torch
import torch.nn.functional as F
from official import Case, cases

from vistok.checkpoints.files import rename
from vistok.checkpoints.llamagen import HEADS, RULES, generator
from vistok.decoding import (
    Corrected,
    Decoding,
    Order,
    Sampling,
    Schedule,
    StoredNoise,
    decode,
    probabilities,
)
from vistok.generators import Captions, LlamaGen

UNCOMPARED = {
    "rng_tokens": "informative: drawn by torch.multinomial, which we do not call",
    "*.kcache_last": "inner state in the official slots and padding; every logit is compared",
}
# Their rows beyond the last fed one (tokens that no pass reads) have no counterpart here.


def condition_of(case: Case):
    """Labels, or captions given either left-padded or right-padded."""
    given = case.inputs
    if "t5_raw" in given:
        return Captions.left_padded(given["t5_raw"], given["t5_mask"].sum(1))
    if "emb_masks" in given:
        return Captions(given["cond"], given["emb_masks"].bool())
    return given.get("labels", given.get("cond"))


class Guidance(Schedule):
    """Guidance by pass: official intervals count tokens from places of their own."""

    def __init__(self, plan, scales):
        self.scales = dict(zip(plan.fractions, scales, strict=True))

    def __call__(self, fraction):
        return self.scales.get(fraction, 1.0)

    def __hash__(self):
        return id(self)


def load(case: Case, shape, **options):
    config = case.config.get("model_args", case.config)
    model = generator(
        case.weights,
        shape,
        num_heads=config["n_head"],
        null_class=config.get("class_dropout_prob", 0.1) > 0,
        norm_eps=config.get("norm_eps", 1e-5),
        rope_base=float(config.get("rope_base", 10000)),
        **options,
    )
    return model.eval()


def square(tokens: int) -> tuple[int, int]:
    return (math.isqrt(tokens), math.isqrt(tokens))


def sequence_rows(model: LlamaGen) -> torch.Tensor:
    """Where our training rows (condition, tokens, placeholders) lie in the order of feeding."""
    fed, row = [], {"condition": 0, "tokens": 0, "placeholders": 0}
    rows = model.plan().training
    base = {
        "condition": 0,
        "tokens": len(rows.condition),
        "placeholders": len(rows.condition) + len(rows.tokens),
    }
    for step in model.plan().passes:
        for kind in row:
            count = len(getattr(step, kind))
            fed += range(base[kind] + row[kind], base[kind] + row[kind] + count)
            row[kind] += count
    return torch.tensor(fed)


def cached_logits(model, tokens, condition):
    """Logits of all passes with a cache, given the true tokens; in the order of decoding."""
    plan = model.plan()
    state = model.new_state(len(tokens), plan)
    with torch.inference_mode():
        steps = [model.step(tokens.flatten(1), condition, fed, state) for fed in plan.passes]
        return model.head.logits(torch.cat(steps, dim=1))


def greedy(model, condition, scales=1.0, order=None, trace=None, temperature=0, noise=None, **more):
    """Decode; returns ids (B, N) in raster order."""
    plan = model.plan(order)
    guidance = Guidance(plan, scales) if isinstance(scales, list) else Schedule(scales)
    decoding = Decoding(order, guidance, Schedule(temperature), **more)
    draws = torch.zeros(len(condition), model.spec.num_tokens) if noise is None else noise
    step = model.step

    def traced(tokens, condition, fed, state):
        hidden = step(tokens, condition, fed, state)
        if trace is not None:
            trace.append((tokens[:, fed.tokens].clone(), fed, hidden))
        return hidden

    model.step = traced
    try:
        return decode(model, condition, StoredNoise(draws), decoding).flatten(1)
    finally:
        model.step = step


@torch.inference_mode()
def guided_logits(model, trace, batch, scales):
    """The logits that each pass of a trace handed to the sampler."""
    out = []
    for (_, _, hidden), scale in zip(trace, scales, strict=True):
        logits = model.head.logits(hidden)
        if len(hidden) > batch:
            null, cond = logits[batch:], logits[:batch]
            logits = null + scale * (cond - null) if scale != 1 else cond
        out.append(logits)
    return out


def interval_scales(plan, scale, interval, counted):
    """Scales with guidance off in the passes whose count exceeds the interval."""
    if interval < 0:
        return [scale] * len(plan)
    return [1.0 if counted(t, plan) > interval else scale for t in range(len(plan))]


def first_block(model):
    """Record what the first block and its two layers put out in the next forward pass."""
    seen, block = {}, model.blocks[0]
    modules = {"block0": block, "attn0": block.attention, "ffn0": block.feed_forward}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
        for name, module in modules.items()
    ]
    return seen, handles


def teacher_force(model, tokens, condition, weight=None):
    """Return outputs of the first block, all logits in raster order, and the loss."""
    seen, handles = first_block(model)
    hidden = model.teacher_forced(tokens.view(-1, *model.spec.shape), condition)
    for handle in handles:
        handle.remove()
    logits = model.head.logits(hidden)
    loss = model(tokens.view(-1, *model.spec.shape), condition, weight).loss
    return seen, logits, loss


def rotary_pairs(model, rows):
    """Our factors of the rows as the official (cos, sin) of each pair."""
    table = model.rotary_rows(rows)
    return torch.stack([table[0][:, ::2], table[1][:, 1::2]], dim=-1)


# ------------------------------------------------------------------------------------- LlamaGen


@pytest.mark.parametrize("folder", cases("llamagen", lambda c: "block_size" in str(c["config"])))
def test_llamagen(folder):
    case = Case(folder)
    args = case.config["model_args"]
    shape = square(args["block_size"])
    model = load(case, shape)
    tokens, n = case.inputs["tokens"], args["block_size"]
    full = model.rotary.new_zeros(args["cls_token_num"] + n, args["dim"] // args["n_head"] // 2, 2)
    full[args["cls_token_num"] :] = torch.stack(
        [model.rotary[0][:, ::2], model.rotary[1][:, 1::2]], dim=-1
    )
    case.compare("freqs_cis", full)
    cfg = case.config["cfg_scale"]
    if "labels" in case.inputs:
        labels, wanted = case.inputs["labels"], case.inputs["gen_labels"]
        first, logits, loss = teacher_force(model, tokens, labels)
        for name, output in first.items():
            case.compare(f"train_{name}", output)
        final = {}
        handle = model.norm.register_forward_hook(lambda m, i, o: final.update(norm=o))
        model.teacher_forced(tokens.view(-1, *shape), labels)
        handle.remove()
        case.compare("train_final_norm", final["norm"])
        cached = cached_logits(model, tokens.repeat(2, 1), model.with_null(labels))
        case.compare("naive_logits_last", last_logits(model, tokens, labels))
        case.compare("cached_logits", cached)
        cond, null = cached.chunk(2)
        case.compare("cfg_logits", null + cfg * (cond - null))
        for i, (temperature, k, p) in enumerate(case.config["filters"]):
            probs = probabilities(case.inputs["filter_logits"], Sampling(temperature, k, p))
            case.compare(f"filter_probs_{i}", probs)
    else:
        wanted = condition_of(case)
        case.compare("caption_left", wanted.features)
        case.compare("mask_left", wanted.mask)
        first, logits, loss = teacher_force(model, tokens, wanted, case.inputs["valid"].float())
        length = args["cls_token_num"]
        case.compare("train_mask_rowsum", text_mask(wanted.mask, n).sum(-1))
        for name, output in first.items():
            case.compare(f"train_{name}_tail", output[:, length - 8 :])
        case.compare("cap_proj", model.condition(wanted)[:, -6:])
        null = model.null_condition(wanted[:1])
        case.compare("uncond_proj", model.condition(null)[:, :6])
        both = model.with_null(wanted)
        plan = model.plan()
        state = model.new_state(len(both), plan)
        with torch.inference_mode():
            hidden = {}
            handle = model.blocks[-1].register_forward_hook(lambda m, i, o: hidden.update(x=o))
            model.step(tokens.repeat(2, 1), both, plan.passes[0], state)
            handle.remove()
            prefill = model.head.logits(model.norm(hidden["x"][:, -3:]))
            case.compare("prefill_logits_tail", prefill)
            step = model.step(tokens.repeat(2, 1), both, plan.passes[1], state)
            case.compare("step1_logits", model.head.logits(step))
        unmasked = Captions(wanted.features, torch.ones_like(wanted.mask))
        case.compare("greedy_nomask", greedy(model, unmasked, cfg))
    case.compare("train_logits", logits)
    case.compare("train_loss", loss)
    case.compare("greedy_cfg", greedy(model, wanted, cfg))
    case.compare("greedy_nocfg", greedy(model, wanted))
    scales = interval_scales(
        model.plan(), cfg, case.config.get("cfg_interval", -1), lambda t, plan: t - 1
    )
    case.compare("greedy_cfg_interval", greedy(model, wanted, scales))
    case.finish(UNCOMPARED)


def last_logits(model, tokens, labels):
    """Logits after all N tokens, which no pass needs: by one more row."""
    rows = model.plan().training
    x = torch.cat([model.embed(tokens, labels, rows), model.token_embedding(tokens[:, -1:])], dim=1)
    rotary = torch.cat([model.rotary_rows(rows), model.rotary[:, -1:]], dim=1)
    hidden = model.transformer(x, rotary, is_causal=True)
    return model.head.logits(model.norm(hidden[:, -1]))


def text_mask(real, n):
    """Which rows each row of a caption and n tokens sees."""
    rows = real.shape[1] + n
    visible = F.pad(real, (0, n), value=True)[:, None]
    mask = torch.ones(rows, rows, dtype=torch.bool).tril()
    return (mask & visible) | torch.eye(rows, dtype=torch.bool)


# ------------------------------------------------------------------------------------------ PAR


@pytest.mark.parametrize("folder", cases("par"))
def test_par(folder):
    case = Case(folder)
    args = case.config["model_args"]
    n, regions = args["block_size"], args["ar_token_num"]
    model = load(case, square(n))
    plan, tokens, labels = model.plan(), case.inputs["tokens"], case.inputs["labels"]
    order = torch.cat([fed.predict for fed in plan.passes])
    case.compare("order", order)
    case.compare("inverse", order.argsort())
    case.compare("tokens_reordered", tokens[:, order])

    rows, fed = plan.training, sequence_rows(model)
    count = rows.rows
    assert count == n  # they feed the last group, too, which no row before it sees
    case.compare("freqs_cis", rotary_pairs(model, rows)[fed], lambda t: t[:count])
    case.compare("train_mask", rows.mask[fed][:, fed], lambda t: t[:count, :count])
    first, logits, loss = teacher_force(model, tokens, labels)
    for name, output in first.items():
        case.compare(f"train_{name}", output[:, fed], lambda t: t[:, :count])
    case.compare("train_logits", logits[:, order])
    case.compare("train_loss", loss)
    cached = cached_logits(model, tokens.repeat(2, 1), model.with_null(labels))
    case.compare("cached_logits", cached)
    cond, null = cached.chunk(2)
    cfg = case.config["cfg_scale"]
    case.compare("cfg_logits", null + cfg * (cond - null))

    case.compare("forward_count", torch.tensor([len(plan)]))
    lengths = torch.tensor([step.rows for step in plan.passes])
    case.compare("forward_lengths", lengths)
    case.compare("forward_first_pos", lengths.cumsum(0) - lengths)

    def counted(t, plan):  # from 0 in the first tokens, and from 0 again in the groups
        return t - 1 if t < regions else (t - regions) * regions

    wanted = case.inputs["gen_labels"]
    runs = {
        "greedy_cfg": cfg,
        "greedy_nocfg": 1.0,
        "greedy_cfg_interval": interval_scales(
            plan, cfg, case.config.get("cfg_interval", -1), counted
        ),
    }
    for name, scales in runs.items():
        ids = greedy(model, wanted, scales)
        case.compare(f"{name}_raster", ids)
        case.compare(name, ids[:, order])
    case.finish(UNCOMPARED)


# ------------------------------------------------------------------------------------------ NAR


def is_transformer(description):
    return "larp_tokenizer" not in str(description["config"].get("class"))


@pytest.mark.parametrize("folder", cases("nar", is_transformer))
def test_nar(folder):
    case = Case(folder)
    config = case.config
    is_video = "latent_shape" in config
    shape = tuple(config["latent_shape"]) if is_video else square(config["block_size"])
    extra = config["attn_num_back"] if is_video else config["medusa_attention_num"]
    model = load(case, shape, extra_depth=extra)
    names = "RDB" if is_video else ("right", "below")
    condition, weight = condition_of(case), case.inputs.get("valid")
    if is_video:
        condition = torch.where(condition < 0, config["num_classes"], condition)
    plan, tokens = model.plan(), case.inputs["tokens"]
    rows, n, length = plan.training, model.spec.num_tokens, model.condition.rows

    # Rows in raster order; theirs hold the last token, too, which no pass reads.
    raster = torch.cat([torch.arange(length), length + rows.tokens.argsort()])
    kept = torch.cat([torch.arange(length), length + rows.tokens.sort().values])
    if is_video:
        table = model.position_table
        case.compare("abs_pe", table)
    else:
        case.compare("rope_table", rotary_pairs(model, rows)[raster], lambda t: t[kept])
    mask = rows.mask[raster][:, raster].expand(len(tokens), -1, -1)
    if isinstance(condition, Captions):
        visible = F.pad(condition.mask, (0, rows.rows - length), value=True)[:, None]
        mask = (mask & visible) | torch.eye(rows.rows, dtype=torch.bool)
    for name in ("train", *(f"gen.{run}" for run in case.description["generation"])):
        case.compare(f"{name}.mask", mask, lambda t: t[:, kept][:, :, kept])
    embedded = model.embed(tokens, condition, rows)[:, raster]
    case.compare("train.embedded", embedded, lambda t: t[:, kept])

    blocks = []
    handles = [
        block.register_forward_hook(lambda m, i, o: blocks.append(o)) for block in model.blocks
    ]
    hidden = model.teacher_forced(tokens.view(-1, *shape), condition)
    for handle in handles:
        handle.remove()
    for i, output in enumerate(blocks):
        case.compare(f"train.block{i:02}", output[:, raster], lambda t: t[:, kept])
    matrices = model.head.linear.weight.chunk(len(model.norm), dim=1)
    for i, (norm, matrix) in enumerate(zip(model.norm, matrices, strict=True)):
        raw = F.linear(norm(blocks[model.tapped[i] - 1]), matrix)[:, raster]
        case.compare(f"train.logits_{names[i]}_raw", raw, lambda t: t[:, kept])
    case.compare("train.logits_mixed", model.head.logits(hidden))
    weight = None if weight is None else weight.float()
    loss = model(tokens.view(-1, *shape), condition, weight).loss
    case.compare("train.loss", loss)
    loss.backward()
    compare_gradients(case, model)

    for name, run in case.description["generation"].items():
        scales = interval_scales(
            plan,
            run["cfg_scale"],
            run.get("cfg_interval", -1),
            lambda t, plan: round(plan.fractions[t] * n) if t else -1,
        )
        stored = case.inputs.get(run.get("uniform", "").removeprefix("in."))
        order = torch.cat([step.predict for step in plan.passes])
        noise = None if stored is None else stored[:, order.argsort()]
        trace = []
        ids = greedy(
            model,
            condition,
            scales,
            trace=trace,
            noise=noise,
            temperature=0 if stored is None else run["temperature"],
            top_k=Corrected(0 if stored is None else run["top_k"]),
            top_p=Corrected(1.0 if stored is None else run["top_p"]),
        )
        for t, logits in enumerate(guided_logits(model, trace, len(condition), scales)):
            case.compare(f"gen.{name}.step{t:02}.logits", logits)
        case.compare(f"gen.{name}.tokens", ids)
    case.finish(UNCOMPARED)


def compare_gradients(case, model):
    """Gradients under the official names, through the renaming of the importer."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    heads = HEADS[len(model.norm)]
    shares = gradients["head.linear.weight"].chunk(len(heads), dim=1)
    for i, (norm, output) in enumerate(heads):
        gradients[f"{norm}.weight"] = gradients[f"norm.{i}.weight"]
        gradients[f"{output}.weight"] = shares[i]
    for name in [n for n in gradients if n.endswith(".gate_value.weight")]:
        for w, half in zip(("w1", "w3"), gradients[name].chunk(2), strict=True):
            gradients[name.replace("gate_value", w)] = half
    for name in case.weights:
        if f"train.grad.{name}" in case.expected:
            (ours,) = rename({name: torch.empty(0)}, RULES, name)
            case.compare(f"train.grad.{name}", gradients[ours])


# ---------------------------------------------------------------------------------------- ZipAR


@pytest.mark.parametrize("folder", cases("zipar"))
def test_zipar(folder):
    case = Case(folder)
    side = case.description["grid"]
    model = load(case, (side, side))
    labels = condition_of(case)
    for name, run in case.config["runs"].items():
        cfg, interval = run["cfg_scale"], run.get("cfg_interval", -1)

        def counted(t, plan):  # in row 0 as raster decoding; then tokens of the rows below, from 0
            if t < side:
                return t - 1
            return round(plan.fractions[t] * side * side) - side

        raster = model.plan()
        ids = greedy(model, labels, interval_scales(raster, cfg, interval, lambda t, _: t - 1))
        case.compare(f"{name}.raster", ids)
        case.compare(f"{name}.raster_forwards", torch.tensor([len(raster)]))
        for wide in (side, side + 3):
            order = Order(f"zipar({wide})")
            assert len(model.plan(order)) == side * side
            assert torch.equal(greedy(model, labels, cfg, order), greedy(model, labels, cfg))
        for window in case.config["windows"]:
            order = Order(f"zipar({window})")
            plan = model.plan(order)
            scales = interval_scales(plan, cfg, interval, counted)
            trace = []
            key = f"{name}.w{window}"
            case.compare(key, greedy(model, labels, scales, order, trace))
            case.compare(f"{key}.forwards", torch.tensor([len(plan)]))
            case.compare(f"{key}.trace_len", torch.tensor([len(f.tokens) for _, f, _ in trace]))
            widest = max(len(f.tokens) for _, f, _ in trace)
            padded = [F.pad(t[0], (0, widest - t.shape[1]), value=-1) for t, _, _ in trace]
            case.compare(f"{key}.trace_tok", torch.stack(padded))
            slots = [model.condition.rows + f.cells for _, f, _ in trace]
            padded = [F.pad(s, (0, widest - len(s)), value=-1) for s in slots]
            case.compare(f"{key}.trace_pos", torch.stack(padded))
            logits = torch.cat(guided_logits(model, trace, len(labels), scales), dim=1)
            case.compare(f"{key}.logits", logits[:, : case.config.get("logits_keep")])
    case.finish(UNCOMPARED)
