"""The generators of FlowAR (Ren et al., 2024, arXiv:2412.15205)."""

from collections.abc import Sequence
from typing import Any

import torch

from vistok.checkpoints.files import Weights, load, rename
from vistok.checkpoints.llamagen import names_of
from vistok.errors import CheckpointError
from vistok.generators import FlowAR
from vistok.heads import FlowTransformerHead
from vistok.tokens import TokenSpec

RULES = (
    (r"^mask$|\.rope\.", None),  # buffers, which follow from the sizes
    # the trunk
    (r"^class_emb\.", "condition."),
    (r"^z_proj\.", "latent_embed."),
    (r"^z_proj_ln\.", "trunk.embed_norm."),
    (r"^(en|de)coder_pos_embed_learned$", r"trunk.\1coder.position"),
    (r"^(en|de)coder_(blocks|norm)\.", r"trunk.\1coder.\2."),
    (r"^decoder_embed\.", "trunk.decoder_embed."),
    (r"^diffusion_pos_embed_learned$", "output_position"),
    (r"\.ada_lin\.(1\.)?", ".modulation."),
    # the head
    (r"^flownet\.", "head."),
    (r"\.time_embed\.mlp\.", ".time_embedding."),
    (r"\.cond_embed\.", ".condition."),
    (r"\.input_proj\.", ".input."),
    (r"\.res_blocks\.", ".blocks."),
    (r"\.ada_lin_attn\.", ".attention_modulation."),
    (r"\.ada_lin_mlp\.", ".feed_forward_modulation."),
    (r"\.norm2_1\.", ".cross_attention.norm."),
    (r"\.norm2_2\.", ".cross_attention.hidden_norm."),
    (r"\.crossattn\.kv\.", ".cross_attention.key_value."),
    (r"\.crossattn\.q\.", ".cross_attention.query."),
    (r"\.crossattn\.", ".cross_attention."),
    (r"\.final_layer\.linear\.", ".output."),
    (r"\.final_layer\.adaLN_modulation\.1\.", ".output_modulation."),
    # both
    (r"\.attn\.", ".attention."),
    (r"\.proj\.", ".out."),
    (r"\.mlp\.fc2\.", ".feed_forward.out."),
    (r"\.mlp\.fc1_", ".feed_forward."),
)


def generator(
    weights: Weights,
    scales: Sequence[int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    class_names: Sequence[str] | None = None,
    where: str = "weights",
    **training: Any,
) -> FlowAR:
    """Return the model that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        scales: positions a side of each scale; None for 1, 2, 4, and so on, up to their number.
        num_heads: attention heads of the first half; None for what the published buffers tell.
        decoder_num_heads: of the second half; None likewise or, without buffers, for `num_heads`.
        class_names: in the order of the labels; None for ImageNet's or numbers.
        where: what errors are about, as the file that was read.
        training: rates of `FlowAR`, which matter in training alone.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    try:
        dim, channels = weights["z_proj.weight"].shape
        heads = [
            given or heads_of(weights, f"{half}_blocks.0", dim)
            for half, given in (("encoder", num_heads), ("decoder", decoder_num_heads))
        ]
        weights = rename(weights, RULES, where)
        join_gates(weights)
        for table in ("trunk.encoder.position", "trunk.decoder.position", "output_position"):
            weights[table] = weights[table][0]
        n = len(weights["output_position"])
        head = FlowTransformerHead(
            width=len(weights["head.input.weight"]),
            depth=depth_of(weights, "head.blocks."),
            cross="head.blocks.0.cross_attention.out.weight" in weights,
        )
        sizes = {
            "depth": depth_of(weights, "trunk.encoder.blocks."),
            "decoder_depth": depth_of(weights, "trunk.decoder.blocks."),
            "hidden_dim": len(weights["trunk.encoder.blocks.0.feed_forward.out.weight"][0]),
        }
        num_classes = len(weights["condition.weight"]) - 1
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where}: not a FlowAR ({error})") from error
    if heads[0] is None or any(dim % count for count in filter(None, heads)):
        raise CheckpointError(f"{where}: width {dim} has {heads[0]} heads: give num_heads")
    scales = tuple(scales or doubling(n))
    if sum(side * side for side in scales) != n:
        raise CheckpointError(f"{where}: {n} positions are not those of scales {scales}")
    model = FlowAR(
        TokenSpec.latents((scales[-1],) * 2, channels),
        list(class_names or names_of(num_classes)),
        head=head,
        scales=scales,
        dim=dim,
        num_heads=heads[0],
        decoder_num_heads=heads[1],
        **sizes,
        **training,
    )
    load(model, weights, where)
    return model


def heads_of(weights: Weights, block: str, dim: int) -> int | None:
    """Return the heads of a block by its buffer, a frequency for every four channels of a head."""
    frequencies = weights.get(f"{block}.attn.rope.freqs")
    return None if frequencies is None else dim // (4 * len(frequencies))


def join_gates(weights: Weights) -> None:
    """Make one matrix of those of gate and value of each gated layer."""
    for name in [name for name in weights if ".feed_forward.g." in name]:
        parts = [weights.pop(name), weights.pop(name.replace(".g.", ".x."))]
        weights[name.replace(".g.", ".gate_value.")] = torch.cat(parts)


def depth_of(weights: Weights, blocks: str) -> int:
    """Return how many numbered blocks there are under a name."""
    begin = blocks.count(".")
    return len({name.split(".")[begin] for name in weights if name.startswith(blocks)})


def doubling(n: int) -> list[int]:
    """Return sides 1, 2, 4 and so on, of up to n positions in all."""
    sides = [1]
    while sum(side * side for side in (*sides, 2 * sides[-1])) <= n:
        sides.append(2 * sides[-1])
    return sides
