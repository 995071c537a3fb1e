"""TokenBridge (Wang et al., 2025, arXiv:2503.16430): the trunk of MAR, with a head that draws the
channels of a token one by one. Its tokenizer is MAR's autoencoder."""

from collections.abc import Sequence
from typing import Any

import torch

from vistok.checkpoints.files import Weights, rename
from vistok.checkpoints.llamagen_vq import count_of
from vistok.checkpoints.mar import TRUNK_RULES, join_trunk, model_of
from vistok.errors import CheckpointError
from vistok.generators import MAR
from vistok.heads import DimensionWiseHead
from vistok.quantizers import DimensionWise
from vistok.quantizers.dimension_wise import normal_cells

BUFFERS = r"^(channel_mask|boundaries|reconstruction_values)$"  # which averaged weights lack
HEAD_RULES = (
    (r"^condition_proj\.", "head.condition."),
    (r"^channel_embed$", "head.position_embedding"),
    (r"^timesteps_embeddings$", "head.step_embedding"),
    (r"^channel_(blocks|norm)\.", r"head.\1."),
    (r"^(head\.blocks\.\d+)\.norm1\.", r"\1.attention_norm."),
    (r"^(head\.blocks\.\d+)\.norm2\.", r"\1.mlp_norm."),
    (r"^(head\.blocks\.\d+)\.attn\.proj\.", r"\1.attention.out."),
    (r"^(head\.blocks\.\d+)\.attn\.", r"\1.attention."),
    (r"^(head\.blocks\.\d+)\.mlp\.", r"\1."),
)


def generator(
    weights: Weights,
    shape: Sequence[int] | None = None,
    num_heads: int = 16,
    decoder_num_heads: int | None = None,
    head_heads: int = 8,
    limit: float = 5.0,
    deviations: float = 3.0,
    class_names: Sequence[str] | None = None,
    dropout: float = 0.1,
    norm_eps: float = 1e-6,
    where: str = "weights",
    **training: Any,
) -> MAR:
    """Return the model that has these weights, its sizes read from their shapes. It draws as the
    released code does, see `DimensionWiseHead`.

    Args:
        weights: the tensors under their published names, with or without buffers.
        shape: of the tokens; None for the square that the file's tables are of. They are
            interpolated for another grid.
        num_heads, decoder_num_heads, head_heads: attention heads of encoder, decoder and head,
            which the file does not tell; None for as many in the decoder as in the encoder.
        limit, deviations: of the quantizer `DimensionWise`.
        class_names: in the order of the labels; None for ImageNet's or numbers.
        dropout, norm_eps: of the trunk and of the head.
        where: what errors are about, as the file that was read.
        training: arguments of `MAR` that matter in training alone.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape, or if the file
    holds levels of other `deviations`; of the limit it tells nothing.
    """
    table = weights.get("reconstruction_values")
    try:
        weights = renamed(weights, where)
        channels, levels, width = weights["head.digit_logits.weight"].shape
        hidden_width = len(weights["head.blocks.0.fc1.weight"])
    except (KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{where}: not a TokenBridge ({error})") from error
    if width % head_heads:
        raise CheckpointError(
            f"{where}: head of width {width} has not {head_heads} heads: give head_heads"
        )
    quantizer = DimensionWise(channels, levels, limit, deviations)
    means = normal_cells(levels, deviations)[1]
    if table is not None and not (
        table.shape == means.shape and torch.allclose(table.float(), means, atol=1e-3)
    ):
        raise CheckpointError(
            f"{where}: its levels are not {levels} within {deviations:g} standard deviations: "
            "give deviations"
        )
    head = DimensionWiseHead(
        width,
        count_of(weights, "head.blocks.{}.fc1.weight"),
        head_heads,
        hidden_width / width,
        dropout=dropout,
        norm_eps=norm_eps,
        sampling_adds_first_step=True,
    )
    return model_of(
        weights,
        head,
        lambda shape, values: quantizer.spec(shape),
        shape,
        class_names,
        where,
        num_heads,
        decoder_num_heads,
        dropout=dropout,
        norm_eps=norm_eps,
        **training,
    )


def renamed(weights: Weights, where: str = "weights") -> Weights:
    """Return the weights of a published model as `MAR` has them; KeyError where one is missing."""
    weights = rename(weights, ((BUFFERS, None), *TRUNK_RULES, *HEAD_RULES), where)
    join_trunk(weights)
    for name in ("position_embedding", "step_embedding"):
        weights[f"head.{name}"] = weights[f"head.{name}"][0]
    channels = range(count_of(weights, "channel_heads.{}.weight"))
    tables = [weights.pop(f"token_embeddings.{i}.weight") for i in channels[:-1]]
    weights["head.digit_embedding.weight"] = torch.cat(tables)
    depth = count_of(weights, "head.blocks.{}.fc1.weight")
    modulated = [*(f"head.blocks.{i}" for i in range(depth)), "channel_final"]
    for kind in ("weight", "bias"):
        rows = [weights.pop(f"channel_heads.{i}.{kind}") for i in channels]
        weights[f"head.digit_logits.{kind}"] = torch.stack(rows)
        parts = [weights.pop(f"{part}.adaLN_modulation.1.{kind}") for part in modulated]
        weights[f"head.modulation.{kind}"] = torch.cat(parts)
    return weights
