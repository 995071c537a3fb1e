"""KL autoencoders: MAR's KL-16 (Li et al., 2024, arXiv:2406.11838), which TokenBridge, xAR and
FlowAR share, under the names of latent diffusion (Rombach et al., 2021, arXiv:2112.10752), and
diffusers' `AutoencoderKL` (Stable Diffusion, SD3, FLUX)."""

import re
from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL

from vistok.checkpoints.files import Weights, load, rename
from vistok.errors import CheckpointError
from vistok.quantizers import Gaussian
from vistok.tokenizers import KLAutoencoder, KLTokenizer

RULES = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
Numbers = float | Sequence[float]


def mar(
    weights: Weights,
    image_size: int | Sequence[int] = 256,
    scaling_factor: Numbers = 0.2325,
    norm_groups: int = 32,
    where: str = "weights",
) -> KLTokenizer:
    """Return the tokenizer of latent diffusion's autoencoder that has these weights (kl16.ckpt),
    its sizes and the places of its attention read from their names and shapes; for the arguments
    see `tokenizer`. Raises `CheckpointError` if a tensor is missing, superfluous or of another
    shape."""
    levels = {int(m[1]) for name in weights if (m := re.match(r"decoder\.up\.(\d+)\.", name))}
    # Its decoder counts levels from full resolution, diffusers' from the latents.
    turned = [
        (rf"^decoder\.up\.{level}\.", f"decoder.up_blocks.{max(levels) - level}.")
        for level in levels
    ]
    weights = rename(weights, [*turned, *RULES], where)
    for name, tensor in weights.items():
        if ".attentions." in name and tensor.ndim == 4:  # maps that were written as convolutions
            weights[name] = tensor.flatten(1)
    return tokenizer(weights, image_size, scaling_factor, norm_groups=norm_groups, where=where)


def diffusers(
    path: str, image_size: int | Sequence[int] | None = None, subfolder: str | None = None
) -> KLTokenizer:
    """Return the tokenizer of a saved `AutoencoderKL`.

    Args:
        path: directory or Hub repository with its config.json and weights.
        image_size: pixels of a side, or (height, width); None for the `sample_size` it names.
        subfolder: of `path`, as the vae of a pipeline.

    Raises `CheckpointError` for what is no such model, does not fit its own configuration, or makes
    its pictures otherwise.
    """
    where = str(Path(path, subfolder or ""))
    expected = "expected a directory or Hub repository with diffusers' AutoencoderKL"
    try:
        config = AutoencoderKL.load_config(path, subfolder=subfolder)
        if config.get("_class_name") != "AutoencoderKL":
            raise CheckpointError(f"{where}: holds {config.get('_class_name')}; {expected}")
        vae, problems = AutoencoderKL.from_pretrained(
            path, subfolder=subfolder, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{where}: not readable ({reason}); {expected}") from error
    for problem, names in problems.items():
        if names:
            raise CheckpointError(f"{where}: {problem.replace('_', ' ')}, as {sorted(names)[0]}")
    config = vae.config
    if config.act_fn not in ("silu", "swish"):
        raise CheckpointError(f"{where}: activation {config.act_fn}; expected silu")
    # latents_mean and latents_std, where given, come on top of the two factors.
    shift, scale = config.latents_mean or config.shift_factor or 0.0, config.scaling_factor
    if config.latents_std:
        scale = [scale / deviation for deviation in config.latents_std]
    size = image_size or config.sample_size
    return tokenizer(vae.state_dict(), size, scale, shift, config.norm_num_groups, where)


def tokenizer(
    weights: Weights,
    image_size: int | Sequence[int] = 256,
    scaling_factor: Numbers | None = None,
    shift_factor: Numbers = 0.0,
    norm_groups: int = 32,
    where: str = "weights",
) -> KLTokenizer:
    """Return the tokenizer of the `AutoencoderKL` that has these weights, under diffusers' names.

    Args:
        weights: the tensors by name.
        image_size: pixels of a side, or (height, width).
        scaling_factor: what latents are multiplied by, which the weights do not tell.
        shift_factor: what is taken off them before.
        norm_groups: of the group norms.
        where: what errors are about, as the file that was read.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    try:
        vae = autoencoder(weights, scaling_factor, shift_factor, norm_groups)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{where}: not an AutoencoderKL ({error})") from error
    model = KLTokenizer(Gaussian(vae.latent_channels), vae, image_size)
    load(model, {f"vae.vae.{name}": tensor for name, tensor in weights.items()}, where)
    return model


def autoencoder(
    weights: Weights,
    scaling_factor: Numbers | None,
    shift_factor: Numbers = 0.0,
    norm_groups: int = 32,
) -> KLAutoencoder:
    """Return an autoencoder of the sizes of these weights, under diffusers' names; raise `KeyError`
    or `ValueError` for what does not make one."""

    def numbers(pattern: str) -> list[int]:
        return sorted({int(m[1]) for name in weights if (m := re.match(pattern, name))})

    if scaling_factor is None:
        raise ValueError("its autoencoder needs scaling_factor: give that of its config.json")
    levels = numbers(r"encoder\.down_blocks\.(\d+)\.")
    up_blocks = numbers(r"decoder\.up_blocks\.(\d+)\.attentions\.")
    first_convs = (f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in levels)
    return KLAutoencoder(
        weights["decoder.conv_in.weight"].shape[1],
        [len(weights[name]) for name in first_convs],
        len(numbers(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")),
        norm_groups,
        scaling_factor,
        shift_factor,
        encoder_attention=numbers(r"encoder\.down_blocks\.(\d+)\.attentions\."),
        decoder_attention=sorted(len(levels) - 1 - block for block in up_blocks),
        mid_attention="encoder.mid_block.attentions.0.to_q.weight" in weights,
        quant_conv="quant_conv.weight" in weights,
        post_quant_conv="post_quant_conv.weight" in weights,
    )
