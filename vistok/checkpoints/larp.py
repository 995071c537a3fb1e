"""LARP's video tokenizer (Wang et al., 2024, arXiv:2410.21264), which the video models of NAR share
(He et al., 2025, arXiv:2503.10696): a bare state dict beside its constructor's arguments."""

import re
from collections.abc import Sequence

import torch

from vistok.checkpoints.files import Weights, load, rename
from vistok.errors import CheckpointError
from vistok.quantizers import VQ, StochasticVQ
from vistok.tokenizers import LARP

TABLES = r"^(encoder_patch|encoder_latent_query|decoder_latent|decoder_patch_query)"
RULES = (
    (r"^prior_model\.", None),  # shapes the codes in training only
    (TABLES + r"_(pe|embed)$", r"tables.\1.rows"),
    (TABLES + r"_token_type_embed$", r"tables.\1.type_embed"),
    (r"^x_embedder\.proj\.", "patch_embed."),
    (r"^bottleneck\.in_linear\.", "proj_out."),
    (r"^bottleneck\.out_linear\.", "proj_in."),
    (r"^bottleneck\.regularizer\.", "quantizer."),
    (r"^final_layer\.norm_final\.", "norm."),
    (r"^final_layer\.linear\.", "head."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj."),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
ROUNDING = 0.01  # of sines and cosines, and their sums, stored in half precision


def tokenizer(
    weights: Weights,
    frames: int = 16,
    image_size: int | Sequence[int] = 128,
    decoder_patch_size: Sequence[int] | None = None,
    token_shape: Sequence[int] = (4, 16, 16),
    encoder_heads: int = 12,
    decoder_heads: int = 12,
    learned: Sequence[str] = ("encoder_latent_query",),
    latent_base: float = 10000.0,
    temperature: float | None = None,
    where: str = "weights",
    **vq: bool | float,
) -> LARP:
    """Return the tokenizer that has these weights, its other sizes read from their shapes.

    Args:
        weights: the tensors under their published names; those of the prior are left out.
        frames, image_size, decoder_patch_size, token_shape, encoder_heads, decoder_heads, learned,
            latent_base: see `LARP`.
        temperature: makes the quantizer a `StochasticVQ` of this temperature (published 0.03) in
            place of a `VQ`; the nearest code is taken outside training either way.
        where: what errors are about, as the file that was read.
        vq: further arguments of the quantizer that shapes do not tell: `l2_normalise` (True when
            published), and `commitment`, `codebook_weight` and `entropy` for training.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape, or if a table
    that is not `learned` holds anything but the fixed one of these sizes.
    """
    weights = rename(weights, RULES, where)
    for name, tensor in weights.items():
        if name.startswith("tables."):  # (1, n, width), (n, width) or (1, 1, width)
            weights[name] = tensor.reshape(-1, *tensor.shape[-1:])
    try:
        encoder_width, _, *patch_size = weights["patch_embed.weight"].shape
        decoder_width, _ = weights["proj_in.weight"].shape
        vocab_size, dim = weights["quantizer.embedding.weight"].shape
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{where}: no tokenizer of LARP (no usable tensor {error})"
        ) from error
    if temperature is None:
        quantizer = VQ(vocab_size, dim, **vq)
    else:
        quantizer = StochasticVQ(vocab_size, dim, temperature, **vq)
    model = LARP(
        quantizer,
        frames=frames,
        image_size=image_size,
        patch_size=patch_size,
        decoder_patch_size=decoder_patch_size,
        token_shape=token_shape,
        encoder_width=encoder_width,
        encoder_depth=_depth(weights, "encoder"),
        encoder_heads=encoder_heads,
        decoder_width=decoder_width,
        decoder_depth=_depth(weights, "decoder"),
        decoder_heads=decoder_heads,
        learned=learned,
        typed=re.findall(r"tables\.(\w+)\.type_embed", "\n".join(weights)),
        latent_base=latent_base,
    )
    for name, fixed in model.tables.named_buffers("tables"):
        given = weights.pop(name, torch.empty(0)).to(fixed.dtype)
        if given.shape != fixed.shape or not torch.allclose(given, fixed, rtol=0, atol=ROUNDING):
            raise CheckpointError(
                f"{where}: '{name}' {tuple(given.shape)} is not the fixed {tuple(fixed.shape)} of "
                "these frames, image_size, decoder_patch_size, token_shape and latent_base; "
                "correct them, or name it among the learned"
            )
    load(model, weights, where)
    return model


def _depth(weights: Weights, side: str) -> int:
    return len({name.split(".")[2] for name in weights if name.startswith(f"{side}.blocks.")})
