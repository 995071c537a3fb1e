import re

import pytest
import torch

from vistok import VQ, ConvTokenizer
from vistok.checkpoints import llamagen_vq
from vistok.errors import CheckpointError, UserError


def tokenizer(**options) -> ConvTokenizer:
    settings = {
        "image_size": 16,
        "channels": 32,
        "channel_multipliers": [1, 2, 1],
        "decoder_channel_multipliers": [1, 2, 1],
        "num_res_blocks": 1,
        "z_channels": 12,
    }
    return ConvTokenizer(VQ(40, 6), **settings | options)


def published(model: ConvTokenizer) -> dict[str, torch.Tensor]:
    """The model's tensors under LlamaGen's names."""
    weights = {"quantize.codebook_used": torch.zeros(65536)}
    for name, tensor in model.state_dict().items():
        name = name.replace("quantizer.", "quantize.")
        step = "down" if name.startswith("encoder.") else "up"
        weights[name.replace("resample", f"{step}sample")] = tensor
    return weights


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channel_multipliers": [2, 1, 3], "decoder_channel_multipliers": [3, 1, 2]},
        {"num_res_blocks": 2, "attention": False},
        {"channel_multipliers": [1], "decoder_channel_multipliers": [2]},
    ],
)
def test_sizes_are_read_from_shapes(options):
    model = tokenizer(**options)
    imported = llamagen_vq.tokenizer(published(model), image_size=16)
    assert imported.fingerprint() == model.fingerprint()


def test_what_shapes_do_not_tell_is_given():
    weights = published(tokenizer())
    imported = llamagen_vq.tokenizer(weights, (16, 32), l2_normalise=False, entropy=0.1)
    assert imported.image_size == (16, 32)
    assert not imported.quantizer.l2_normalise and imported.quantizer.entropy == 0.1
    with pytest.raises(UserError, match="image_size 18x18 must be divisible by 4"):
        llamagen_vq.tokenizer(weights, 18)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("decoder.norm_out.bias", None, "1 missing tensor(s) for ConvTokenizer: decoder.norm_out."),
        ("encoder.conv_in.weight", None, "not a VQ tokenizer of LlamaGen"),
        ("quantize.embedding.weight", torch.zeros(3), "not a VQ tokenizer of LlamaGen"),
        ("encoder.conv_in.weight", torch.zeros(48, 3, 3, 3), "expected multiples of 48"),
        ("decoder.conv_blocks.0.attn.0.q.weight", None, "1 missing tensor(s)"),
        ("cls_embedding.weight", torch.zeros(1), "1 unexpected tensor(s)"),
        ("quant_conv.weight", torch.zeros(5, 12, 1, 1), "1 mismatched tensor(s)"),
    ],
)
def test_other_weights_are_refused(name, tensor, message):
    weights = published(tokenizer())
    weights.pop(name, None)
    if tensor is not None:
        weights[name] = tensor
    with pytest.raises(CheckpointError, match=f"vq.pt: .*{re.escape(message)}"):
        llamagen_vq.tokenizer(weights, 16, where="vq.pt")
