import pytest
import torch

from vistok import ImagePipeline, LlamaGen, TokenSpec
from vistok.decoding import Corrected, Decoding, Schedule
from vistok.errors import CheckpointError, IncompatibleTokensError, UserError
from vistok.images import image_grid, to_pil
from vistok.quantizers import FSQ
from vistok.tokenizers import ConvTokenizer

CLASSES = ["Animals", "Food & Drink", "Objects"]


def small_pipeline(text_encoder: str | None = None, **options) -> ImagePipeline:
    tokenizer = ConvTokenizer(
        FSQ([4, 4]), image_size=16, channels=8, channel_multipliers=[1], patch_size=4,
        num_res_blocks=1, z_channels=8, attention=False,
    )  # fmt: skip
    generator = LlamaGen(tokenizer.spec, CLASSES, dim=32, depth=1, num_heads=2, **options)
    torch.nn.init.normal_(generator.head.linear.weight)
    return ImagePipeline(tokenizer, generator, text_encoder=text_encoder)


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture(scope="module")
def from_text(text_encoder):
    return small_pipeline(text_encoder, caption_dim=16, caption_length=12)


def test_classes_go_by_name_or_number(pipeline):
    by_name = pipeline(class_labels=["Objects", "Animals"], seed=3).images
    by_number = pipeline(class_labels=[2, 0], seed=3).images
    assert [i.tobytes() for i in by_name] == [i.tobytes() for i in by_number]
    assert by_name[0].size == (16, 16)
    with pytest.raises(UserError, match=r"class 'Objcts' .*did you mean 'Objects'"):
        pipeline(class_labels=["Objcts"])
    with pytest.raises(UserError, match=r"class 3 is not among the 3 classes 0-2"):
        pipeline(class_labels=[3])


def test_an_image_is_the_same_in_any_company(pipeline):
    labels = torch.arange(12) % 3
    decoding = Decoding(guidance=Schedule("linear(1,3)"), top_k=Corrected(8))
    together = pipeline.sample(labels, 7, range(12), decoding)
    for i in (11, 0, 5):
        alone = pipeline.sample(labels[i : i + 1], 7, [i], decoding)
        assert torch.allclose(alone[0], together[i], atol=1e-5)
    assert not torch.equal(pipeline.sample(labels, 8, range(12), decoding), together)


def test_a_prompt_has_the_same_image_in_any_company(from_text):
    prompts = ["a red circle", "a blue square", "a cat"]
    together = from_text(prompts=prompts, seed=3).images
    alone = [
        from_text(prompts=[prompt], seed=3, indices=[i]).images[0]
        for i, prompt in enumerate(prompts)
    ]
    assert [i.tobytes() for i in together] == [i.tobytes() for i in alone]
    same_noise = from_text(prompts=prompts, seed=3, indices=[0, 0, 0]).images
    assert len({image.tobytes() for image in same_noise}) == 3
    features = from_text.captions(prompts)
    from_features = from_text(prompts=features, seed=3).images
    assert [i.tobytes() for i in together] == [i.tobytes() for i in from_features]


def test_a_checkpoint_remembers_its_text_encoder(from_text, text_encoder, tmp_path):
    from_text.save_pretrained(tmp_path)
    assert f"| text encoder | {text_encoder} |" in (tmp_path / "README.md").read_text()
    loaded = ImagePipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder == loaded.untrained().text_encoder == text_encoder
    one, other = (p(prompts="a cat", seed=1).images[0].tobytes() for p in (from_text, loaded))
    assert one == other
    with pytest.raises(UserError, match="text encoder /nowhere: no readable T5"):
        ImagePipeline.from_pretrained(tmp_path, text_encoder="/nowhere")(prompts=["a cat"])


def test_what_the_model_is_not_conditioned_on_is_refused(pipeline, from_text, text_encoder):
    captions = from_text.captions(["a cat"])
    for call, message in [
        (lambda: pipeline(prompts=["a cat"]), "class-conditional: it takes class labels, not pr"),
        (lambda: pipeline(prompts=captions), "class-conditional: give it labels"),
        (lambda: pipeline(), "give either class_labels or prompts"),
        (lambda: pipeline([0], prompts=["a cat"]), "give either class_labels or prompts"),
        (lambda: from_text(class_labels=[0]), "text-conditional: it takes prompts, not class"),
        (lambda: from_text.sample(torch.tensor([0]), 0, [0]), "text-conditional: give it captions"),
        (lambda: small_pipeline(text_encoder), "it takes class labels, not text encoder"),
        (
            lambda: small_pipeline(caption_dim=16)(prompts=["a cat"]),
            "the checkpoint names no text encoder",
        ),
        (
            lambda: small_pipeline(text_encoder, caption_dim=8)(prompts=["a cat"]),
            "makes 16 channels, the generator takes 8",
        ),
        (
            lambda: small_pipeline(caption_dim=16, caption_length=9)(prompts=captions),
            r"give it captions \(B, 9, 16\), not captions \(B, 12, 16\)",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            call()


def test_the_cache_is_allocated_once(pipeline):
    labels = torch.tensor([0, 1])
    pipeline.sample_tokens(labels, 0, [0, 1])
    state = next(iter(pipeline._states.values()))
    pipeline.sample_tokens(labels, 1, [0, 1])
    assert next(iter(pipeline._states.values())) is state


def test_save_and_load(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, card="Made by a test.")
    loaded = ImagePipeline.from_pretrained(tmp_path)
    assert loaded.decoding == pipeline.decoding
    assert loaded.class_names == tuple(CLASSES)
    card = (tmp_path / "README.md").read_text()
    assert "Made by a test." in card
    assert "4x4 ids of 16" in card
    first, second = (p(class_labels=[1], seed=4).images[0].tobytes() for p in (pipeline, loaded))
    assert first == second


def test_a_checkpoint_says_how_it_decodes(pipeline, tmp_path):
    own = Decoding(guidance=Schedule("linear(1,3)"), temperature=Schedule(0.5), top_k=Corrected(3))
    ImagePipeline(pipeline.tokenizer, pipeline.generator, own).save_pretrained(tmp_path)
    loaded = ImagePipeline.from_pretrained(tmp_path)
    assert loaded.decoding == own
    labels = torch.tensor([0, 1])
    by_itself = loaded.sample_tokens(labels, 0, [0, 1])
    assert torch.equal(by_itself, pipeline.sample_tokens(labels, 0, [0, 1], own))
    assert own.changed(top_k=None, top_p=Corrected(0.5)) == Decoding(
        own.plan, own.guidance, own.temperature, top_p=Corrected(0.5), top_k=own.top_k
    )
    (tmp_path / "decoding.json").write_text('{"guidanc": 2}')
    with pytest.raises(CheckpointError, match="decoding"):
        ImagePipeline.from_pretrained(tmp_path)


def test_an_untrained_copy_has_fresh_weights(pipeline):
    fresh = pipeline.untrained()
    assert fresh.tokenizer is pipeline.tokenizer
    assert fresh.generator.arguments == pipeline.generator.arguments
    assert fresh.generator.head.linear.weight.abs().max() == 0
    assert pipeline.generator.head.linear.weight.abs().max() > 0


def test_an_unfit_pair_is_refused(pipeline):
    other = LlamaGen(TokenSpec.ids((4, 4), 99), CLASSES, dim=32, depth=1, num_heads=2)
    with pytest.raises(
        IncompatibleTokensError, match=r"ConvTokenizer makes 4x4 ids of 16, .*of 99"
    ):
        ImagePipeline(pipeline.tokenizer, other)


def test_images_that_are_not_finite_are_an_error(pipeline):
    bias = pipeline.tokenizer.post_quant_conv.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(torch.nan)
    with pytest.raises(UserError, match=r"images \[5\] of seed 0 are not finite"):
        pipeline.sample(torch.tensor([0]), 0, [5])
    with torch.no_grad():
        bias.copy_(kept)


def test_grids_have_labelled_rows():
    images = torch.zeros(6, 3, 8, 8)
    grid = image_grid(images, columns=3, row_labels=["one", "two"], scale=2)
    assert grid.height == 2 * (16 + 4) + 4
    assert grid.getpixel((grid.width - 10, 8)) == (0, 0, 0)
    assert image_grid(images, columns=3).width < grid.width


def test_pixels_are_rounded():
    values = torch.tensor([0.0, 0.5, 0.9999, 2.0, -1.0]) / torch.tensor([1, 255, 1, 1, 1])
    images = values.expand(1, 3, 1, 5).clone()
    assert [to_pil(images)[0].getpixel((x, 0))[0] for x in range(5)] == [0, 0, 255, 255, 0]
