"""Tiny random teachers of transformers, saved and read as published ones are."""

import importlib.util
import json
import sys
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
import transformers

from vistok.decoding import Schedule
from vistok.errors import UserError
from vistok.losses import Teacher, TokenizerLoss, alignment

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@dataclass
class Result:
    """As a tokenizer's forward pass returns it, as far as losses read it."""

    features: torch.Tensor | None
    kept: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


def save(path, model, **processor):
    torch.manual_seed(0)
    for parameter in model.parameters():  # some layers start from zero
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    kind = transformers.BitImageProcessor if "crop_size" in processor else None
    (kind or transformers.ViTImageProcessor)(**processor).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """Patches of 14, positions of 4x4 interpolated to the 2x2 that its crop makes."""
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(image_size=56, patch_size=14, **SMALL)
    )
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    return save(tmp_path_factory.mktemp("dinov2"), model, **crop, image_mean=[0.4] * 3)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL))
    return save(tmp_path_factory.mktemp("vit"), model, size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    config = transformers.CLIPConfig(
        text_config=SMALL | {"vocab_size": 8, "eos_token_id": 1},
        vision_config=SMALL | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    size = {"size": {"height": 32, "width": 32}}
    return save(tmp_path_factory.mktemp("clip"), transformers.CLIPModel(config), **size)


def test_teacher_sees_images_as_its_processor_says(vit):
    teacher = Teacher(vit)
    assert (teacher.image_size, teacher.grid, teacher.dim) == (32, 4, 16)
    images = torch.rand(2, 3, 32, 32)
    processor = transformers.AutoImageProcessor.from_pretrained(vit)
    seen = processor(list(images), do_rescale=False, return_tensors="pt").pixel_values
    expected = transformers.ViTModel.from_pretrained(vit)(seen).last_hidden_state[:, 1:]
    torch.testing.assert_close(teacher(images), expected.detach().unflatten(1, (4, 4)))


def test_teacher_of_other_sizes(dinov2, vit):
    teacher = Teacher(dinov2)
    assert (teacher.image_size, teacher.grid) == (28, 2)
    assert torch.equal(teacher.mean.flatten(), torch.full((3,), 0.4))
    for path, size, grid in ((dinov2, 56, 4), (vit, 48, 6)):
        features = Teacher(path, image_size=size)(torch.rand(1, 3, 20, 40))
        assert features.shape == (1, grid, grid, 16)


def test_register_tokens_are_dropped(tmp_path):
    config = transformers.Dinov2WithRegistersConfig(
        image_size=28, patch_size=14, num_register_tokens=3, **SMALL
    )
    model = transformers.Dinov2WithRegistersModel(config)
    path = save(tmp_path, model, size={"height": 28, "width": 28})
    images = torch.rand(1, 3, 28, 28)
    features = Teacher(path)(images)
    whole = model.eval()(2 * images - 1).last_hidden_state
    torch.testing.assert_close(features.flatten(1, 2), whole[:, 4:].detach())


def test_teacher_in_the_space_of_captions(clip):
    teacher = Teacher(clip, layer="projected")
    assert (teacher.image_size, teacher.grid, teacher.dim) == (32, 4, 12)
    images = torch.rand(2, 3, 32, 32)
    whole = transformers.CLIPModel.from_pretrained(clip)
    hidden = whole.vision_model(pixel_values=2 * images - 1).last_hidden_state
    expected = whole.visual_projection(whole.vision_model.post_layernorm(hidden[:, 1:]))
    torch.testing.assert_close(teacher(images).flatten(1, 2), expected.detach())
    below = Teacher(clip)(images)
    torch.testing.assert_close(below.flatten(1, 2), hidden[:, 1:].detach())


def test_teacher_below_the_last_layer(tmp_path):
    """Patches of 14 leave a margin of the 32 pixels."""
    config = transformers.SiglipVisionConfig(
        image_size=32, patch_size=14, **SMALL | {"num_hidden_layers": 3}
    )
    path = save(tmp_path, transformers.SiglipVisionModel(config), size={"height": 32, "width": 32})
    teacher = Teacher(path, layer="penultimate")
    assert (teacher.image_size, teacher.grid, teacher.dim) == (32, 2, 16)
    images, seen = torch.rand(2, 3, 32, 32), []
    last = teacher.net.encoder.layers[-1]
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert torch.equal(teacher(images).flatten(1, 2), seen[0])


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_teacher_of_timm(tmp_path):
    import timm

    name, arguments = "vit_tiny_patch16_224", {"img_size": 32, "depth": 1}
    settings = timm.create_model(name).pretrained_cfg | {"input_size": [3, 32, 32]}
    config = transformers.TimmWrapperConfig(
        architecture=name, model_args=arguments, pretrained_cfg=settings
    )
    transformers.TimmWrapperModel(config).save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path))
    assert (teacher.image_size, teacher.grid, teacher.dim) == (32, 2, 192)
    assert teacher.mean.flatten().tolist() == pytest.approx(settings["mean"])
    images = torch.rand(1, 3, 32, 32)
    normalised = (images - teacher.mean) / teacher.std
    expected = teacher.net.timm_model.forward_features(normalised)[:, 1:]
    torch.testing.assert_close(teacher(images).flatten(1, 2), expected)


def test_teacher_is_frozen_in_float32(vit):
    teacher = Teacher(vit).train()
    assert not teacher.net.training
    assert not any(p.requires_grad for p in teacher.parameters())
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    features = teacher(images)
    assert not features.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features, teacher(images))


def test_what_is_no_teacher_is_refused_in_one_line(vit, tmp_path, monkeypatch):
    text = transformers.BertConfig(vocab_size=8, **SMALL)
    save(tmp_path / "text", transformers.BertModel(text), size={"height": 32, "width": 32})
    stages = {"hidden_sizes": [8] * 4, "depths": [1] * 4}
    convolutions = transformers.ConvNextModel(transformers.ConvNextConfig(**stages))
    save(tmp_path / "grid", convolutions, size={"height": 32, "width": 32})
    bare = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL))
    bare.save_pretrained(tmp_path / "bare")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    for path, size, message in [
        (tmp_path / "text", None, "a BertModel takes no patches"),
        (tmp_path / "grid", None, "not one feature of each"),
        (tmp_path / "bare", None, "preprocessor_config.json"),
        (tmp_path / "torn", None, "expected a directory or Hub repository"),
        (tmp_path / "absent", None, "expected a directory or Hub repository"),
        (vit, 30, "image_size 30 is no multiple of its patches of 8"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            Teacher(str(path), size)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="a ViTModel projects no features"):
        Teacher(vit, layer="projected")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'vistok\[text\]'"):
        Teacher(vit)


def test_alignment_is_the_negative_cosine():
    features = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(alignment(features, 3 * features), -torch.ones(2))
    torch.testing.assert_close(alignment(features, -features), torch.ones(2))
    other = torch.randn(2, 4, 4, 8)
    cosines = F.cosine_similarity(features, other, dim=-1).mean((1, 2))
    torch.testing.assert_close(alignment(features, other), -cosines)


def test_alignment_takes_the_teachers_grid_or_the_one_given():
    flat = torch.randn(1, 1, 1, 8)
    for grid in (None, 1, 7):
        found = alignment(flat.expand(1, 2, 3, 8), flat.expand(1, 5, 5, 8), grid)
        torch.testing.assert_close(found, -torch.ones(1))
    features, taught = torch.randn(1, 2, 2, 8), torch.randn(1, 4, 4, 8)
    resized = F.interpolate(features.movedim(-1, 1), (4, 4), mode="bilinear").movedim(1, -1)
    torch.testing.assert_close(alignment(features, taught), alignment(resized, taught))
    assert not torch.allclose(alignment(features, taught), alignment(features, taught, grid=2))


def test_alignment_joins_the_loss_by_the_share_kept(vit):
    teacher = Teacher(vit)
    images, features = torch.rand(2, 3, 32, 32), torch.randn(2, 4, 4, 16, requires_grad=True)
    plain = TokenizerLoss(alignment_weight=0.5, teacher=teacher)
    distances = alignment(features, teacher(images)).detach()
    total, terms = plain.generator_loss(images, Result(features), 0, None)
    torch.testing.assert_close(terms, {"alignment": 0.5 * distances.mean()})
    total.backward()
    assert features.grad.abs().sum() > 0
    loss = TokenizerLoss(
        alignment_weight=0.5, teacher=teacher, alignment_by_kept=Schedule("linear(1,0)")
    )
    kept = torch.tensor([0.25, 1.0])
    terms = loss.generator_loss(images, Result(features, kept), 0, None)[1]
    torch.testing.assert_close(terms["alignment"], 0.5 * 0.75 * distances[0] / 2)
    whole = loss.generator_loss(images, Result(features), 0, None)[1]
    assert whole["alignment"] == 0, "nothing was dropped"
    assert loss.frozen == {"teacher": teacher}


def test_alignment_names_what_is_missing(vit):
    with pytest.raises(UserError, match="needs a teacher"):
        TokenizerLoss(alignment_weight=0.5)
    teacher = Teacher(vit)
    assert TokenizerLoss(teacher=teacher).teacher is None
    loss = TokenizerLoss(alignment_weight=0.5, teacher=teacher)
    images = torch.rand(1, 3, 32, 32)
    with pytest.raises(UserError, match="gives no features to align"):
        loss.generator_loss(images, Result(None), 0, None)
    with pytest.raises(UserError, match=r"have 8 channels, those of teacher .* have 16"):
        loss.generator_loss(images, Result(torch.rand(1, 4, 4, 8)), 0, None)
