"""The masked generators of TiTok (Yu et al., 2024, arXiv:2406.07550) and One-D-Piece: MaskGIT on a
BERT or on a U-ViT, told apart by their names."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from vistok.checkpoints.files import Weights, load, rename
from vistok.checkpoints.llamagen import names_of
from vistok.errors import CheckpointError
from vistok.generators import MaskGIT
from vistok.tokens import TokenSpec

RULES = (
    (r"\.position_ids$", None),  # a buffer that older files hold
    # BERT
    (r"^model\.embeddings\.word_embeddings\.weight$", "embeddings"),
    (r"^model\.embeddings\.position_embeddings\.weight$", "position_embedding"),
    (r"^model\.embeddings\.LayerNorm\.", "encoder.ln_pre."),
    (r"^model\.encoder\.layer\.", "encoder.blocks."),
    (r"\.attention\.self\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.out_proj."),
    (r"\.attention\.output\.LayerNorm\.", ".ln_1."),
    (r"\.intermediate\.dense\.", ".mlp.c_fc."),
    (r"\.output\.dense\.", ".mlp.c_proj."),
    (r"\.output\.LayerNorm\.", ".ln_2."),
    (r"^(model\.)?lm_head\.", "head.linear."),
    # U-ViT
    (r"^embeddings\.weight$", "embeddings"),
    (r"^pos_embed$", "position_embedding"),
    (r"^norm\.", "encoder.ln_post."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj."),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def generator(
    weights: Weights,
    shape: Sequence[int] | None = None,
    num_heads: int = 16,
    class_names: Sequence[str] | None = None,
    ordered: bool = False,
    where: str = "weights",
    **training: Any,
) -> MaskGIT:
    """Return the model that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        shape: of the tokens; None for one sequence.
        num_heads: attention heads, which the file does not tell.
        class_names: in the order of the labels; None for ImageNet's or numbers.
        ordered: whether its tokenizer decodes any prefix, as One-D-Piece does.
        where: what errors are about, as the file that was read.
        training: rates and weights of `MaskGIT` that matter in training alone.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    is_uvit = "mid_block.norm1.weight" in weights
    try:
        weights = rename(weights, RULES, where)
        vocab_size, dim = weights["head.linear.weight"].shape
        if is_uvit:
            weights = rename(weights, uvit_rules(weights), where)
            weights["position_embedding"] = weights["position_embedding"][0]
        else:
            types = weights.pop("model.embeddings.token_type_embeddings.weight")
            # All rows are of the first type: its vector is a part of every position's.
            weights["position_embedding"] = weights["position_embedding"] + types[0]
            join_projections(weights)
        rows = len(weights["position_embedding"])
        hidden_dim = len(weights["encoder.blocks.0.mlp.c_fc.weight"])
        table = weights.pop("embeddings")
        depth = len({name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")})
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where}: not a MaskGIT of TiTok ({error})") from error
    # One table holds the codes, the mask, the classes and the null class, in this order.
    weights["token_embedding.weight"] = table[: vocab_size + 1]
    weights["condition.weight"] = table[vocab_size + 1 :]
    if dim % num_heads:
        raise CheckpointError(f"{where}: width {dim} has not {num_heads} heads: give num_heads")
    model = MaskGIT(
        TokenSpec.ids(tuple(shape or (rows - 1,)), vocab_size, ordered),
        list(class_names or names_of(len(table) - vocab_size - 2)),
        backbone="uvit" if is_uvit else "bert",
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        **training,
    )
    load(model, weights, where)
    return model


def join_projections(weights: Weights) -> None:
    """Put queries, keys and values of each block side by side."""
    for name in [name for name in weights if ".attn.query." in name]:
        parts = [weights.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        weights[name.replace("query", "in_proj")] = torch.cat(parts)


def uvit_rules(weights: Weights) -> list[tuple[str, str]]:
    """Return how blocks and skips of a U-ViT are renamed, numbered through from its input."""
    numbers = [int(m[1]) for name in weights if (m := re.match(r"in_blocks\.(\d+)\.", name))]
    half = 1 + max(numbers, default=-1)
    rules = [(r"^in_blocks\.", "encoder.blocks."), (r"^mid_block\.", f"encoder.blocks.{half}.")]
    rules.append((r"^out_blocks\.(\d+)\.skip_linear\.", r"encoder.skips.\1."))
    return rules + [
        (rf"^out_blocks\.{i}\.", f"encoder.blocks.{half + 1 + i}.") for i in range(half)
    ]
