"""MAR (Li et al., 2024, arXiv:2406.11838) and what keeps its layout: DiSA (Zhao et al., 2025,
arXiv:2505.20297), which only draws in other steps, and heads that are saved alone."""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch

from vistok.checkpoints.files import Weights, load, rename
from vistok.checkpoints.llamagen import names_of
from vistok.checkpoints.llamagen_vq import count_of
from vistok.errors import CheckpointError
from vistok.generators import MAR
from vistok.generators.mar import TABLES
from vistok.heads import DiffusionHead, ValueHead
from vistok.tokens import TokenSpec

ENTRIES = ("model_ema", "model")  # of a published file: averaged weights where it has them
TRUNK_RULES = (
    (r"^(encoder|decoder)_pos_embed_learned$", r"\1_position"),
    (r"^(diffusion_pos_embed_learned|output_pos_embed)$", "output_position"),
    (r"^z_proj\.", "encoder_embed."),
    (r"^z_proj_ln\.", "embed_norm."),
    (r"(coder_blocks\.\d+)\.norm([12])\.", r"\1.ln_\2."),
    (r"(coder_blocks\.\d+)\.attn\.qkv\.", r"\1.attn.in_proj."),
    (r"(coder_blocks\.\d+)\.attn\.proj\.", r"\1.attn.out_proj."),
    (r"(coder_blocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"(coder_blocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
)
# Names of the diffusion head inside a model and, without the first part, alone.
HEAD_RULES = (
    (r"^(diffloss\.)?net\.", "head.net."),
    (r"^(head\.net\.)time_embed\.mlp\.", r"\1time."),
    (r"^(head\.net\.)cond_embed\.", r"\1condition."),
    (r"^(head\.net\.)input_proj\.", r"\1input."),
    (r"^(head\.net\.)final_layer\.linear\.", r"\1output."),
    (r"^(head\.net\.)res_blocks\.(\d+)\.in_ln\.", r"\1blocks.\2.norm."),
    (r"^(head\.net\.)res_blocks\.(\d+)\.mlp\.0\.", r"\1blocks.\2.fc1."),
    (r"^(head\.net\.)res_blocks\.(\d+)\.mlp\.2\.", r"\1blocks.\2.fc2."),
)


def join_modulations(weights: Weights) -> None:
    """Make one matrix of those that modulate the blocks and the output of a renamed head, whose
    scales here have a bias about 1."""
    depth = sum(name.endswith(".norm.weight") for name in weights if name.startswith("head.net."))
    parts = [*(f"res_blocks.{i}" for i in range(depth)), "final_layer"]
    for kind in ("weight", "bias"):
        names = [f"head.net.{part}.adaLN_modulation.1.{kind}" for part in parts]
        weights[f"head.net.modulation.{kind}"] = torch.cat([weights.pop(name) for name in names])
    bias = weights["head.net.modulation.bias"].unflatten(0, (3 * depth + 2, -1))
    bias[1::3] += 1


def new_head(weights: Weights, **training: Any) -> DiffusionHead:
    """Return a head, not yet fitted to a trunk, of the size of renamed weights."""
    width, depth = len(weights["head.net.input.weight"]), 0
    while f"head.net.blocks.{depth}.norm.weight" in weights:
        depth += 1
    return DiffusionHead(width, depth, **training)


def head(weights: Weights, where: str = "weights", **training: Any) -> DiffusionHead:
    """Return the diffusion head that has these weights, its sizes read from their shapes;
    `training` are options of `DiffusionHead` that matter in training alone. Raises
    `CheckpointError` if a tensor is missing, superfluous or of another shape."""
    try:
        weights = rename(weights, HEAD_RULES, where)
        join_modulations(weights)
        hidden_dim = weights["head.net.condition.weight"].shape[1]
        channels = weights["head.net.input.weight"].shape[1]
        fresh = new_head(weights, **training)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{where}: not a diffusion head of MAR ({error})") from error
    model = fresh.fitted(hidden_dim, TokenSpec.latents((1,), channels))
    load(model, rename(weights, [(r"^head\.", "")], where), where)
    return model


def join_trunk(weights: Weights) -> None:
    """Make one table of the classes and the null class of a renamed trunk, and matrices of its
    tables of positions."""
    classes, null = weights.pop("class_emb.weight"), weights.pop("fake_latent")
    weights["condition.weight"] = torch.cat([classes, null])
    for name in (*TABLES, "mask_token"):
        weights[name] = weights[name][0]


def renamed(weights: Weights, where: str = "weights") -> Weights:
    """Return the weights of a published model as `MAR` has them; KeyError where one is missing."""
    weights = rename(weights, (*TRUNK_RULES, *HEAD_RULES), where)
    join_trunk(weights)
    join_modulations(weights)
    return weights


def generator(
    weights: Weights,
    shape: Sequence[int] | None = None,
    num_heads: int = 16,
    decoder_num_heads: int | None = None,
    patch_size: int = 1,
    class_names: Sequence[str] | None = None,
    batch_mul: int = 4,
    where: str = "weights",
    **more: Any,
) -> MAR:
    """Return the model that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        shape: of the tokens; None for the square that the file's tables are of. They are
            interpolated for another grid.
        num_heads, decoder_num_heads: attention heads, which the file does not tell; None for as
            many in the decoder. B has 12.
        patch_size: side of the squares that are one vector, which it does not tell, either.
        class_names: in the order of the labels; None for ImageNet's or numbers.
        batch_mul: of the head, in training.
        where: what errors are about, as the file that was read.
        more: arguments of `MAR` that matter in training alone, and norm_eps.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    try:
        weights = renamed(weights, where)
        head = new_head(weights, batch_mul=batch_mul)
    except (KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{where}: not a MAR ({error})") from error
    heads = {"num_heads": num_heads, "decoder_num_heads": decoder_num_heads}
    more |= {"patch_size": patch_size, **heads}
    return model_of(weights, head, TokenSpec.latents, shape, class_names, where, **more)


def model_of(
    weights: Weights,
    head: ValueHead,
    spec_of: Callable[[tuple[int, ...], int], TokenSpec],
    shape: Sequence[int] | None,
    class_names: Sequence[str] | None,
    where: str,
    num_heads: int,
    decoder_num_heads: int | None,
    patch_size: int = 1,
    **more: Any,
) -> MAR:
    """Return the `MAR` of renamed weights. `spec_of` makes a spec of a shape and the numbers of a
    token; see `generator` for the others."""
    try:
        positions, decoder_dim = weights["output_position"].shape
        dim, values = weights["encoder_embed.weight"].shape
        buffer = len(weights["encoder_position"]) - positions
        hidden_dim = len(weights["encoder_blocks.0.mlp.c_fc.weight"])
        classes = len(weights["condition.weight"]) - 1
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{where}: not a MAR ({error})") from error
    for width, heads in ((dim, num_heads), (decoder_dim, decoder_num_heads or num_heads)):
        if width % heads:
            raise CheckpointError(
                f"{where}: width {width} has not {heads} heads: give num_heads or decoder_num_heads"
            )
    side = isqrt(positions)
    own = (side * patch_size,) * 2 if side**2 == positions else (positions,)
    wanted = tuple(shape or own)
    of_file = own if len(own) == len(wanted) else wanted
    model = MAR(
        spec_of(of_file, values // patch_size**2),
        list(class_names or names_of(classes)),
        head,
        dim=dim,
        depth=count_of(weights, "encoder_blocks.{}.ln_1.weight"),
        num_heads=num_heads,
        decoder_dim=decoder_dim,
        decoder_depth=count_of(weights, "decoder_blocks.{}.ln_1.weight"),
        decoder_num_heads=decoder_num_heads,
        mlp_ratio=hidden_dim / dim,
        buffer=buffer,
        patch_size=patch_size,
        **more,
    )
    load(model, weights, where)
    return model if of_file == wanted else model.resized(wanted)
