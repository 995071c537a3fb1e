"""The importer of TokenFlow's tokenizers and of the image towers that they start from, on random
weights."""

import re

import pytest
import torch
import transformers

from vistok.checkpoints import tokenflow
from vistok.checkpoints.files import read_weights
from vistok.errors import CheckpointError, UserError
from vistok.layers.image_towers import CLIPTower, SigLIPTower
from vistok.quantizers import DualVQ, MultiScale
from vistok.tokenizers import TokenFlow

SIZES = {
    "teacher_dim": 10,
    "semantic_depth": 2,
    "semantic_heads": 2,
    "channels": 8,
    "channel_multipliers": (2, 1, 1),
    "num_res_blocks": 1,
    "z_channels": 12,
}
ENHANCED = {"decoder_channels": 12, "decoder_res_blocks": 2}
OPTIONS = {"scales": (1, 2, 4), "num_heads": 2, "semantic_heads": 2}
NAMES = (  # ours and the published, outside the image tower
    (r"^to_semantic\.", "encode_task_layer."),
    (r"^semantic_decoder\.head\.", "decode_task_layer."),
    (r"^semantic_decoder\.class_embedding", "decoder_vqkd.cls_token"),
    (r"^semantic_decoder\.positional_embedding", "decoder_vqkd.pos_embed"),
    (r"^semantic_decoder\.proj\.", "decoder_vqkd.patch_embed.proj."),
    (r"^semantic_decoder\.ln_post\.", "decoder_vqkd.fc_norm."),
    (r"^semantic_decoder\.", "decoder_vqkd."),
    (r"^(decoder_vqkd.*)\.ln_(\d)\.", r"\1.norm\2."),
    (r"^(decoder_vqkd.*)\.in_proj\.", r"\1.qkv."),
    (r"^(decoder_vqkd.*)\.out_proj\.", r"\1.proj."),
    (r"^(decoder_vqkd.*)\.c_fc\.", r"\1.fc1."),
    (r"^(decoder_vqkd.*)\.c_proj\.", r"\1.fc2."),
    (r"^(encoder\..*)\.resample\.", r"\1.downsample."),
    (r"^(decoder\..*)\.resample\.", r"\1.upsample."),
    (r"^semantic_encoder\.blocks\.", "encoder_vqkd.transformer.resblocks."),
    (r"^(encoder_vqkd.*)\.in_proj\.", r"\1.in_proj_"),
    (r"^semantic_encoder\.", "encoder_vqkd."),
)
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 18,
    "patch_size": 4,
}


def model_of(tower, image_size: int, **options) -> TokenFlow:
    torch.manual_seed(0)
    quantizer = MultiScale(
        DualVQ(40, 6, 3), (1, 2, 4), smoothers=0, jointly=False, scale_dropout=0.1
    )
    model = TokenFlow(quantizer, tower, image_size, 6, **SIZES | options).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if name.startswith("semantic_decoder") and name.endswith("in_proj.bias"):
            parameter.data.chunk(3)[1].zero_()
    return model


def published(model: TokenFlow) -> dict[str, torch.Tensor]:
    weights = {"quantize.codebook_used": torch.zeros(64)}
    for name, tensor in model.state_dict().items():
        if name.startswith("quantizer."):
            semantic, pixel = tensor.split((6, 3), dim=1)
            weights |= {"quantize.embedding_vqkd.weight": semantic}
            weights |= {"quantize.embedding_vqgan.weight": pixel}
            continue
        for ours, theirs in NAMES:
            name = re.sub(ours, theirs, name)
        if name.startswith("decoder_vqkd.") and name.endswith(".qkv.bias"):
            queries, _, values = tensor.chunk(3)
            weights |= {name.replace("qkv.", "q_"): queries, name.replace("qkv.", "v_"): values}
            continue
        if name == "decoder_vqkd.patch_embed.proj.weight":
            tensor = tensor[:, :, None, None]
        if name in ("decoder_vqkd.cls_token", "decoder_vqkd.pos_embed"):
            tensor = tensor.view(1, -1, tensor.shape[-1])
        weights[name] = tensor
    return weights


@pytest.fixture(params=[{}, ENHANCED], ids=["plain", "enhanced"])
def clip_b(request):
    return model_of(CLIPTower(4, 16, 2, 2, grid=4), 16, **request.param)


def assert_same(found: TokenFlow, model: TokenFlow) -> None:
    images = torch.rand(1, 3, *model.image_size)
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(w, expected[name]) for name, w in found.state_dict().items())
    assert torch.equal(found.eval().encode(images), model.encode(images))
    tokens = model.encode(images)
    assert torch.equal(found.decode(tokens), model.decode(tokens))


def test_clip_tokenizer(clip_b):
    found = tokenflow.convert(published(clip_b), **OPTIONS)
    assert_same(found, clip_b)
    assert found.quantizer.scale_dropout == 0.1
    staged = tokenflow.convert(published(clip_b), stage=2, vq={"commitment": 0.5}, **OPTIONS)
    assert staged.quantizer.quantizer.commitment == 0.5
    assert not staged.quant_conv.weight.requires_grad


def test_clip_tokenizer_at_another_size(clip_b):
    wide = tokenflow.convert(published(clip_b), image_size=24, **OPTIONS | {"scales": (1, 2, 4, 6)})
    same = clip_b.at(24, (1, 2, 4, 6))
    images = torch.rand(1, 3, 24, 24)
    assert torch.equal(wide.eval().encode(images), same.encode(images))


def test_siglip_tokenizer():
    """Its last layer, norm and head are in the file, and nowhere in the model."""
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP)).eval()
    state = tower.state_dict()
    model = model_of(SigLIPTower(4, 16, 2, 2, 20, grid=4), 18)
    weights = {k: w for k, w in published(model).items() if not k.startswith("encoder_vqkd.")} | {
        f"encoder_vqkd.vision_model.{name}": tensor for name, tensor in state.items()
    }
    weights |= {f"scaling_layer.{name}": torch.ones(1, 3, 1, 1) for name in ("shift", "scale")}
    found = tokenflow.convert(weights, image_size=18, **OPTIONS).eval()
    images = torch.rand(2, 3, 18, 18)
    expected = tower(2 * images - 1, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(found.semantic_encoder(images), expected)
    assert len(found.semantic_encoder.blocks) == 2
    del weights["encoder_vqkd.vision_model.encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing .* semantic_encoder.blocks.1.mlp.c_fc"):
        tokenflow.convert(weights, image_size=18, **OPTIONS)


def test_every_tensor_must_fit(clip_b):
    weights = published(clip_b)
    for name in ("encoder.mid.1.q.bias", "encoder_vqkd.ln_post.bias", "decoder_vqkd.cls_token"):
        rest = {k: w for k, w in weights.items() if k != name}
        with pytest.raises(CheckpointError):
            tokenflow.convert(rest, **OPTIONS)
    with pytest.raises(CheckpointError, match=r"1 unexpected .* for TokenFlow: extra"):
        tokenflow.convert(weights | {"extra.weight": torch.zeros(1)}, **OPTIONS)
    misshapen = weights | {"post_quant_conv.bias": torch.zeros(5)}
    with pytest.raises(CheckpointError, match="1 mismatched"):
        tokenflow.convert(misshapen, **OPTIONS)
    with pytest.raises(CheckpointError, match="neither a tokenizer of TokenFlow nor"):
        tokenflow.convert({"a": torch.zeros(1)})
    with pytest.raises(UserError, match="grid of 4x4 are not known, only those of 14, 16, 27"):
        tokenflow.convert(weights, **OPTIONS | {"scales": None})


@pytest.mark.parametrize("entry", tokenflow.ENTRIES)
def test_files_hold_weights_under_one_of_three_names(clip_b, tmp_path, entry):
    content = {entry: published(clip_b), "optimizer": {"state": {}}, "steps": 3}
    if entry == "ema":
        content["model"] = {"other": torch.zeros(1)}
    torch.save(content, tmp_path / "a.pt")
    weights = read_weights(tmp_path / "a.pt", tokenflow.ENTRIES)
    assert_same(tokenflow.convert(weights, **OPTIONS), clip_b)


def test_a_new_tokenizer_starts_from_clip():
    small = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small | {"num_hidden_layers": 1, "vocab_size": 8, "eos_token_id": 1},
        vision_config=small | {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4},
        projection_dim=10,
    )
    clip = transformers.CLIPModel(config).eval()
    weights = clip.state_dict()
    options = {"scales": (1, 2, 4), "num_heads": 2, "vocab_size": 40}
    model = tokenflow.convert(weights, **options, **SIZES | {"semantic_heads": 4})
    images = torch.rand(2, 3, 16, 16)
    whole = clip.vision_model(2 * images - 1).last_hidden_state
    expected = clip.vision_model.post_layernorm(whole)[:, 1:]
    torch.testing.assert_close(model.semantic_encoder(images), expected)
    assert model(images).features.shape == (2, 4, 4, 10)
    other = tokenflow.initial(weights, **options, semantic_heads=4, channel_multipliers=(1, 1, 1))
    assert other.semantic_decoder.head[2].out_features == 512, "as of the published CLIP"
    with pytest.raises(CheckpointError, match="1 missing"):
        tokenflow.convert(
            {k: w for k, w in weights.items() if "pre_layrnorm.bias" not in k}, **options
        )


def test_a_new_tokenizer_starts_from_siglip():
    text = SIGLIP | {"vocab_size": 8, "max_position_embeddings": 8}
    del text["image_size"], text["patch_size"]
    whole = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=SIGLIP)
    ).eval()
    model = tokenflow.initial(
        whole.state_dict(), 18, (1, 2, 4), num_heads=2, vocab_size=40, **SIZES
    )
    images = torch.rand(2, 3, 18, 18)
    seen = whole.vision_model(2 * images - 1, output_hidden_states=True)
    torch.testing.assert_close(model.semantic_encoder(images), seen.hidden_states[-2])


def test_published_sizes_are_the_defaults():
    for tower, size, tokens in (
        (CLIPTower(16, 16, 1, 1, grid=14), 224, 561),
        (CLIPTower(16, 16, 1, 1, grid=14), 256, 817),
        (SigLIPTower(14, 16, 1, 1, 20, grid=27), 384, 2227),
    ):
        assert tokenflow._image_size(tower) == (size if size != 256 else 224)
        quantizer = tokenflow._quantizer(tower, size, None, 0.1, vocab_size=8)
        assert quantizer.spec((size // tower.patch_size,) * 2).num_tokens == tokens
