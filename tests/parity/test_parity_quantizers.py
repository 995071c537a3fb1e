"""Our quantizers against the numbers of the official ones."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from official import Case, cases
from torch import Tensor

from vistok.losses.entropy import assignment_entropies
from vistok.quantizers import EMAVQ, FSQ, IBQ, VQ, NormEMAVQ, Quantized, Quantizer, SimVQ

LUCIDRAINS_EMA = {
    "_codebook.embed": "codebook",
    "_codebook.embed_avg": "sums",
    "_codebook.cluster_size": "counts",
}


@dataclass
class Counterpart:
    """Our quantizer in the place of an official one.

    `names` are ours of the official tensors: one, or of official tensors that are stacks of those
    of several heads a tuple; others are dropped. `terms` makes the official loss terms of a result
    and latents. `begins` says that the codebook is made by k-means before anything else.
    """

    quantizer: Quantizer
    names: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    terms: Callable[[Quantized, Tensor], dict[str, Tensor]] = lambda result, latents: {}
    begins: bool = False

    def load(self, weights: dict[str, Tensor]) -> None:
        state = self.quantizer.state_dict()
        for official, value in weights.items():
            for ours, part in self._ours(official, value):
                state[ours] = part.reshape(state[ours].shape)
        self.quantizer.load_state_dict(state)

    def official(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return some of our tensors under the official names."""
        named = {}
        for official, ours in self.names.items():
            several = (ours,) if isinstance(ours, str) else ours
            parts = [found[name] for name in several if name in found]
            if parts:
                named[official] = parts[0] if isinstance(ours, str) else torch.stack(parts)
        return named

    def _ours(self, official: str, value: Tensor) -> list[tuple[str, Tensor]]:
        ours = self.names.get(official, ())
        if isinstance(ours, str):
            return [(ours, value)]
        return list(zip(ours, value, strict=True)) if ours else []


def build(kind: str, args: dict) -> Counterpart | None:
    """Return our counterpart of an official quantizer, or None."""
    args = dict(args)
    made = {
        "VectorQuantize": vector_quantize,
        "SimVQ": sim_vq,
        "FSQ": fsq,
        "seed.VectorQuantizer": taming,
        "seed.VectorQuantizer2": taming,
        "seed.IndexPropagationQuantize": ibq,
        "beit2.NormEMAVectorQuantizer": norm_ema,
    }.get(kind, lambda _: None)(args)
    # What is left of the arguments would change what we do not know of.
    return made if not args else None


def vector_quantize(args: dict) -> Counterpart:
    layout(args)
    size, weight = args.pop("codebook_size"), float(args.pop("commitment_weight", 1))
    common = {
        "dim": args.pop("dim"),
        "l2_normalise": args.pop("use_cosine_sim", False),
        "rotation": args.pop("rotation_trick", True),
    }
    if args.pop("learnable_codebook", False):
        args.pop("ema_update")
        orthogonal = float(args.pop("orthogonal_reg_weight", 0))
        diversity = float(args.pop("codebook_diversity_loss_weight", 0))
        sharpness = args.pop("codebook_diversity_temperature", 100.0)
        quantizer = VQ(
            size,
            commitment=0.0,
            codebook_weight=0.0,
            joint=weight,
            orthogonal=orthogonal,
            diversity=diversity,
            diversity_temperature=1 / sharpness,
            **common,
        )
        weights = {"joint": weight, "orthogonal": orthogonal, "diversity": diversity}
        names = {"_codebook.embed": "embedding.weight"}
    else:
        kmeans = args.pop("kmeans_iters", 10)
        quantizer = EMAVQ(
            size,
            commitment=weight,
            decay=args.pop("decay", 0.8),
            expiry=float(args.pop("threshold_ema_dead_code", 0)),
            kmeans=kmeans if args.pop("kmeans_init", False) else 0,
            **common,
        )
        weights, names = {"commitment": weight}, LUCIDRAINS_EMA
    names = {official: (ours,) for official, ours in names.items()}

    def terms(result: Quantized, latents: Tensor) -> dict[str, Tensor]:
        found = dict.fromkeys(("commitment", "diversity", "orthogonal"), torch.zeros(()))
        for name, value in weights.items():
            if value:
                found["commitment" if name == "joint" else name] = result.losses[name] / value
        return found | {"loss": sum(result.losses.values())}

    return Counterpart(quantizer, names, terms, begins=getattr(quantizer, "kmeans", 0) > 0)


def sim_vq(args: dict) -> Counterpart:
    layout(args)
    weight = float(args.pop("commitment_weight", 1))
    quantizer = SimVQ(
        args.pop("codebook_size"),
        args.pop("dim"),
        args.pop("frozen_codebook_dim", None),
        commitment=weight * args.pop("input_to_quantize_commit_loss_weight", 0.25),
        codebook_weight=weight,
        rotation=args.pop("rotation_trick", True),
    )
    return Counterpart(quantizer, same_names(quantizer), total)


def taming(args: dict) -> Counterpart:
    """The codebook's term, not the commitment, has the weight beta in the legacy form, which is
    the default; normalisation is for the search alone."""
    weights = (1.0, args.pop("beta"))
    commitment, codebook = weights if args.pop("legacy", True) else weights[::-1]
    quantizer = VQ(
        args.pop("n_e"),
        args.pop("e_dim"),
        l2_normalise="search" if args.pop("l2_normalize", False) else False,
        commitment=commitment,
        codebook_weight=codebook,
    )
    return Counterpart(quantizer, same_names(quantizer), total)


def ibq(args: dict) -> Counterpart:
    temperature = args.pop("entropy_temperature", 0.01)
    weight = 0.05 if args.pop("use_entropy_loss", False) else 0.0
    quantizer = IBQ(
        args.pop("n_e"),
        args.pop("e_dim"),
        codebook_weight=args.pop("beta"),
        entropy=weight,
        entropy_temperature=temperature,
    )

    def terms(result: Quantized, latents: Tensor) -> dict[str, Tensor]:
        losses = dict(result.losses)
        entropy = losses.pop("entropy", torch.zeros(()))
        logits = latents @ quantizer.embedding.weight.T / temperature
        of_each, of_mean = assignment_entropies(logits)
        found = {"quant_loss": sum(losses.values())}
        if weight:
            found |= {"sample_entropy": of_each, "avg_entropy": of_mean}
            found["entropy_loss"] = entropy / weight
        return found

    return Counterpart(quantizer, same_names(quantizer), terms)


def norm_ema(args: dict) -> Counterpart:
    args.pop("kmeans_init")
    quantizer = NormEMAVQ(
        args.pop("n_embed"),
        args.pop("embedding_dim"),
        commitment=args.pop("beta"),
        decay=args.pop("decay", 0.99),
    )
    return Counterpart(quantizer, {"embedding.weight": "codebook", "cluster_size": "counts"}, total)


def fsq(args: dict) -> Counterpart:
    return Counterpart(FSQ(args.pop("levels")))


def layout(args: dict) -> None:
    """Drop what only says where the channels are."""
    for name in ("accept_image_fmap", "channel_first", "channel_last"):
        args.pop(name, None)


def same_names(quantizer: Quantizer) -> dict[str, str]:
    return {name: name for name in quantizer.state_dict()}


def total(result: Quantized, latents: Tensor) -> dict[str, Tensor]:
    return {"loss": sum(result.losses.values())}


def variants():
    for case in cases("quantizers"):
        for name in Case(case.values[0]).config["variants"] if case.values[0] else ["none"]:
            yield pytest.param(*case.values, name, id=f"{case.id}-{name}", marks=case.marks)


@pytest.mark.parametrize(("folder", "name"), variants())
def test_quantizer(folder, name):
    case = Case(folder)
    variant = case.config["variants"][name]
    counterpart = build(variant["kind"], variant["args"])
    assert counterpart is not None, f"no counterpart of {variant['kind']}({variant['args']})"
    inputs, weights, expected = (
        {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        for tensors in (case.inputs, case.weights, case.expected)
    )
    computed = run(counterpart, variant, inputs, weights)
    case.left = {f"{name}.{key}" for key in expected}
    for key, ours in computed.items():
        theirs = expected.get(key)
        if theirs is not None and channels_first(variant) and theirs.ndim == 4:
            ours = ours.movedim(-1, 1)
        case.compare(f"{name}.{key}", ours)
    case.finish({})


def channels_first(variant: dict) -> bool:
    return len(variant["x"]) == 4


def run(
    counterpart: Counterpart, variant: dict, inputs: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return our outputs by their names: in evaluation, in training, after further steps."""
    quantizer, computed = counterpart.quantizer, {}
    inputs = {
        key: x.movedim(1, -1) if x.ndim == 4 and channels_first(variant) else x
        for key, x in inputs.items()
    }
    latents, drawn = inputs["x"].contiguous().requires_grad_(), {}
    if "perm" in inputs:
        drawn = {"order": inputs["perm"]}
    counterpart.load(weights)
    if counterpart.begins:
        quantizer.begin(latents, **drawn)

    evaluated = quantizer.eval()(latents)
    computed |= {"eval.ids": evaluated.ids, "eval.quant": evaluated.quantised}
    computed["decode"] = quantizer.decode(evaluated.ids)

    result = quantizer.train()(latents)
    computed |= {"train.ids": result.ids, "train.quant": result.quantised}
    terms = counterpart.terms(result, latents)
    computed |= {f"train.{term}": value for term, value in terms.items()}
    ((result.quantised * inputs["upstream"]).sum() + sum(result.losses.values())).backward()
    computed["train.grad_x"] = latents.grad
    gradients = {k: p.grad for k, p in quantizer.named_parameters() if p.grad is not None}
    computed |= {f"train.grad.{k}": grad for k, grad in counterpart.official(gradients).items()}

    quantizer.update(latents.detach(), **drawn)
    for step in range(1, variant.get("steps", 1)):
        further = inputs[f"x{step}"]
        computed[f"step{step}.ids"] = quantizer(further).ids
        quantizer.update(further, **drawn)
    state = counterpart.official(quantizer.state_dict())
    return computed | {f"state.{name}": value for name, value in state.items()}
