"""The tokenizers of ReToK (2026, official code of zfu006/ReTok) and of GigaTok (Xiong et al., 2025,
arXiv:2504.08736), `VQ_SB256_e250.pt` and the like, and the transformers over their tokens, which
are LlamaGen's with learned positions: `GPT_XL256_e300_VQ_SB.pt`."""

from collections.abc import Sequence
from typing import Any

import torch

from vistok.checkpoints import llamagen
from vistok.checkpoints.files import Weights, load, rename
from vistok.checkpoints.llamagen_vq import conv_sizes, count_of
from vistok.errors import CheckpointError
from vistok.generators import LlamaGen
from vistok.quantizers import VQ
from vistok.tokenizers import ReTok

ENTRIES = ("ema", "model")  # of a published file: averaged weights where it has them
RULES = (
    (r"^quantize\.codebook_used$", None),  # the codes of the last training steps
    (r"^quantize\.", "quantizer."),
    (r"^(post_)?quant_conv\.", r"\1quant_proj."),
    (r"\.mid\.1\.", ".mid.2."),  # the attention between them is no option here
    (r"\.downsample\.conv\.", ".resample.conv."),
    (r"\.upsample\.conv1?\.", ".resample.conv."),
    (r"^s2to1encoder\.conv_out\.", "to_tokens.proj_out."),
    (r"^s2to1encoder\.positional_embedding$", "to_tokens.memory_positions"),
    (r"^s2to1encoder\.latent_token_positional_embedding", "to_tokens.query_positions"),
    (r"^s2to1encoder\.encoder_embed\.", "to_tokens.embed."),
    (r"^s2to1encoder\.", "to_tokens."),
    (r"^s1to2decoder\.positional_embedding$", "to_grid.query_positions"),
    (r"^s1to2decoder\.latent_token_positional_embedding", "to_grid.memory_positions"),
    (r"^s1to2decoder\.decoder_embed\.", "to_grid.embed."),
    (r"^s1to2decoder\.distill_mlp\.", "to_grid.alignment."),
    (r"^s1to2decoder\.", "to_grid."),
    (r"\.transformer\.", ".layers."),
    (r"\.multihead_attn\.", ".cross_attn."),
)
POINTWISE = ("quant_proj.weight", "post_quant_proj.weight", "to_tokens.proj_out.weight")
TABLES = [
    f"{part}.{rows}_positions" for part in ("to_tokens", "to_grid") for rows in ("memory", "query")
]


def convert(weights: Weights, where: str = "weights", **options: Any) -> ReTok | LlamaGen:
    """Return the tokenizer or the transformer that has these weights; see `tokenizer` and
    `generator` for the options of each."""
    is_tokenizer = "quantize.embedding.weight" in weights
    return (tokenizer if is_tokenizer else generator)(weights, where=where, **options)


def tokenizer(
    weights: Weights,
    image_size: int | Sequence[int] = 256,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    tail_drop: str | None = None,
    vq: dict[str, Any] | None = None,
    where: str = "weights",
    **options: Any,
) -> ReTok:
    """Return the tokenizer that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        image_size: pixels of a side, or (height, width).
        encoder_heads: attention heads of the transformer to tokens; None for one in 64 channels.
        decoder_heads: the same of the transformer to the grid.
        tail_drop: what training keeps; None for ReToK's: any number of tokens, redundant ones
            included, from as many as are not repeated. Without redundant tokens None is GigaTok's:
            they decode as a whole.
        vq: arguments of `VQ` that shapes do not tell, for training: `rotation` (True in published
            training), `commitment` and others.
        where: what errors are about, as the file that was read.
        options: arguments of `ReTok` that shapes do not tell: `groups`, and `distill_depth`,
            `feature_loss` and `feature_weight` for training.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    weights = rename(weights, RULES, where)
    try:
        for name in POINTWISE:
            weights[name] = weights[name].flatten(1)
        num_redundant = len(weights.get("to_tokens.query_positions_comp", ()))
        for name in TABLES:
            parts = [weights[name]]
            if f"{name}_comp" in weights:
                parts.append(weights.pop(f"{name}_comp"))
            weights[name] = torch.cat(parts).squeeze(1)
        num_tokens = len(weights["to_tokens.query_positions"]) - num_redundant
        encoder_width, decoder_width = (
            len(weights[f"{part}.embed.weight"]) for part in ("to_tokens", "to_grid")
        )
        vocab_size, dim = weights["quantizer.embedding.weight"].shape
        sizes = conv_sizes(weights, where)
        upsampled = weights.get("decoder.conv_blocks.0.resample.conv.bias", ())
        d2s_up = len(upsampled) > len(weights["decoder.conv_blocks.0.res.0.conv2.bias"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{where}: not a tokenizer of ReToK or GigaTok (no usable tensor {error})"
        ) from error
    if tail_drop is None and num_redundant:
        tail_drop = f"uniform({num_tokens - num_redundant},{num_tokens + num_redundant})"
    alignment = weights.get("to_grid.alignment.4.bias")
    layers = "{}.layers.{}.linear1.weight"
    model = ReTok(
        VQ(vocab_size, dim, **({"rotation": True} | (vq or {}))),
        image_size,
        num_tokens,
        num_redundant,
        tail_drop,
        adaptive_gn="decoder.adaptive.0.gamma.weight" in weights,
        d2s_up=d2s_up,
        encoder_width=encoder_width,
        encoder_depth=count_of(weights, layers.format("to_tokens", "{}")),
        encoder_heads=encoder_heads or encoder_width // 64,
        decoder_width=decoder_width,
        decoder_depth=count_of(weights, layers.format("to_grid", "{}")),
        decoder_heads=decoder_heads or decoder_width // 64,
        alignment_dim=None if alignment is None else len(alignment),
        **sizes,
        **options,
    )
    load(model, weights, where)
    return model


def generator(
    weights: Weights, ordered: bool = True, where: str = "weights", **options: Any
) -> LlamaGen:
    """Return the transformer that has these weights, as long as its table of positions.

    Args:
        weights: the tensors under their published names.
        ordered: whether any first tokens decode, as ReToK's; False for GigaTok's.
        where: what errors are about, as the file that was read.
        options: see `llamagen.generator`.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    if "positional_embedding" not in weights:
        raise CheckpointError(
            f"{where}: has no positional_embedding, as a transformer of ReToK has"
        )
    length = weights["positional_embedding"].shape[-2] - 1
    return llamagen.generator(weights, (length,), ordered, where=where, **options)
