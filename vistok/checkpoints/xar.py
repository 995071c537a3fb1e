"""The generators of xAR (Ren et al., 2025, arXiv:2502.20388), whose trunk is that of FlowAR."""

from collections.abc import Sequence
from math import isqrt
from typing import Any

from vistok.checkpoints import flowar
from vistok.checkpoints.files import Weights, load, rename
from vistok.checkpoints.llamagen import names_of
from vistok.errors import CheckpointError
from vistok.generators import XAR
from vistok.tokens import TokenSpec

RULES = (
    (r"^time_embed\.mlp\.", "time_embedding."),
    (r"^pred\.", "output."),
    *flowar.RULES,
)
TABLES = ("trunk.encoder.position", "trunk.decoder.position")


def generator(
    weights: Weights,
    shape: Sequence[int] | None = None,
    order: str = "cells(8)",
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    class_names: Sequence[str] | None = None,
    where: str = "weights",
    **training: Any,
) -> XAR:
    """Return the model that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        shape: of the tokens; None for a square.
        order: the entities, which the file does not tell: published are cells of 8 x 8.
        num_heads: attention heads of the first half; None for what the published buffers tell.
        decoder_num_heads: of the second half; None likewise or, without buffers, for `num_heads`.
        class_names: in the order of the labels; None for ImageNet's or numbers.
        where: what errors are about, as the file that was read.
        training: rates and times of `XAR`, which matter in training alone.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    try:
        dim, channels = weights["z_proj.weight"].shape
        heads = [
            given or flowar.heads_of(weights, f"{half}_blocks.0", dim)
            for half, given in (("encoder", num_heads), ("decoder", decoder_num_heads))
        ]
        weights = rename(weights, RULES, where)
        flowar.join_gates(weights)
        for table in TABLES:
            weights[table] = weights[table][0]
        sizes = {
            "depth": flowar.depth_of(weights, "trunk.encoder.blocks."),
            "decoder_depth": flowar.depth_of(weights, "trunk.decoder.blocks."),
            "hidden_dim": len(weights["trunk.encoder.blocks.0.feed_forward.out.weight"][0]),
        }
        num_classes = len(weights["condition.weight"]) - 1
        shape = tuple(shape or (isqrt(len(weights[TABLES[0]])),) * 2)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where}: not an xAR ({error})") from error
    if heads[0] is None or any(dim % count for count in filter(None, heads)):
        raise CheckpointError(f"{where}: width {dim} has {heads[0]} heads: give num_heads")
    model = XAR(
        TokenSpec.latents(shape, channels),
        list(class_names or names_of(num_classes)),
        order=order,
        dim=dim,
        num_heads=heads[0],
        decoder_num_heads=heads[1],
        **sizes,
        **training,
    )
    # Theirs are in the order of the sequence, ours in that of the grid.
    places = model.plan().joint.tokens.argsort()
    for table in TABLES:
        if len(weights[table]) != len(places):
            raise CheckpointError(
                f"{where}: {len(weights[table])} positions, but {order} of {shape} has "
                f"{len(places)}: give shape"
            )
        weights[table] = weights[table][places]
    load(model, weights, where)
    return model
