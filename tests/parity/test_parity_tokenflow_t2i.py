"""TokenFlow's generator of images from text against its official network, losses and sampler."""

import pytest
import torch
import torch.nn.functional as F
from official import Case, cases

from vistok.checkpoints.tokenflow import codebook
from vistok.checkpoints.tokenflow_t2i import generator
from vistok.decoding import Corrected, Decoding, Noise, Order, Schedule, decode
from vistok.decoding.sampling import Sampling, probabilities
from vistok.generators import NextScaleLlama, Prompts
from vistok.generators.llamagen import hide_padding
from vistok.generators.tokenflow import joined
from vistok.quantizers import DualVQ, MultiScale

UNCOMPARED = {"*.min_margin": "informative: how close the greedy choices were"}
TOKENIZER = "vq_model."  # which is published in a file of its own


def kind(name: str):
    return lambda description: name in description["config"]


def load(case: Case) -> NextScaleLlama:
    given, config = case.inputs, case.config
    sizes, llm, start = config["vq"], config["llm"], config["img_start_ids"]
    codes = MultiScale(
        DualVQ(sizes["n_e"], *sizes["split"]), sizes["scales"], smoothers=0, jointly=False
    )
    table = codebook(case.weights, f"{TOKENIZER}quantize.")
    codes.quantizer.load_state_dict({"embedding.weight": table})
    image = config["prefix_len"] + given["codes"].shape[1]
    null = given["prefix_ids"][-1, : -len(start)]
    return generator(
        {name: w for name, w in case.weights.items() if not name.startswith(TOKENIZER)},
        codes,
        config["prefix_len"] - len(start),
        start_ids=start,
        end_ids=given["input_ids"][0, image:].tolist(),
        null_ids=null[null != llm["pad_id"]].tolist(),
        norm_eps=llm["rms_eps"],
        rope_base=llm["rope_theta"],
    ).eval()


def prompts_of(case: Case, ids: torch.Tensor) -> Prompts:
    """The prompts of rows that begin with them; the model adds what follows them."""
    ids = ids[:, : case.config["prefix_len"] - len(case.config["img_start_ids"])]
    return Prompts(ids, ids != case.config["llm"]["pad_id"])


@pytest.mark.parametrize("folder", cases("tokenflow", kind("llm")))
@torch.inference_mode()
def test_text_to_image(folder):
    case = Case(folder)
    model, given, config = load(case), case.inputs, case.config
    codes = given["codes"]
    compare_inputs(case, model, codes)
    compare_training(case, model, codes, prompts_of(case, given["input_ids"]))
    prompts = prompts_of(case, given["prefix_ids"][: config["batch"]])
    for run in config["sampling"]:
        compare_sampling(case, model, prompts, **run)
    for i, (top_k, top_p) in enumerate(config["filters"]):
        drawn = probabilities(given["filter_logits"], Sampling(top_k=top_k, top_p=top_p or 1.0))
        case.compare(f"filter{i}.probs", drawn)
    case.finish(UNCOMPARED)


def compare_inputs(case: Case, model: NextScaleLlama, codes: torch.Tensor) -> None:
    """What the rows of scales are fed, in the first pass of each and in a correction."""
    case.compare("final_feature_map", model.codes.decode(codes).permute(0, 3, 1, 2))
    case.compare("tower_features", model.told(codes))
    plan, told = model.plan(Order("next_scale(1)")), []
    state = model.new_state(len(codes), plan)
    corrected = 1 + case.config["repredict_index"]
    for fed in plan.passes[1:]:
        vectors = model.next_told(codes[:, fed.tokens], fed, state)
        if fed.correction == (fed.rank[0] == corrected):
            told.append(vectors)
    case.compare("tower_features_repredict", torch.cat(told, dim=1))


def compare_training(case, model, codes, prompts) -> None:
    given, ends = case.inputs, len(model.end_ids)
    rows = joined(model.sizes, model.condition.rows, ends, codes.device)
    x = model.embed(codes, prompts, ends)
    case.compare("train.embeds", x)
    real = model.condition.real_rows(prompts)
    visible = hide_padding(rows.mask, real, rows.rows, model.condition.rows)
    padding = F.pad(~real, (0, rows.rows - real.shape[1]))
    visible = visible & ~padding[:, None, :, None]  # where rows see themselves, so as not to fail
    case.compare("train.mask_visible", visible)

    n = codes.shape[1]
    logits = model.joint_logits(model.teacher_forced(codes, prompts, ends))
    case.compare("train.logits_image", logits[:, :n])
    case.compare("train.logits_after", logits[:, n:], part=lambda theirs: theirs[:, :-1])
    case.compare("train.loss_vision", model(codes, prompts).loss)

    # The loss of the prompt, which is logged and not trained on. Its first id is predicted from
    # padding, to which the official mask, finite, lets all rows look alike.
    lowest = torch.finfo(x.dtype).min
    mask = torch.zeros(visible.shape).masked_fill(~visible, lowest)
    hidden = model.norm(model.transformer(x, model.rotary, mask=mask))
    logits = model.joint_logits(hidden[:, :-1]).transpose(1, 2)
    loss = F.cross_entropy(logits, given["text_labels"][:, 1:], ignore_index=-100)
    case.compare("train.loss_text", loss)


def compare_sampling(case, model, prompts, name: str, cfg: float, loops: int) -> None:
    decoding = Decoding(
        Order(f"next_scale({loops - 1})"),
        guidance=Schedule(f"linear(1,{1 + cfg})"),
        top_k=Corrected(1),
    )
    plan, calls, batch = decoding.plan_of(model), [], len(prompts)
    step = model.step
    model.step = lambda *args: calls.append(step(*args)) or calls[-1]
    after = []
    tokens = decode(
        model,
        prompts,
        Noise(0, range(batch)),
        decoding,
        on_pass=lambda t, tokens: after.append(tokens[:, plan.passes[t].predict]),
    )
    model.step = step
    case.compare(f"{name}.codes", tokens)
    case.compare(f"{name}.calls", torch.tensor([len(calls)]))
    for i, (hidden, scale) in enumerate(zip(calls, decoding.scales(plan), strict=True)):
        logits = model.head.guided_logits(hidden[:batch], hidden[batch:], scale)
        case.compare(f"{name}.call{i}.logits", logits)
        case.compare(f"{name}.call{i}.ids", after[i])
