"""FlexTok (Bachmann et al., 2025, arXiv:2502.13967): the published tokenizers, the autoencoders in
whose latents they draw, and the class-conditional generators of their tokens.

A file holds its tensors flat, the frozen autoencoder's among them. Generators of captions and
those of a grid of codes (GridTok) have other parts and are not read.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from vistok.checkpoints import kl
from vistok.checkpoints.files import Weights, load, rename
from vistok.checkpoints.llamagen import names_of
from vistok.errors import CheckpointError
from vistok.generators import LlamaGen
from vistok.quantizers import FSQ
from vistok.tokenizers import FlexTok, KLTokenizer
from vistok.tokens import TokenSpec

LEVELS = (8, 8, 8, 5, 5, 5)
VAE = "vae.vae."  # what the names of the autoencoder's tensors begin with, here and there
BLOCKS = (
    (r"\.attn\.wq\.", ".attention.q."),
    (r"\.attn\.wk\.", ".attention.k."),
    (r"\.attn\.wv\.", ".attention.v."),
    (r"\.attn\.", ".attention."),
    (r"\.attention\.proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".feed_forward.gate."),
    (r"\.mlp\.fc3\.", ".feed_forward.value."),
    (r"\.mlp\.fc2\.", ".feed_forward.out."),
)
JOINED = (("q", ("k", "v"), "qkv"), ("gate", ("value",), "gate_value"))
TOKENIZER = (
    (r"^(encoder|decoder)\.module_dict\.", r"\1."),
    (r"\.(enc|dec_noise)_patch_emb\.patch_proj\.", ".patches.proj."),
    (r"\.(enc_posemb_module|dec_patches_posemb_module)\.posembs$", ".patches.positions"),
    (r"\.enc_register_module\.registers$", ".registers"),
    (r"\.enc_to_latents\.proj\.", ".head."),
    (r"\.dec_from_latents\.proj\.", ".codes."),
    (r"\.dec_registers_posemb_module\.posembs$", ".positions"),
    (r"\.dec_nested_dropout\.dropout_mask_token$", ".mask_vector"),
    (r"\.dec_latent_dropout\.nullcond$", ".null_vector"),
    (r"\.dec_time_embedder\.mlp\.", ".time."),
    (r"\.dec_to_patches\.adaLN_modulation\.1\.", ".head_modulation."),
    (r"\.dec_to_patches\.proj\.", ".head."),
    (r"\.(enc|dec)_transformer\.", "."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    *BLOCKS,
)
GENERATOR = (
    (r"^models\.ar_image_model\.", ""),
    (r"^preprocessor\.embedding\.", "token_embedding."),
    (r"^preprocessor\.positional_embedding$", "position_table"),
    (r"^preprocessor\.", ""),
    (r"^trunk\.post_trunk_norm\.", "norm."),
    (r"^trunk\.", ""),
    (r"\.norm_1\.", ".attention_norm."),
    (r"\.norm_2\.", ".feed_forward_norm."),
    *BLOCKS,
)


def convert(
    weights: Weights, where: str = "weights", **options: Any
) -> FlexTok | KLTokenizer | LlamaGen:
    """Return the tokenizer, the autoencoder or the generator that has these weights; see
    `tokenizer`, `kl.tokenizer` and `generator` for the options of each."""
    if any(name.startswith("models.ar_image_model.") for name in weights):
        return generator(weights, where=where, **options)
    is_alone = "post_quant_conv.weight" in weights
    return (kl.tokenizer if is_alone else tokenizer)(weights, where=where, **options)


def tokenizer(
    weights: Weights,
    levels: Sequence[int] = LEVELS,
    image_size: int | Sequence[int] | None = None,
    patch_size: int = 2,
    head_dim: int = 64,
    decoder_head_dim: int | None = None,
    scaling_factor: float | None = None,
    norm_groups: int = 32,
    where: str = "weights",
    **arguments: Any,
) -> FlexTok:
    """Return the tokenizer that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names; without the autoencoder's, which begin
            with `vae.`, the model takes latents.
        levels: of each channel of the codes.
        image_size: pixels of a side, or (height, width), without an autoencoder of its latents;
            None for the largest that have places. Smaller ones have those of its upper left corner.
        patch_size: side of the squares of latents.
        head_dim: channels of an attention head of the encoder.
        decoder_head_dim: of the decoder; None for as many.
        scaling_factor: of the latents, which the file does not tell: that in the configuration of
            the autoencoder, as of EPFL-VILAB/flextok_vae_c16.
        norm_groups: of the autoencoder's group norms.
        where: what errors are about, as the file that was read.
        arguments: those of `FlexTok` that shapes do not tell: `encoder_mask`, `tail_drop`, ...

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    try:
        weights = join_matrices(rename(weights, TOKENIZER, where))
        weights["decoder.positions"] = weights["decoder.positions"][0, 0].t()
        of_vae = {k.removeprefix(VAE): v for k, v in weights.items() if k.startswith(VAE)}
        vae = kl.autoencoder(of_vae, scaling_factor, norm_groups=norm_groups) if of_vae else None
        side = patch_size * (1 if vae is None else vae.factor)
        places = [f"{part}.patches.positions" for part in ("encoder", "decoder")]
        largest = [side * n for n in map(min, *(weights[name].shape[2:] for name in places))]
        image_size = [image_size] * 2 if isinstance(image_size, int) else image_size or largest
        height, width = (pixels // side for pixels in image_size)
        for name in places:
            weights[name] = weights[name][0, :, :height, :width].permute(1, 2, 0).contiguous()
        sizes = {
            "image_size": list(image_size),
            "latent_channels": weights["decoder.head.bias"].numel() // patch_size**2,
            "num_tokens": len(weights["encoder.registers"]),
            "time_dim": weights["decoder.time.0.weight"].shape[1],
            **network_sizes(weights, "encoder", head_dim),
            **network_sizes(weights, "decoder", decoder_head_dim or head_dim),
        }
        sizes["null_condition"] = "learned" if "decoder.null_vector" in weights else "zero"
        kinds = weights["decoder.blocks.0.modulation.bias"].numel() // sizes["decoder_width"] // 6
        sizes["modulation"] = "apart" if kinds == 2 else "alike"
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a FlexTok ({error})") from error
    model = FlexTok(FSQ(list(levels)), vae, patch_size=patch_size, **sizes, **arguments)
    load(model, weights, where)
    return model


def generator(
    weights: Weights,
    num_heads: int | None = None,
    class_names: Sequence[str] | None = None,
    where: str = "weights",
    **transformer: Any,
) -> LlamaGen:
    """Return the class-conditional generator (FlexAR-C2I) that has these weights, as a `LlamaGen`.

    A class is added to the vector that begins a sequence, and the null class adds nothing: here
    each sum is a row of the table of classes.

    Args:
        weights: the tensors under their published names; those of a tokenizer beside them are left
            out.
        num_heads: attention heads; None for heads of 64 channels.
        class_names: in the order of the labels; None for ImageNet's or numbers.
        where: what errors are about, as the file that was read.
        transformer: arguments of `LlamaGen` that shapes do not tell, as rates of dropout.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    try:
        weights = join_matrices(rename(weights, GENERATOR, where))
        start = weights.pop("sos_token_embed").flatten()
        classes = weights.pop("cls_embedding.weight")
        table = weights.pop("position_table")
        vocab_size, dim = weights["token_embedding.weight"].shape
        hidden_dim = weights["blocks.0.feed_forward.out.weight"].shape[1]
        head_dim = weights.get("blocks.0.attention.q_norm.weight", torch.empty(64)).numel()
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{where}: not a class-conditional FlexAR ({error})") from error
    weights["condition.weight"] = torch.cat([classes + start, start[None]])
    # No pass feeds the last token, whose place the published table leaves out.
    weights["position_table"] = torch.nn.functional.pad(table, (0, 0, 0, 1))
    is_rms = "norm.bias" not in weights
    arguments = {
        "dim": dim,
        "depth": depth_of(weights, ""),
        "num_heads": num_heads or dim // head_dim,
        "hidden_dim": hidden_dim,
        "positions": "learned",
        "norm": "rms" if is_rms else "layer",
        "norm_eps": 1e-6 if is_rms else 1e-5,
        "qk_norm": "blocks.0.attention.q_norm.weight" in weights,
        **transformer,
    }
    spec = TokenSpec.ids((len(table),), vocab_size, ordered=True)
    model = LlamaGen(spec, list(class_names or names_of(len(classes))), **arguments)
    load(model, weights, where)
    return model


def join_matrices(weights: Weights) -> Weights:
    """Return the weights with one matrix for queries, keys and values, and one for gate and value
    of each block."""
    joined = {}
    for name, tensor in weights.items():
        for first, others, together in JOINED:
            stem, _, last = name.rpartition(".")
            block, _, part = stem.rpartition(".")
            if part == first:
                rest = [weights[f"{block}.{other}.{last}"] for other in others]
                joined[f"{block}.{together}.{last}"] = torch.cat([tensor, *rest])
            if part in (first, *others):
                break
        else:
            joined[name] = tensor
    return joined


def network_sizes(weights: Weights, part: str, head_dim: int) -> dict[str, int | float]:
    """Return the arguments of `FlexTok` that say how large the encoder or the decoder is."""
    width, hidden = weights[f"{part}.blocks.0.feed_forward.out.weight"].shape
    if width % head_dim:
        raise ValueError(f"width {width} is no multiple of heads of {head_dim} channels")
    # Several ratios lead to this width, of which the roundest is meant.
    ratios = (round(1.5 * hidden / width, digits) for digits in range(9))
    fitting = (ratio for ratio in ratios if int(2 * int(ratio * width) / 3) == hidden)
    return {
        f"{part}_width": width,
        f"{part}_depth": depth_of(weights, f"{part}."),
        f"{part}_heads": width // head_dim,
        f"{part}_mlp_ratio": next(fitting, 4.0),
    }


def depth_of(weights: Weights, prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", name) for name in weights)
    return 1 + max(int(match.group(1)) for match in found if match)
