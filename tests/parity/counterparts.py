"""Our counterparts of official quantizers, and their names, losses and ids of ours."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from vistok.losses.entropy import assignment_entropies
from vistok.quantizers import (
    BSQ,
    EMAVQ,
    FSQ,
    IBQ,
    LFQ,
    VQ,
    NormEMAVQ,
    Product,
    Projected,
    Quantized,
    Quantizer,
    Residual,
    ResidualFSQ,
    ResidualLFQ,
    SimVQ,
    reverse_bits,
)

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
    and latents, `ids` the official ids of ours. `begins` says that the codebook is made by k-means
    before anything else. `layers` is the number of layers that training is to use, if not all.
    """

    quantizer: Quantizer
    names: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    terms: Callable[[Quantized, Tensor], dict[str, Tensor]] = lambda result, latents: {}
    begins: bool = False
    ids: Callable[[Tensor], Tensor] = lambda ids: ids
    layers: int | None = None

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
        "ResidualVQ": residual_vq,
        "GroupedResidualVQ": grouped_residual_vq,
        "FSQ": fsq,
        "ResidualFSQ": residual_fsq,
        "LFQ": lfq,
        "ResidualLFQ": residual_lfq,
        "seed.LFQ": open_magvit2,
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
    dim, heads = args.pop("dim"), args.pop("heads", 1)
    shared = not args.pop("separate_codebook_per_head", False)
    common = {
        "dim": args.pop("codebook_dim", dim),
        "l2_normalise": args.pop("use_cosine_sim", False),
        "rotation": args.pop("rotation_trick", True),
    }
    if args.pop("learnable_codebook", False):
        args.pop("ema_update", False)
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
            smoothing=args.pop("eps", 1e-5),
            expiry=float(args.pop("threshold_ema_dead_code", 0)),
            kmeans=kmeans if args.pop("kmeans_init", False) else 0,
            **common,
        )
        weights, names = {"commitment": weight}, LUCIDRAINS_EMA
    begins = getattr(quantizer, "kmeans", 0) > 0
    if heads > 1:
        quantizer = Product(quantizer, heads, shared)
    tables = [""] if heads == 1 else [f"quantizers.{i}." for i in range(1 if shared else heads)]
    names = {official: tuple(t + ours for t in tables) for official, ours in names.items()}

    def terms(result: Quantized, latents: Tensor) -> dict[str, Tensor]:
        found = dict.fromkeys(("commitment", "diversity", "orthogonal"), torch.zeros(()))
        for name, value in weights.items():
            if value:
                found["commitment" if name == "joint" else name] = result.losses[name] / value
        return found | {"loss": sum(result.losses.values())}

    return projected(Counterpart(quantizer, names, terms, begins), dim)


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
    if not args.get("kmeans_init"):
        args.pop("kmeans_init", None)
    quantizer = NormEMAVQ(
        args.pop("n_embed"),
        args.pop("embedding_dim"),
        commitment=args.pop("beta"),
        decay=args.pop("decay", 0.99),
    )
    return Counterpart(quantizer, {"embedding.weight": "codebook", "cluster_size": "counts"}, total)


def residual_vq(args: dict) -> Counterpart:
    dim, layers = args.pop("dim"), args.pop("num_quantizers")
    used, shared = layers_used(args, layers), args.pop("shared_codebook", False)
    args["dim"] = args.pop("codebook_dim", dim)
    one = vector_quantize(args)
    quantizer = Residual(one.quantizer, layers, shared)
    names = {
        f"layers.{k}.{official}": prefixed(ours, f"quantizers.{0 if shared else k}.")
        for k in range(layers)
        for official, ours in one.names.items()
    }
    return projected(
        Counterpart(quantizer, names, terms_of_layers(quantizer, used), layers=used), dim
    )


def grouped_residual_vq(args: dict) -> Counterpart:
    """The official loss is a sum over groups, where ours is a mean."""
    groups = args.pop("groups")
    args["commitment_weight"] = groups * args.get("commitment_weight", 1)
    args["dim"] //= groups
    one = residual_vq(args)
    quantizer = Product(one.quantizer, groups)
    names = {
        f"rvqs.{g}.{official}": prefixed(ours, f"quantizers.{g}.")
        for g in range(groups)
        for official, ours in one.names.items()
    }
    return Counterpart(
        quantizer,
        names,
        terms_of_layers(quantizer, one.layers),
        ids=lambda ids: ids.unflatten(-1, (groups, -1)).movedim(-2, 0),
        layers=one.layers,
    )


def fsq(args: dict) -> Counterpart:
    layout(args)
    quantizer = FSQ(args.pop("levels"), args.pop("preserve_symmetry", False))
    return of_codebooks(Counterpart(quantizer), args)


def residual_fsq(args: dict) -> Counterpart:
    layers = args.pop("num_quantizers")
    quantizer = ResidualFSQ(args.pop("levels"), layers)
    return projected(
        Counterpart(quantizer, layers=layers_used(args, layers)), args.pop("dim", quantizer.dim)
    )


def lfq(args: dict) -> Counterpart:
    layout(args)
    bits, options = binary(args)
    spherical = args.pop("spherical", False)
    one = BSQ(bits, bitwise=False, **options) if spherical else LFQ(bits, **options)
    made = of_codebooks(Counterpart(one, ids=lambda ids: reverse_bits(ids, bits)), args)

    def terms(result: Quantized, latents: Tensor) -> dict[str, Tensor]:
        codebooks = parts(made.quantizer, latents)
        found = [codebook.entropies(its) for codebook, its in codebooks]
        of_each, of_mean = (sum(column) / len(found) for column in zip(*found, strict=True))
        return {
            "per_sample_entropy": of_each,
            "batch_entropy": of_mean,
            "commitment": unweighted(result, "commitment", options["commitment"]),
            "aux": sum(result.losses.values()),
        }

    return replace(made, terms=terms)


def residual_lfq(args: dict) -> Counterpart:
    dim, layers = args.pop("dim"), args.pop("num_quantizers")
    used = layers_used(args, layers)
    bits, options = binary(args)
    quantizer = ResidualLFQ(bits, layers, **options)
    terms = terms_of_layers(quantizer, used)
    order = partial(reverse_bits, bits=bits)
    return projected(Counterpart(quantizer, {}, terms, ids=order, layers=used), dim)


def open_magvit2(args: dict) -> Counterpart:
    """The weights of the losses are those of the procedure, within the entropy those of the
    arguments."""
    of_sample = args.pop("sample_minimization_weight", 1.0)
    of_batch = args.pop("batch_maximization_weight", 1.0)
    factors = args.pop("factorized_bits", None)
    quantizer = LFQ(
        args.pop("codebook_size").bit_length() - 1,
        entropy=0.1 * of_sample,
        gamma=of_batch / of_sample,
        commitment=0.25,
        factors=factors if args.pop("token_factorization", False) else None,
    )
    args.pop("dim")

    def terms(result: Quantized, latents: Tensor) -> dict[str, Tensor]:
        of_each, of_mean = quantizer.entropies(latents)
        return {
            "per_sample_entropy": of_each,
            "codebook_entropy": of_mean,
            "entropy": result.losses["entropy"] / 0.1,
            "commitment": result.losses["commitment"] / 0.25,
        }

    return Counterpart(quantizer, terms=terms)


def binary(args: dict) -> tuple[int, dict[str, float | bool]]:
    """Return the bits of a code, and arguments of `LFQ`."""
    options = {
        "entropy": float(args.pop("entropy_loss_weight", 0.1)),
        "gamma": float(args.pop("diversity_gamma", 1)),
        "commitment": float(args.pop("commitment_loss_weight", 0)),
        "temperature": 1 / args.pop("inv_temperature", 100.0),
        "clamped": True,
    }
    return args.pop("codebook_size").bit_length() - 1, options


def of_codebooks(one: Counterpart, args: dict) -> Counterpart:
    """Return several codebooks side by side, none of which has weights."""
    count = args.pop("num_codebooks", 1)
    if count > 1:
        one = replace(one, quantizer=Product(one.quantizer, count))
    return projected(one, args.pop("dim", one.quantizer.dim))


def projected(made: Counterpart, dim: int) -> Counterpart:
    """Return what codes latents of `dim` channels, projected if need be."""
    if made.quantizer.dim == dim:
        return made
    quantizer = Projected(made.quantizer, dim)
    names = {official: prefixed(ours, "quantizer.") for official, ours in made.names.items()}
    names |= {name: name for name in quantizer.state_dict() if name.startswith("project_")}

    def terms(result: Quantized, latents: Tensor) -> dict[str, Tensor]:
        return made.terms(result, quantizer.project_in(latents))

    return replace(made, quantizer=quantizer, names=names, terms=terms)


def prefixed(ours: str | tuple[str, ...], prefix: str) -> str | tuple[str, ...]:
    return prefix + ours if isinstance(ours, str) else tuple(prefix + name for name in ours)


def layers_used(args: dict, layers: int) -> int | None:
    """Return how many layers the seed of the call keeps, if it drops any."""
    least = args.pop("quantize_dropout_cutoff_index", 0)
    if not args.pop("quantize_dropout", False):
        return None
    seed = args.pop("rand_quantize_dropout_fixed_seed")
    return 1 + random.Random(seed).randrange(least, layers)


def terms_of_layers(quantizer: Quantizer, used: int | None = None):
    """Return what makes the loss of each layer, group by group, 0 where it is not used."""

    def terms(result: Quantized, latents: Tensor) -> dict[str, Tensor]:
        groups = parts(quantizer, latents)
        residuals = [residual for group in groups for residual in parts(*group)]
        losses = [
            sum(layer(left).losses.values()) * (used is None or k < used) / len(groups)
            for residual, its in residuals
            for k, (layer, left, _) in enumerate(residual.walk(its))
        ]
        return {"loss": torch.stack(losses)}

    return terms


def parts(quantizer: Quantizer, latents: Tensor) -> list[tuple[Quantizer, Tensor]]:
    """Return each quantizer of the pieces of latents with these."""
    if isinstance(quantizer, Projected):
        return parts(quantizer.quantizer, quantizer.project_in(latents))
    if isinstance(quantizer, Product):
        pieces = latents.split(quantizer.dims, dim=-1)
        return list(zip(quantizer.each, pieces, strict=True))
    return [(quantizer, latents)]


def unweighted(result: Quantized, name: str, weight: float) -> Tensor:
    return result.losses[name] / weight if weight else torch.zeros(())


def layout(args: dict) -> None:
    """Drop what only says where the channels are."""
    for name in ("accept_image_fmap", "channel_first", "channel_last"):
        args.pop(name, None)


def same_names(quantizer: Quantizer) -> dict[str, str]:
    return {name: name for name in quantizer.state_dict()}


def total(result: Quantized, latents: Tensor) -> dict[str, Tensor]:
    return {"loss": sum(result.losses.values())}
