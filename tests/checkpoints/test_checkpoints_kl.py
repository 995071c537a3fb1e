"""Autoencoders under the names of latent diffusion and of diffusers."""

import json
import re

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from vistok.checkpoints.kl import diffusers, mar
from vistok.errors import CheckpointError
from vistok.quantizers import Gaussian
from vistok.tokenizers import KLAutoencoder, KLTokenizer

LATENT_DIFFUSION = (
    (r"^vae\.vae\.", ""),
    (r"^encoder\.down_blocks\.", "encoder.down."),
    (r"\.mid_block\.resnets\.0", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
LEVELS = 3


def tiny(scaling_factor=0.2325, **changes) -> KLTokenizer:
    vae = KLAutoencoder(4, [8, 16, 12], 1, 4, scaling_factor, **changes)
    return KLTokenizer(Gaussian(4), vae, (8, 16)).eval()


def published(model: KLTokenizer) -> dict[str, torch.Tensor]:
    """Return the weights of a model under the names of latent diffusion."""
    weights = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(
            r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{LEVELS - 1 - int(m[1])}", name
        )
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        for pattern, replacement in LATENT_DIFFUSION:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    return weights


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_attention": [2]},
        {"encoder_attention": [0, 1], "decoder_attention": [0, 2]},
        {"mid_attention": False},
    ],
)
def test_the_file_tells_sizes_and_places_of_attention(changes):
    model = tiny(**changes)
    weights = published(model)
    assert "decoder.up.2.upsample.conv.weight" in weights
    found = mar(weights, [8, 16], norm_groups=4)
    assert found.arguments["vae"] == model.arguments["vae"]
    pictures = torch.rand(2, 3, 8, 16)
    assert torch.equal(found.eval().encode(pictures), model.encode(pictures))
    tokens = model.encode(pictures)
    assert torch.equal(found.decode(tokens), model.decode(tokens))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"decoder.up.1.block.0.conv1.weight": None}, {}, "1 missing"),
        ({"decoder.up.1.attn.0.norm.bias": torch.zeros(16)}, {}, "missing"),
        ({"loss.logvar": torch.zeros(())}, {}, "1 unexpected"),
        ({"encoder.down.0.block.0.conv1.weight": None}, {}, "not an AutoencoderKL"),
        ({}, {"norm_groups": 3}, "not an AutoencoderKL"),
        ({}, {"image_size": 10}, "must be divisible by 4"),
    ],
)
def test_refuses_what_does_not_fit(change, options, message):
    weights = published(tiny()) | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as raised:
        mar(weights, **({"image_size": [8, 16], "norm_groups": 4} | options), where="vae.ckpt")
    assert "image_size" in options or "vae.ckpt" in str(raised.value)


ATTENTION = {
    "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
FACTORS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
SAVED = {
    "sd": ({}, 0.18215, 0.0),
    "sd3": (
        {"use_quant_conv": False, "use_post_quant_conv": False, "layers_per_block": 2, **FACTORS},
        1.5305,
        0.0609,
    ),
    "attention": (ATTENTION, 0.18215, 0.0),
    "no-mid-attention": ({"mid_block_add_attention": False, "norm_num_groups": 2}, 0.18215, 0.0),
    "per-channel": (
        {"latents_mean": [0.5, -1.0], "latents_std": [2.0, 4.0], "scaling_factor": 0.5},
        [0.25, 0.125],
        [0.5, -1.0],
    ),
}


def saved(folder, **changes) -> AutoencoderKL:
    sizes = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "latent_channels": 2,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    vae = AutoencoderKL(**(sizes | changes)).eval()
    vae.save_pretrained(folder)
    return vae


@torch.inference_mode()
@pytest.mark.parametrize(("changes", "scale", "shift"), SAVED.values(), ids=SAVED)
def test_reads_what_diffusers_saves(changes, scale, shift, tmp_path):
    theirs = saved(tmp_path, **changes)
    model = diffusers(str(tmp_path)).eval()
    assert model.image_size == (16, 16)
    pictures = torch.rand(2, 3, 16, 16)
    mean = theirs.encode(2 * pictures - 1).latent_dist.mode()
    scale, shift = (torch.tensor(n).reshape(-1, 1, 1) for n in (scale, shift))
    torch.testing.assert_close(model.vae.encode(pictures), (mean - shift) * scale)
    tokens = torch.randn(2, *model.spec.tensor_shape)
    latents = tokens.movedim(-1, 1) / scale + shift
    expected = (theirs.decode(latents).sample + 1) / 2
    torch.testing.assert_close(model.decode(tokens), expected.clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_older_names_of_attention(tmp_path):
    theirs = saved(tmp_path / "pipeline" / "vae")
    file = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    for new, old in older.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    model = diffusers(str(tmp_path / "pipeline"), image_size=[8, 4], subfolder="vae")
    assert model.image_size == (8, 4)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[f"vae.vae.{name}"], tensor)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "holds UNet2DModel"),
        ({"act_fn": "relu"}, "activation relu; expected silu"),
        ({"use_quant_conv": True, "layers_per_block": 2}, "missing keys"),
        ({"layers_per_block": 0}, "unexpected keys|not readable"),
        ({"latent_channels": 3}, "not readable"),
    ],
)
def test_a_directory_that_does_not_fit_itself(spoil, message, tmp_path):
    saved(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | spoil))
    with pytest.raises(CheckpointError, match=message):
        diffusers(str(tmp_path))


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="expected a directory or Hub repository"):
        diffusers(str(tmp_path / "none"))
