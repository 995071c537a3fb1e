"""The multi-scale tokenizer and the generators of VAR (Tian et al., 2024, arXiv:2404.02905):
`vae_ch160v4096z32.pth`, `var_d16.pth` to `var_d36.pth`, and the files that its trainer writes."""

import re
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from vistok.checkpoints.files import ENTRIES as FLAT
from vistok.checkpoints.files import Weights, load, read_weights, rename
from vistok.checkpoints.llamagen import names_of
from vistok.checkpoints.llamagen_vq import conv_sizes, count_of
from vistok.errors import CheckpointError
from vistok.generators import VAR
from vistok.quantizers import VQ, MultiScale
from vistok.tokenizers import ConvTokenizer, Tokenizer

# A trainer's file holds both: the generator is taken, and the tokenizer if that is asked for.
ENTRIES = ("trainer/var_wo_ddp", *FLAT)
TOKENIZER_ENTRIES = ("trainer/vae_local", *FLAT)
SCALES = {  # published, by the side of the last
    16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    64: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
CODE_RULES = (
    (r"^quantize\.ema_vocab_hit_SV$", None),  # how often training used each code
    (r"^quantize\.embedding\.", "quantizer.quantizer.embedding."),
    (r"^quantize\.quant_resi\.qresi\.", "quantizer.smoothers.0."),
    (r"^quantize\.quant_resi\.(qresi_ls\.)?", "quantizer.smoothers."),
)
TOKENIZER_RULES = (
    *CODE_RULES,
    (r"^(en|de)coder\.(down|up)\.(\d+)\.", r"\1coder.conv_blocks.\3."),
    (r"(conv_blocks\.\d+)\.block\.", r"\1.res."),
    (r"(conv_blocks\.\d+)\.(down|up)sample\.", r"\1.resample."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
)
RULES = (
    # Buffers: the mask, which follows from the scales, and a bias of keys, which is zero.
    (r"^attn_bias_for_masking$|^lvl_1L$|\.zero_k_bias$", None),
    (r"^word_embed\.", "code_embed."),
    (r"^class_emb\.", "condition."),
    (r"^pos_start$", "start"),
    (r"^pos_1LC$", "position"),
    (r"^lvl_embed\.", "level."),
    (r"^head_nm\.ada_lin\.1\.", "head_modulation."),
    (r"^head\.", "head.linear."),
    (r"^shared_ada_lin\.1\.", "modulation."),
    (r"\.ada_lin\.1\.", ".modulation."),
    (r"\.ada_gss$", ".modulation_table"),
    (r"\.attn\.mat_qkv\.", ".attention.qkv."),
    (r"\.attn\.([qv])_bias$", r".attention.qkv.\1_bias"),
    (r"\.attn\.scale_mul_1H11$", ".attention.q_norm.sharpness"),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.ffn\.", "."),
)


def convert(weights: Weights, where: str = "weights", **options: Any) -> ConvTokenizer | VAR:
    """Return the model, tokenizer or generator, that has these weights; `options` are those of
    `tokenizer` or `generator`."""
    make = generator if "word_embed.weight" in weights else tokenizer
    return make(weights, where=where, **options)


def tokenizer(
    weights: Weights,
    image_size: int | Sequence[int] = 256,
    scales: Sequence[int | Sequence[int]] | None = None,
    groups: int = 32,
    dropout: float = 0.0,
    where: str = "weights",
    **codes: Any,
) -> ConvTokenizer:
    """Return the tokenizer that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        image_size: pixels of a side, or (height, width).
        scales: positions of a side, or (height, width), of each; None for the published ones of
            images of this size. The same weights serve all.
        groups: of the group norms.
        dropout: of `ConvTokenizer`, for training.
        where: what errors are about, as the file that was read.
        codes: further arguments of `multi_scale`.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    try:
        weights = run_order(split_attention(rename(weights, TOKENIZER_RULES, where)))
        sizes = conv_sizes(weights, where)
        factor = 2 ** (len(sizes["channel_multipliers"]) - 1)
        scales = scales or published(height // factor, width // factor, where)
        codes = multi_scale(weights, scales, **codes)
        kernel_size = weights["quant_conv.weight"].shape[-1]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not VAR's tokenizer (no usable tensor {error})") from error
    model = ConvTokenizer(
        codes,
        image_size,
        attention="encoder.mid.1.q.weight" in weights,
        dropout=dropout,
        kernel_size=kernel_size,
        groups=groups,
        **sizes,
    )
    load(model, weights, where)
    return model


def multi_scale(
    weights: Weights,
    scales: Sequence[int | Sequence[int]],
    smoothing: float = 0.5,
    commitment: float = 0.25,
    cosine: bool = False,
) -> MultiScale:
    """Return a quantizer of the sizes of these weights, which have our names; `cosine` compares the
    direction of latents and codes alone. Raises `KeyError` for a tensor that is not there."""
    vocab_size, dim = weights["quantizer.quantizer.embedding.weight"].shape
    smoothers = count_of(weights, "quantizer.smoothers.{}.weight")
    kernel_size = weights["quantizer.smoothers.0.weight"].shape[-1] if smoothers else 3
    search = "search" if cosine else False
    # What pulls codes and latents to each other is the joint loss of all scales.
    vq = VQ(vocab_size, dim, l2_normalise=search, commitment=0.0, codebook_weight=0.0)
    return MultiScale(vq, scales, smoothers, smoothing, kernel_size, commitment=commitment)


def generator(
    weights: Weights,
    tokenizer: str | Path | Weights | Tokenizer | None = None,
    scales: Sequence[int] | None = None,
    num_heads: int | None = None,
    class_names: Sequence[str] | None = None,
    codes: dict[str, Any] | None = None,
    where: str = "weights",
    **training: Any,
) -> VAR:
    """Return the model that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        tokenizer: the tokenizer, with whose codes the model is fed: its published file, the
            tensors of that, or the imported model.
        scales: positions of a side of each; None for what the file tells.
        num_heads: attention heads; None for what the file tells, or one for every 64 channels.
        class_names: in the order of the labels; None for ImageNet's or numbers.
        codes: arguments of `multi_scale`, where `tokenizer` is a file or tensors.
        where: what errors are about, as the file that was read.
        training: rates of `VAR`, and `norm_eps`, which the file does not tell.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    if tokenizer is None:
        raise CheckpointError(f"{where}: VAR is fed the codes of its tokenizer: give its file, too")
    check_key_bias(weights, where)
    try:
        scales = scales or scales_of(weights, where)
        weights = without_first_axes(rename(weights, RULES, where))
        dim = weights["level.weight"].shape[1]
        sharpness = weights.get("blocks.0.attention.q_norm.sharpness")
        vocab_size = len(weights["head.linear.weight"])
        num_classes = len(weights["condition.weight"]) - 1
        sizes = {
            "dim": dim,
            "depth": count_of(weights, "blocks.{}.fc1.weight"),
            "num_heads": num_heads or (dim // 64 if sharpness is None else len(sharpness)),
            "hidden_dim": len(weights["blocks.0.fc1.weight"]),
            "cosine": sharpness is not None,
            "shared_modulation": "modulation.weight" in weights,
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where}: not a VAR ({error})") from error
    quantizer = codes_of(tokenizer, scales, codes or {}, where)
    spec = quantizer.spec(quantizer.scales[-1])
    if spec.vocab_size != vocab_size or dim % sizes["num_heads"]:
        raise CheckpointError(
            f"{where}: {vocab_size} tokens and width {dim}, but a tokenizer of {spec.vocab_size} "
            f"and {sizes['num_heads']} heads"
        )
    names = list(class_names or names_of(num_classes))
    model = VAR(spec, names, quantizer, **sizes, **training)
    own = {f"codes.{name}": tensor for name, tensor in quantizer.state_dict().items()}
    load(model, weights | own, where)
    return model


def codes_of(
    tokenizer: str | Path | Weights | Tokenizer,
    scales: Sequence[int | Sequence[int]],
    options: dict[str, Any],
    where: str,
) -> MultiScale:
    """Return the quantizer of a tokenizer, at the scales of a generator."""
    if isinstance(tokenizer, Tokenizer):
        arguments = tokenizer.quantizer.arguments | {"scales": list(scales)}
        codes = MultiScale.from_config(arguments)
        codes.load_state_dict(tokenizer.quantizer.state_dict())
        return codes
    if not isinstance(tokenizer, dict):
        where = str(tokenizer)
        tokenizer = read_weights(tokenizer, TOKENIZER_ENTRIES)
    weights = {k: v for k, v in rename(tokenizer, CODE_RULES, where).items() if "quantizer." in k}
    try:
        codes = multi_scale(weights, scales, **options)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{where}: not VAR's tokenizer (no usable tensor {error})") from error
    load(codes, {k.removeprefix("quantizer."): v for k, v in weights.items()}, where)
    return codes


def split_attention(weights: Weights) -> Weights:
    """Return the weights with those of queries, keys and values of convolutional blocks apart."""
    found = {}
    for name, tensor in weights.items():
        parts = zip("qkv", tensor.chunk(3), strict=True) if ".qkv." in name else [("", tensor)]
        found |= {name.replace(".qkv.", f".{part}."): piece for part, piece in parts}
    return found


def run_order(weights: Weights) -> Weights:
    """Return the weights with the levels of the decoder numbered as they run; the published ones
    are numbered by resolution."""
    levels = count_of(weights, "decoder.conv_blocks.{}.res.0.conv1.weight")
    level = re.compile(r"^(decoder\.conv_blocks\.)(\d+)")
    return {
        level.sub(lambda m: f"{m[1]}{levels - 1 - int(m[2])}", name): tensor
        for name, tensor in weights.items()
    }


def without_first_axes(weights: Weights) -> Weights:
    """Return the weights with tables and factors as they are, less axes of one."""
    shapes = {"start": 2, "position": 2, "modulation_table": 2, "sharpness": 1}
    found = dict(weights)
    for name, tensor in weights.items():
        if ndim := shapes.get(name.split(".")[-1]):
            found[name] = tensor.flatten() if ndim == 1 else tensor.flatten(0, -2)
    return found


def scales_of(weights: Weights, where: str) -> tuple[int, ...]:
    """Return the scales that the published buffer tells, or else those of so many positions."""
    if "lvl_1L" in weights:
        counts = torch.bincount(weights["lvl_1L"].flatten()).tolist()
        return tuple(map(isqrt, counts))
    n = weights["pos_1LC"].shape[1]
    for scales in SCALES.values():
        if sum(side**2 for side in scales) == n:
            return scales
    raise CheckpointError(f"{where}: no published scales have {n} positions: give scales")


def published(height: int, width: int, where: str) -> tuple[int, ...]:
    """Return the published scales that end at this grid."""
    if height != width or height not in SCALES:
        raise CheckpointError(
            f"{where}: no published scales end at {height}x{width} positions: give scales"
        )
    return SCALES[height]


def check_key_bias(weights: Weights, where: str) -> None:
    for name, tensor in weights.items():
        if name.endswith("zero_k_bias") and tensor.any():
            raise CheckpointError(f"{where}: {name} is a bias of keys; expected zeros")
