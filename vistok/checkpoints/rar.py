"""The generators of RAR (Yu et al., 2024, arXiv:2411.00776)."""

from collections.abc import Sequence
from math import prod
from typing import Any

from vistok.checkpoints.files import Weights, load, rename
from vistok.checkpoints.llamagen import names_of
from vistok.errors import CheckpointError
from vistok.generators import RAR
from vistok.tokens import TokenSpec

RULES = (
    (r"^attn_mask$", None),
    (r"^pos_embed$", "position_embedding"),
    (r"^target_aware_pos_embed$", "target_embedding"),
    (r"^timesteps_embeddings$", "index_embedding"),
    (r"^adaln_before_head\.adaLN_modulation\.1\.", "head_modulation."),
    (r"^lm_head\.", "head.linear."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    (r"\.norm1\.", ".attention_norm."),
    (r"\.norm2\.", ".mlp_norm."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.", "."),
)


def generator(
    weights: Weights,
    shape: Sequence[int] = (16, 16),
    num_heads: int = 16,
    class_names: Sequence[str] | None = None,
    where: str = "weights",
    **training: Any,
) -> RAR:
    """Return the model that has these weights, its sizes read from their shapes. Rows of its tables
    that no sequence of `shape` has, and that of a mask which it never sees, are left out.

    Args:
        weights: the tensors under their published names.
        shape: of the tokens, which the file does not tell.
        num_heads: attention heads, which the file does not tell, either.
        class_names: in the order of the labels; None for ImageNet's or numbers.
        where: what errors are about, as the file that was read.
        training: rates and annealing of `RAR`, which matter in training alone.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    n = prod(shape)
    try:
        weights = rename(weights, RULES, where)
        vocab_size, dim = weights["head.linear.weight"].shape
        hidden_dim = len(weights["blocks.0.fc1.weight"])
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        table = weights.pop("embeddings.weight")
        # Codes, a mask, classes and the null class; rows 0 and 1 stand before the tokens.
        used = {"position": slice(n + 2), "target": slice(2, n + 2), "index": slice(n + 1)}
        for name, rows in used.items():
            weights[f"{name}_embedding"] = weights[f"{name}_embedding"][0, rows]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where}: not a RAR ({error})") from error
    if dim % num_heads:
        raise CheckpointError(f"{where}: width {dim} has not {num_heads} heads: give num_heads")
    weights["token_embedding.weight"] = table[:vocab_size]
    weights["condition.weight"] = table[vocab_size + 1 :]
    model = RAR(
        TokenSpec.ids(tuple(shape), vocab_size),
        list(class_names or names_of(len(table) - vocab_size - 2)),
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        **training,
    )
    load(model, weights, where)
    return model
