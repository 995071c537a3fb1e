"""The importers of FlexTok, its autoencoder and its generator, on weights in their layout."""

import re

import pytest
import torch

from vistok.checkpoints.flextok import convert
from vistok.decoding import Decoding, Noise, decode
from vistok.errors import CheckpointError
from vistok.quantizers import FSQ
from vistok.tokenizers import FlexTok, KLAutoencoder, KLTokenizer

TINY = {
    "image_size": [8, 12],
    "latent_channels": 3,
    "num_tokens": 6,
    "encoder_width": 32,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "decoder_width": 48,
    "decoder_depth": 3,
    "decoder_heads": 3,
    "time_dim": 10,
}
OPTIONS = {"levels": [5, 3], "head_dim": 16}
NAMES = (
    (r"\.patches\.positions$", "enc_posemb_module.posembs", "dec_patches_posemb_module.posembs"),
    (r"\.patches\.", "enc_patch_emb.patch_", "dec_noise_patch_emb.patch_"),
    (r"\.registers$", "enc_register_module.registers", ""),
    (r"\.head\.", "enc_to_latents.proj.", "dec_to_patches.proj."),
    (r"\.head_modulation\.", "", "dec_to_patches.adaLN_modulation.1."),
    (r"\.codes\.", "", "dec_from_latents.proj."),
    (r"\.positions$", "", "dec_registers_posemb_module.posembs"),
    (r"\.mask_vector$", "", "dec_nested_dropout.dropout_mask_token"),
    (r"\.null_vector$", "", "dec_latent_dropout.nullcond"),
    (r"\.time\.", "", "dec_time_embedder.mlp."),
    (r"\.blocks\.", "enc_transformer.blocks.", "dec_transformer.blocks."),
)


def published(model):
    """The tensors of a model under the published names."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("vae."):
            weights[name] = tensor
            continue
        for pattern, encoder, decoder in NAMES:
            if re.search(pattern, name):
                theirs = encoder if name.startswith("encoder") else decoder
                name = re.sub(pattern, ".module_dict." + theirs, name)
                break
        name = name.replace(".attention.out.", ".attn.proj.").replace(".out.", ".fc2.")
        name = name.replace(".modulation.", ".adaLN_modulation.1.").replace(".attention.", ".attn.")
        name = name.replace(".feed_forward.", ".mlp.")
        if name.endswith("_module.posembs"):
            tensor = tensor.t()[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
            tensor = tensor[None]
        for joined, parts in (("attn.qkv", "wq wk wv"), ("mlp.gate_value", "fc1 fc3")):
            if joined in name:
                block, parts = joined.split(".")[0], parts.split()
                for part, share in zip(parts, tensor.chunk(len(parts)), strict=True):
                    weights[name.replace(joined, f"{block}.{part}")] = share
                break
        else:
            weights[name] = tensor
    return weights


def tiny(vae=None, **changes):
    model = FlexTok(FSQ([5, 3]), vae, **(TINY | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"null_condition": "zero", "modulation": "alike", "encoder_mask": "causal"},
        {"decoder_heads": 2},
        {"encoder_mlp_ratio": 2.5, "decoder_mlp_ratio": 3.0, "patch_size": 1, "time_dim": 11},
    ],
)
def test_the_file_tells_the_sizes(changes):
    model = tiny(**changes)
    shapes_do_not_tell = {k: changes[k] for k in ("encoder_mask", "patch_size") if k in changes}
    if "decoder_heads" in changes:
        shapes_do_not_tell["decoder_head_dim"] = 24
    found = convert(published(model), **OPTIONS, **shapes_do_not_tell)
    assert found.fingerprint() == model.fingerprint()


def test_the_autoencoder_comes_along_and_alone():
    vae = KLAutoencoder(3, [4, 8], layers_per_block=1, norm_groups=2, scaling_factor=0.7)
    model, options = tiny(vae, image_size=16), {"scaling_factor": 0.7, "norm_groups": 2}
    weights = published(model)
    found = convert(dict(weights), **OPTIONS, **options)
    assert found.arguments == model.arguments | {"image_size": [16, 16]}
    pictures = torch.rand(2, 3, 16, 16)
    tokens = model.encode(pictures)
    assert torch.equal(found.encode(pictures), tokens)
    torch.testing.assert_close(found.decode(tokens), model.decode(tokens))
    alone = {k.removeprefix("vae.vae."): v for k, v in weights.items() if k.startswith("vae.")}
    stage0 = convert(alone, image_size=16, **options)
    assert isinstance(stage0, KLTokenizer)
    torch.testing.assert_close(
        stage0.encode(pictures).permute(0, 3, 1, 2), model.vae.encode(pictures)
    )
    with pytest.raises(CheckpointError, match="needs scaling_factor"):
        convert(weights, **OPTIONS)
    with pytest.raises(CheckpointError, match="needs scaling_factor"):
        convert(alone)


def test_smaller_images_have_the_places_of_the_corner():
    model = tiny()
    small = convert(published(model), image_size=[4, 6], **OPTIONS).eval()
    latents = torch.randn(2, 3, 4, 6)
    assert torch.equal(small.encode_latents(latents), model.encode_latents(latents))
    assert small.decode_latents(small.encode_latents(latents)).shape == latents.shape


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"encoder.module_dict.enc_register_module.registers": None}, {}, "not a FlexTok"),
        ({"decoder.module_dict.dec_from_latents.proj.bias": None}, {}, "1 missing"),
        ({"encoder.module_dict.more": torch.zeros(2)}, {}, "1 unexpected"),
        ({}, {"levels": [5, 3, 3]}, "mismatched"),
        ({}, {"head_dim": 64}, "no multiple of heads of 64"),
    ],
)
def test_what_does_not_fit_is_an_error_of_one_line(change, options, message):
    weights = published(tiny()) | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message) as error:
        convert(weights, where="file", **(OPTIONS | options))
    assert str(error.value).startswith("file: ") and "\n" not in str(error.value)


DIM, VOCAB, CLASSES, TOKENS = 64, 11, 4, 5


def published_generator(norm, qk_norm):
    shapes = {
        "preprocessor.embedding.weight": (VOCAB, DIM),
        "preprocessor.cls_embedding.weight": (CLASSES, DIM),
        "preprocessor.sos_token_embed": (1, 1, DIM),
        "preprocessor.positional_embedding": (TOKENS, DIM),
        "head.linear.weight": (VOCAB, DIM),
    }
    norms = ["trunk.post_trunk_norm"]
    for i in range(2):
        block = f"trunk.blocks.{i}"
        norms += [f"{block}.norm_1", f"{block}.norm_2"]
        shapes |= {
            f"{block}.attn.qkv.weight": (3 * DIM, DIM),
            f"{block}.attn.proj.weight": (DIM, DIM),
        }
        shapes |= {f"{block}.mlp.{fc}.weight": (96, DIM) for fc in ("fc1", "fc3")}
        shapes[f"{block}.mlp.fc2.weight"] = (DIM, 96)
        if qk_norm:
            shapes |= {f"{block}.attn.{x}_norm.weight": (16,) for x in "qk"}
    shapes |= {f"{name}.weight": (DIM,) for name in norms}
    if norm == "layer":
        shapes |= {f"{name}.bias": (DIM,) for name in norms}
    return {f"models.ar_image_model.{k}": torch.randn(v) / 8 for k, v in shapes.items()}


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_generator(norm, qk_norm):
    weights = published_generator(norm, qk_norm)
    model = convert(dict(weights), **({} if qk_norm else {"num_heads": 4})).eval()
    assert (model.config.norm, model.config.qk_norm, model.config.num_heads) == (norm, qk_norm, 4)
    assert model.spec.has_prefixes and model.spec.shape == (TOKENS,)
    prefix = "models.ar_image_model.preprocessor."
    start = weights[f"{prefix}sos_token_embed"][0]
    labels = torch.tensor([2, 0])
    rows = model.condition(torch.cat([labels, model.null_condition(labels)]))
    classes = weights[f"{prefix}cls_embedding.weight"][labels]
    assert torch.equal(rows[:2, 0], start + classes)
    assert torch.equal(rows[2:, 0], start.expand(2, -1))
    whole = decode(model, labels, Noise(0, range(2)))
    first = decode(model, labels, Noise(0, range(2)), Decoding(length=3))
    assert torch.equal(first, whole[:, :3])


def test_a_generator_that_does_not_fit():
    weights = published_generator("rms", True)
    del weights["models.ar_image_model.preprocessor.sos_token_embed"]
    with pytest.raises(CheckpointError, match="file: not a class-conditional FlexAR"):
        convert(weights, where="file")
