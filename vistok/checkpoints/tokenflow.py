"""The tokenizers of TokenFlow (Qu et al., 2024, arXiv:2412.03069), as they are published in
`tokenflow_clipb_32k_enhanced.pt` and `tokenflow_siglip_32k.pt`, and new ones around the image tower
that training starts from, of CLIP (Radford et al., 2021, arXiv:2103.00020) or SigLIP (Zhai et al.,
2023, arXiv:2303.15343)."""

from collections.abc import Sequence
from math import gcd, isqrt
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.checkpoints.files import Weights, load, rename
from vistok.checkpoints.llamagen_vq import count_of
from vistok.errors import CheckpointError, UserError
from vistok.layers.image_towers import CLIPTower, ImageTower, SigLIPTower
from vistok.quantizers import DualVQ, MultiScale
from vistok.tokenizers import TokenFlow

ENTRIES = ("ema", "model", "state_dict")  # of a published file
SCALES = {  # of the published tokenizers by the side of their grid
    14: (1, 2, 4, 6, 8, 10, 12, 14),
    16: (1, 2, 4, 6, 8, 10, 12, 14, 16),
    27: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27),
}
VOCAB_SIZE = 32768
SIGLIP_SIZE = 384  # pixels of a side, which its patches do not divide
SIGLIP_HEADS, CLIP_HEAD_DIM, SEMANTIC_HEADS = 16, 64, 12
CLIP_CHANNELS = 512  # of the projection of ViT-B/16
TOWERS = ("visual.", "vision_model.")  # open_clip's and transformers' names of image towers
CODEBOOKS = ("embedding_vqkd", "embedding_vqgan")  # semantic, pixel
LAYER, CONV = "blocks.{}.ln_1.weight", "{}.conv_blocks.{}.res.{}.conv1.weight"
RULES = (
    (r"^quantize\.codebook_used$", None),  # the codes of the last training steps
    (r"^scaling_layer\.", None),  # constants: how the teacher's images are normalised
    (r"^encode_task_layer\.", "to_semantic."),
    (r"^decode_task_layer\.", "semantic_decoder.head."),
    (r"^decoder_vqkd\.", "semantic_decoder."),
    (r"\.cls_token$", ".class_embedding"),
    (r"\.pos_embed$", ".positional_embedding"),
    (r"\.patch_embed\.proj\.", ".proj."),
    (r"\.fc_norm\.", ".ln_post."),
    (r"(\.blocks\.\d+)\.norm(\d)\.", r"\1.ln_\2."),
    (r"\.attn\.qkv\.", ".attn.in_proj."),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.(down|up)sample\.", ".resample."),
)
TOWER_RULES = (
    (r"^transformer\.resblocks\.", "blocks."),
    (r"^encoder\.layers\.", "blocks."),
    (r"^embeddings\.class_embedding$", "class_embedding"),
    (r"^embeddings\.patch_embedding\.", "conv1."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.position_ids$", None),  # 0, 1, 2, ... in files of older releases
    (r"^proj$", None),  # to the space of captions
    (r"^pre_layrnorm\.", "ln_pre."),
    (r"^post_layernorm\.", "ln_post."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.", ".attn."),
    (r"\.attn\.in_proj_", ".attn.in_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def convert(weights: Weights, where: str = "weights", **options: Any) -> TokenFlow:
    """Return the tokenizer that has these weights, or a new one around an image tower's; see
    `tokenizer` and `initial` for the options of each."""
    is_tokenizer = "quantize.embedding_vqkd.weight" in weights
    return (tokenizer if is_tokenizer else initial)(weights, where=where, **options)


def tokenizer(
    weights: Weights,
    image_size: int | None = None,
    scales: Sequence[int] | None = None,
    num_heads: int | None = None,
    semantic_heads: int = SEMANTIC_HEADS,
    scale_dropout: float = 0.1,
    stage: Literal[1, 2] = 1,
    vq: dict[str, Any] | None = None,
    where: str = "weights",
) -> TokenFlow:
    """Return the tokenizer that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        image_size: pixels of a side; None for those of its training. B is read at 256, too.
        scales: positions of a side of each scale; None for the published ones of this grid.
        num_heads: attention heads of the semantic encoder; None for the published.
        semantic_heads: those of the semantic decoder.
        scale_dropout: probability with which training leaves out a scale.
        stage: of training; see `TokenFlow`.
        vq: arguments of `DualVQ` that shapes do not tell, for training: `commitment`, `entropy`.
        where: what errors are about, as the file that was read.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    try:
        of_tower = _tower_weights(weights, "encoder_vqkd.")
        tower = _tower(of_tower, num_heads)
        rest = {k: w for k, w in weights.items() if not k.startswith("encoder_vqkd.")}
        rest = _in_our_shapes(rename(rest, RULES, where))
        codes = _code_sizes(rest)
        sizes = _network_sizes(rest)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{where}: no tokenizer of TokenFlow (no usable tensor {error})"
        ) from error
    image_size = image_size or _image_size(tower)
    model = TokenFlow(
        _quantizer(tower, image_size, scales, scale_dropout, **codes | (vq or {})),
        tower,
        image_size,
        codes["semantic_dim"],
        semantic_heads=semantic_heads,
        stage=stage,
        **sizes,
    )
    load(model, rest | {f"semantic_encoder.{k}": w for k, w in of_tower.items()}, where)
    return model


def initial(
    weights: Weights,
    image_size: int | None = None,
    scales: Sequence[int] | None = None,
    num_heads: int | None = None,
    scale_dropout: float = 0.1,
    vocab_size: int = VOCAB_SIZE,
    vq: dict[str, Any] | None = None,
    where: str = "weights",
    **options: Any,
) -> TokenFlow:
    """Return a new tokenizer to be trained from the image tower that has these weights, those of a
    CLIP or SigLIP as transformers or open_clip name them; towers of captions are left out.

    Args:
        weights: the tensors under their published names.
        image_size: pixels of a side; None for the tower's.
        scales: positions of a side of each scale; None for the published ones of this grid.
        num_heads: attention heads of the tower; None for the published.
        scale_dropout: probability with which training leaves out a scale.
        vocab_size: rows of either codebook.
        vq: other arguments of `DualVQ`.
        where: what errors are about, as the file that was read.
        options: arguments of `TokenFlow`.

    Raises `CheckpointError` if a tensor of the tower is missing, superfluous or of another shape.
    """
    try:
        prefix = next(p for p in TOWERS if any(name.startswith(p) for name in weights))
        of_tower = _tower_weights(weights, prefix)
        tower = _tower(of_tower, num_heads)
    except (KeyError, ValueError, IndexError, RuntimeError, StopIteration) as error:
        raise CheckpointError(
            f"{where}: neither a tokenizer of TokenFlow nor an image tower of CLIP or SigLIP"
        ) from error
    load(tower, of_tower, where)
    image_size = image_size or _image_size(tower)
    taught = {"teacher_dim": CLIP_CHANNELS if isinstance(tower, CLIPTower) else tower.width}
    quantizer = _quantizer(tower, image_size, scales, scale_dropout, vocab_size, **(vq or {}))
    return TokenFlow(quantizer, tower, image_size, **taught | options)


def _tower_weights(weights: Weights, prefix: str) -> Weights:
    """Return the tensors of an image tower under our names, as far as it is run."""
    own = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
    own = {k.removeprefix("vision_model."): w for k, w in own.items()}
    own = rename(own, TOWER_RULES, prefix)
    for name in [name for name in own if ".attn.q_proj." in name]:
        parts = [own.pop(name.replace(".q_proj.", f".{p}_proj.")) for p in ("q", "k", "v")]
        own[name.replace(".q_proj.", ".in_proj.")] = torch.cat(parts)
    if "class_embedding" not in own:  # SigLIP, whose last layer and head nothing reads
        last = count_of(own, LAYER) - 1
        unread = (f"blocks.{last}.", "ln_post.", "head.")
        own = {name: w for name, w in own.items() if not name.startswith(unread)}
    return own


def _tower(weights: Weights, num_heads: int | None) -> CLIPTower | SigLIPTower:
    """Return the tower that has weights of these shapes, not yet its weights."""
    width, _, patch_size, _ = weights["conv1.weight"].shape
    positions, depth = len(weights["positional_embedding"]), count_of(weights, LAYER)
    if "class_embedding" in weights:
        grid = isqrt(positions - 1)
        return CLIPTower(patch_size, width, depth, num_heads or width // CLIP_HEAD_DIM, grid)
    hidden_width = len(weights["blocks.0.mlp.c_fc.bias"])
    heads = num_heads or SIGLIP_HEADS
    return SigLIPTower(patch_size, width, depth, heads, hidden_width, isqrt(positions))


def _image_size(tower: CLIPTower | SigLIPTower) -> int:
    """Return the pixels of a side that the tower was trained on."""
    whole = tower.grid * tower.patch_size
    return SIGLIP_SIZE if SIGLIP_SIZE // tower.patch_size == tower.grid else whole


def _quantizer(
    tower: ImageTower,
    image_size: int,
    scales: Sequence[int] | None,
    scale_dropout: float,
    vocab_size: int,
    **vq: Any,
) -> MultiScale:
    side = image_size // tower.patch_size
    if scales is None and side not in SCALES:
        raise UserError(
            f"TokenFlow: scales that end in a grid of {side}x{side} are not known, only those of "
            f"{', '.join(map(str, SCALES))}: give scales"
        )
    dual = DualVQ(vocab_size, **vq)
    return MultiScale(dual, scales or SCALES[side], 0, jointly=False, scale_dropout=scale_dropout)


def _in_our_shapes(weights: Weights) -> Weights:
    """Return the weights outside the tower with biases and tables put together."""
    weights = dict(weights)
    weights["quantizer.quantizer.embedding.weight"] = codebook(weights, "quantize.")
    for part in CODEBOOKS:
        del weights[f"quantize.{part}.weight"]
    for name in [name for name in weights if name.endswith(".attn.q_bias")]:
        queries, values = weights.pop(name), weights.pop(name.replace("q_bias", "v_bias"))
        # Without a bias of keys, which would add the same to all scores of a query.
        packed = torch.cat([queries, torch.zeros_like(queries), values])
        weights[name.replace("q_bias", "in_proj.bias")] = packed
    weights["semantic_decoder.proj.weight"] = weights["semantic_decoder.proj.weight"].flatten(1)
    for table in ("class_embedding", "positional_embedding"):
        name = f"semantic_decoder.{table}"
        weights[name] = weights[name].squeeze(0).squeeze(0)
    return weights


def codebook(weights: Weights, prefix: str = "") -> Float[Tensor, "k d"]:
    """Return the two published tables side by side, as `DualVQ` has them."""
    return torch.cat([weights[f"{prefix}{part}.weight"] for part in CODEBOOKS], dim=1)


def _code_sizes(weights: Weights) -> dict[str, int]:
    """Return the arguments of a `DualVQ` that shapes tell."""
    return {
        "vocab_size": len(weights["quantizer.quantizer.embedding.weight"]),
        "semantic_dim": len(weights["to_semantic.2.bias"]),
        "pixel_dim": len(weights["quant_conv.bias"]),
    }


def _network_sizes(weights: Weights) -> dict[str, Any]:
    """Return the arguments of the other networks of a `TokenFlow` that shapes tell."""
    levels = count_of(weights, CONV.format("encoder", "{}", 0))
    encoder = [len(weights[CONV.format("encoder", i, 0)]) for i in range(levels)]
    decoder = [len(weights[CONV.format("decoder", i, 0)]) for i in reversed(range(levels))]
    channels, decoder_channels = len(weights["encoder.conv_in.weight"]), gcd(*decoder)
    return {
        "teacher_dim": len(weights["semantic_decoder.head.2.bias"]),
        "semantic_depth": count_of(weights, "semantic_decoder.blocks.{}.ln_1.weight"),
        "channels": channels,
        "channel_multipliers": tuple(width // channels for width in encoder),
        "num_res_blocks": count_of(weights, CONV.format("encoder", 0, "{}")),
        "decoder_channels": decoder_channels,
        "decoder_channel_multipliers": tuple(width // decoder_channels for width in decoder),
        "decoder_res_blocks": count_of(weights, CONV.format("decoder", 0, "{}")) - 1,
        "z_channels": len(weights["encoder.conv_out.weight"]),
        "attention": "encoder.mid.1.q.weight" in weights,
    }
