"""TiTok (Yu et al., 2024, arXiv:2406.07550), TA-TiTok (Kim et al., 2025, arXiv:2501.07730),
One-D-Piece (Miwa et al., 2025, arXiv:2501.10064) and the MaskGIT-VQGAN that they start from: flat
files of averaged weights, told apart by what each holds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vistok.checkpoints.files import Weights, load, read_weights, rename
from vistok.checkpoints.llamagen_vq import count_of
from vistok.errors import CheckpointError
from vistok.quantizers import VQ, Gaussian, Quantizer
from vistok.tokenizers import MaskGITVQGAN, TiTok, TwoStageTiTok

VQGAN_RULES = (
    (r"\b(?:down|up)\.(\d+)\.block\.", r"levels.\1."),
    (r"\bup\.(\d+)\.upsample_conv\.", r"resample.\1.conv."),
    (r"^quantize\.", "quantizer."),
)
RULES = (
    (r"^pixel_quantize\.", "vqgan.quantizer."),
    (r"^pixel_", "vqgan."),
    (r"\.attn\.in_proj_", ".attn.in_proj."),
    (r"^encoder\.conv_out\.", "encoder.proj_out."),
    (r"^decoder\.ffn\.0\.", "decoder.head.proj."),
    (r"^decoder\.(?:ffn\.2|conv_out)\.", "decoder.head.conv_out."),
    *VQGAN_RULES,
)
HEAD_DIM = 64  # channels of an attention head in every published model


def convert(weights: Weights, where: str = "weights", **options: Any) -> TiTok | MaskGITVQGAN:
    """Return the tokenizer that has these weights; see `titok` and `maskgit_vqgan` for the options
    of each."""
    is_titok = "latent_tokens" in weights
    return (titok if is_titok else maskgit_vqgan)(weights, where=where, **options)


def maskgit_vqgan(
    weights: Weights,
    image_size: int | Sequence[int] = 256,
    where: str = "weights",
    **vq: bool | float,
) -> MaskGITVQGAN:
    """Return the VQGAN that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        image_size: pixels of a side, or (height, width).
        where: what errors are about, as the file that was read.
        vq: arguments of `VQ` that shapes do not tell, for training.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    weights = rename(weights, VQGAN_RULES, where)
    try:
        multipliers, channels, num_res_blocks = _vqgan_sizes(weights, "")
        vocab_size, dim = weights["quantizer.embedding.weight"].shape
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: neither a TiTok nor a MaskGIT-VQGAN (no usable tensor {error})"
        ) from error
    quantizer = VQ(vocab_size, dim, **{"l2_normalise": False} | vq)
    model = MaskGITVQGAN(quantizer, image_size, channels, multipliers, num_res_blocks)
    load(model, weights, where)
    return model


def titok(
    weights: Weights,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    tail_drop: str | None = None,
    vqgan: str | Path | Weights | None = None,
    where: str = "weights",
    **quantizer: bool | float,
) -> TiTok:
    """Return the TiTok that has these weights: a `TwoStageTiTok` if it predicts proxy codes, of the
    stage that the weights tell; sizes are read from their shapes.

    Args:
        weights: the tensors under their published names.
        encoder_heads: attention heads of the encoder; None for one per 64 channels.
        decoder_heads: the same for the decoder.
        tail_drop: how the model was trained to decode from any prefix, see `TailDrop`:
            "uniform(1,255)" for the released One-D-Piece, None for TiTok.
        vqgan: the MaskGIT-VQGAN, as a file or its tensors, without which a model of the first stage
            can neither decode nor train.
        where: what errors are about, as the file that was read.
        quantizer: arguments of `VQ` or `Gaussian` that shapes do not tell: `l2_normalise` (by
            default True in two stages, False in one), and for training `commitment`, `revival`,
            `kl`.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    two_stage = "decoder.ffn.2.weight" in weights
    weights = rename(weights, RULES, where)
    try:
        # Published as a 1x1 convolution, and with an axis more.
        weights["encoder.proj_out.weight"] = weights["encoder.proj_out.weight"].flatten(1)
        weights["decoder.mask_token"] = weights["decoder.mask_token"].flatten(0, 1)
        arguments = _sizes(weights)
        bottleneck = _quantizer(weights, {"l2_normalise": two_stage} | quantizer)
        if two_stage:
            stage = 2 if "vqgan.decoder.conv_in.weight" in weights else 1
            if vqgan is not None and stage == 1:
                weights |= _vqgan_weights(vqgan, where)
            arguments |= {"stage": stage} | _proxy_sizes(weights)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: not a TiTok (no usable tensor {error})") from error
    if vqgan is not None and arguments.get("stage") != 1:
        raise CheckpointError(f"{where}: decodes to pixels itself, and takes no vqgan")
    for side, heads in (("encoder", encoder_heads), ("decoder", decoder_heads)):
        arguments[f"{side}_heads"] = heads or max(1, arguments[f"{side}_width"] // HEAD_DIM)
    family = TwoStageTiTok if two_stage else TiTok
    model = family(bottleneck, tail_drop=tail_drop, **arguments)
    load(model, weights, where)
    return model


def _quantizer(weights: Weights, options: dict[str, bool | float]) -> Quantizer:
    """Return the bottleneck. How often codes were used lately matters to training alone."""
    dim = weights["decoder.decoder_embed.weight"].shape[1]
    if "quantizer.embedding.weight" not in weights:
        return Gaussian(dim, **{k: v for k, v in options.items() if k != "l2_normalise"})
    vq = VQ(len(weights["quantizer.embedding.weight"]), dim, **options)
    if vq.revival:
        weights.setdefault("quantizer.embed_prob", vq.embed_prob)
    else:
        weights.pop("quantizer.embed_prob", None)
    return vq


def _sizes(weights: Weights) -> dict[str, Any]:
    """Return the arguments of a `TiTok` that shapes tell."""
    num_latent_tokens, encoder_width = weights["latent_tokens"].shape
    patch_size = weights["encoder.patch_embed.weight"].shape[-1]
    patches, decoder_patches = (
        math.isqrt(len(weights[f"{side}.positional_embedding"]) - 1)
        for side in ("encoder", "decoder")
    )
    block = "{}.transformer.{}.ln_1.weight"
    sizes = {
        "image_size": patches * patch_size,
        "patch_size": patch_size,
        "num_latent_tokens": num_latent_tokens,
        "encoder_width": encoder_width,
        "encoder_depth": count_of(weights, block.format("encoder", "{}")),
        "decoder_width": weights["decoder.mask_token"].shape[-1],
        "decoder_depth": count_of(weights, block.format("decoder", "{}")),
        "decoder_patch_size": patches * patch_size // decoder_patches,
    }
    if "decoder.text_guidance_proj.weight" in weights:
        length = len(weights["decoder.text_guidance_positional_embedding"])
        channels = weights["decoder.text_guidance_proj.weight"].shape[1]
        sizes |= {"text_length": length, "text_dim": channels}
    return sizes


def _proxy_sizes(weights: Weights) -> dict[str, Any]:
    """Return the further arguments of a `TwoStageTiTok`."""
    sizes = {"num_proxy_codes": len(weights["decoder.head.conv_out.weight"])}
    if "vqgan.decoder.conv_in.weight" not in weights:
        return sizes | {"vqgan_channels": None}
    multipliers, channels, num_res_blocks = _vqgan_sizes(weights, "vqgan.")
    return sizes | {
        "vqgan_channels": channels,
        "vqgan_channel_multipliers": multipliers,
        "vqgan_res_blocks": num_res_blocks,
        "vqgan_dim": weights["vqgan.quantizer.embedding.weight"].shape[1],
    }


def _vqgan_sizes(weights: Weights, prefix: str) -> tuple[list[int], int, int]:
    """Return multipliers, channels and residual blocks of a VQGAN, whose decoder tells them but for
    the unit of the multipliers."""
    block = prefix + "decoder.levels.{}.{}.conv1.weight"
    levels = range(count_of(weights, block.format("{}", 0)))
    widths = [len(weights[block.format(level, 0)]) for level in levels]
    stem = f"{prefix}encoder.conv_in.weight"
    channels = len(weights[stem]) if stem in weights else math.gcd(*widths)
    if not widths or any(width % channels for width in widths):
        raise ValueError(f"decoder.up with levels of {widths} channels, in units of {channels}")
    multipliers = [width // channels for width in widths]
    return multipliers, channels, count_of(weights, block.format(0, "{}"))


def _vqgan_weights(vqgan: str | Path | Weights, where: str) -> Weights:
    found = vqgan if isinstance(vqgan, dict) else read_weights(vqgan)
    return {f"vqgan.{k}": v for k, v in rename(found, VQGAN_RULES, where).items()}
