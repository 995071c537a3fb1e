"""What the page shows: previews that end in the image, mixes of tokens, fields as settings."""

import pytest
import torch
from PIL import Image

from vistok import MAR, PAR, RAR, VAR, ImagePipeline, LlamaGen, MaskGIT, TiTok
from vistok.decoding import Corrected, Decoding, Order, Schedule
from vistok.demo.mixing import after, fitted, mixed, reconstruct, rectangle, redrawn, redraws
from vistok.demo.previews import BLANK, Unfinished, stream
from vistok.demo.settings import plan_choices, read_settings, spelt, whole
from vistok.errors import UserError
from vistok.generators import FlowAR
from vistok.heads import DiffusionHead, DimensionWiseHead, FlowTransformerHead
from vistok.quantizers import FSQ, VQ, DimensionWise, Gaussian, MultiScale
from vistok.tokenizers import ConvTokenizer, KLAutoencoder, KLTokenizer

LABELS = torch.tensor([0, 1, 1])
TRANSFORMER = {"width": 32, "depth": 1, "heads": 2}
SIZES = {"dim": 32, "depth": 1, "num_heads": 2}
SMALL = {"width": 32, "depth": 1}
STEPS = Decoding(steps=Schedule(3))


def of_grid(quantizer) -> ConvTokenizer:
    return ConvTokenizer(
        quantizer, image_size=16, channels=8, channel_multipliers=[1], patch_size=4,
        num_res_blocks=1, z_channels=8, attention=False,
    )  # fmt: skip


def of_latents(levels: int | None = None) -> KLTokenizer:
    vae = KLAutoencoder(3, [8, 8], layers_per_block=1, norm_groups=4, scaling_factor=0.2325)
    return KLTokenizer(DimensionWise(3, levels) if levels else Gaussian(3), vae, 8)


def of_sequence(tail_drop: str | None) -> TiTok:
    sides = ("encoder", "decoder")
    sizes = {f"{side}_{k}": v for side in sides for k, v in TRANSFORMER.items()}
    return TiTok(FSQ([4, 4]), 16, 4, 6, tail_drop=tail_drop, **sizes)


PAIRS = {
    "raster": (lambda: of_grid(FSQ([4, 4])), LlamaGen, {}, Decoding(guidance=Schedule(2))),
    "zipar": (lambda: of_grid(FSQ([4, 4])), LlamaGen, {}, Decoding(plan=Order("zipar(2)"))),
    "adaptive": (
        lambda: of_grid(FSQ([4, 4])), LlamaGen, {}, Decoding(plan=Order("zipar(1,adaptive)"))
    ),
    "par": (lambda: of_grid(FSQ([4, 4])), PAR, {"regions": 4}, Decoding()),
    "random": (lambda: of_grid(FSQ([4, 4])), RAR, {}, Decoding(plan=Order("random(3)"))),
    "maskgit": (lambda: of_grid(FSQ([4, 4])), MaskGIT, {}, Decoding()),
    "mar": (of_latents, MAR, {"head": DiffusionHead(**SMALL), "buffer": 2}, STEPS),
    "squares": (
        of_latents, MAR, {"head": DiffusionHead(**SMALL), "buffer": 2, "patch_size": 2}, STEPS
    ),
    "digits": (
        lambda: of_latents(16),
        MAR,
        {"head": DimensionWiseHead(num_heads=2, **SMALL), "buffer": 2},
        Decoding(plan=Order("mar(5)")),
    ),
    "flowar": (
        of_latents, FlowAR, {"head": FlowTransformerHead(64, 1), "scales": (1, 2, 4)}, STEPS
    ),
    "sequence": (lambda: of_sequence("uniform"), LlamaGen, {}, Decoding(length=5)),
    "titok": (lambda: of_sequence(None), MaskGIT, {}, Decoding(plan=Order("maskgit(4)"))),
}  # fmt: skip
LOUD = {"raster", "zipar", "adaptive", "par", "random", "maskgit", "sequence", "titok"}


def pipeline(name: str) -> ImagePipeline:
    torch.manual_seed(0)
    if name == "scales":
        codes = MultiScale(VQ(11, 8, l2_normalise=False), (1, 2, 4))
        tokenizer = of_grid(codes)
        generator = VAR(tokenizer.spec, ["a", "b"], codes, **SIZES)
        torch.nn.init.normal_(generator.head.linear.weight)
        generator.take_codes(tokenizer)
        return ImagePipeline(tokenizer, generator, Decoding(plan=Order("next_scale(1)")))
    tokenizer, family, arguments, decoding = PAIRS[name]
    tokenizer = tokenizer()
    generator = family(tokenizer.spec, ["a", "b"], **SIZES, **arguments)
    if name in LOUD:
        torch.nn.init.normal_(generator.head.linear.weight)
    return ImagePipeline(tokenizer, generator, decoding)


def picture(seed: int, size: int = 16) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("name", [*PAIRS, "scales"])
def test_previews_grow_and_end_in_the_image(name):
    pair = pipeline(name)
    expected = pair.sample(LABELS, 5, range(3))
    previews = list(stream(pair, LABELS, 5, most=1000))
    assert torch.equal(previews[-1].images, expected)
    counts = [preview.tokens for preview in previews]
    assert counts == sorted(counts)
    assert counts[-1] == previews[-1].of_tokens
    assert all(preview.images.shape == expected.shape for preview in previews)
    # One for each pass, of which nobody knows which is the last where that is adaptive.
    assert len(previews) == previews[-1].passes + (name == "adaptive")
    assert len(list(stream(pair, LABELS, 5, most=3))) <= 3
    n = previews[-1].of_tokens
    assert str(previews[-1]).endswith(f"{n} of {n} tokens")


@pytest.mark.parametrize("name", [*PAIRS, "scales"])
@torch.inference_mode()
def test_the_preview_after_the_last_pass_is_the_image(name):
    pair, seen = pipeline(name), []
    expected = pair.sample(LABELS, 5, range(3), on_pass=lambda t, x: seen.append(x.clone()))
    run = Unfinished(pair, LABELS, 5, pair.decoding)
    last = run.preview(len(seen) - 1, seen[-1])
    torch.testing.assert_close(last.images, expected)
    assert last.tokens == last.of_tokens == run.positions


def test_what_a_grid_does_not_know_is_blank():
    first, *_ = stream(pipeline("raster"), LABELS, 0, most=16)
    assert (first.images[:, :, 4:] == BLANK).all()
    assert (first.images[:, :, :4, 4:] == BLANK).all()
    assert not (first.images[:, :, :4, :4] == BLANK).all()


@torch.inference_mode()
def test_what_is_known_of_a_sequence_decodes_by_itself():
    pair = pipeline("sequence")
    tokens = pair.sample_tokens(LABELS, 0, range(3))
    for preview in stream(pair, LABELS, 0, most=16):
        shown = pair.tokenizer.decode(tokens[:, : preview.tokens])
        torch.testing.assert_close(preview.images, shown)


def test_a_closed_stream_leaves_the_pipeline_as_it_was():
    pair = pipeline("raster")
    previews = stream(pair, LABELS, 5, most=16)
    assert next(previews).tokens == 1
    previews.close()
    *_, last = stream(pair, LABELS, 5)
    assert torch.equal(last.images, pair.sample(LABELS, 5, range(3)))


def test_a_stream_raises_what_sampling_raises():
    pair = pipeline("raster")
    with pytest.raises(UserError, match="not by mar"):
        next(stream(pair, LABELS, 0, Decoding(plan=Order("mar(4)"))))
    torch.nn.init.constant_(pair.tokenizer.last_layer, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        list(stream(pair, LABELS, 0))


@pytest.mark.parametrize("name", ["raster", "mar", "digits", "sequence", "scales"])
def test_a_mix_of_tokens_is_between_two_pictures(name):
    model = pipeline(name).tokenizer
    a, b = (picture(seed, model.image_size[0]) for seed in (1, 2))
    none, all_ = torch.zeros(model.spec.num_tokens).bool(), torch.ones(model.spec.num_tokens).bool()
    half = after(model.spec, 2)
    of_a, of_b, mix = mixed(model, a, b, half)
    # A fresh TiTok encodes all pictures alike.
    assert name == "sequence" or not torch.equal(of_a, of_b)
    same = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(mixed(model, a, b, none)[2], of_a, **same)
    torch.testing.assert_close(mixed(model, a, b, all_)[2], of_b, **same)
    torch.testing.assert_close(mixed(model, a, a, half)[2], of_a, **same)
    torch.testing.assert_close(mixed(model, b, a, ~half)[2], mix, **same)
    whole_a = reconstruct(model, a, model.spec.num_tokens).image
    torch.testing.assert_close(whole_a[0], of_a, **same)


def test_masks_of_what_is_taken():
    grid, scales = pipeline("raster").tokenizer.spec, pipeline("scales").tokenizer.spec
    assert rectangle(grid, 1, 0, 3, 2).nonzero().flatten().tolist() == [4, 5, 8, 9]
    assert rectangle(grid, 0, 0, 4, 4).all()
    assert after(grid, 3).tolist() == [False] * 3 + [True] * 13
    assert after(scales, 2).tolist() == [False] * 5 + [True] * 16
    assert after(scales, 3).sum() == 0
    with pytest.raises(UserError, match="rows 3 to 2, columns 0 to 2: no part of 4x4 tokens"):
        rectangle(grid, 3, 0, 2, 2)


@pytest.mark.parametrize("name", ["raster", "par", "random", "scales"])
def test_drawing_anew_keeps_the_rest(name):
    pair, a = pipeline(name), picture(1)
    n, label = pair.tokenizer.spec.num_tokens, LABELS[:1]
    assert redraws(pair)
    *_, kept = redrawn(pair, a, torch.zeros(n).bool(), label, 3)
    same = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(kept.images, reconstruct(pair.tokenizer, a, n).image, **same)
    *_, fresh = redrawn(pair, a, torch.ones(n).bool(), label, 3)
    assert torch.equal(fresh.images, pair.sample(label, 3, [0]))


@pytest.mark.parametrize("name", ["adaptive", "maskgit", "mar", "flowar"])
def test_plans_without_fixed_positions_draw_no_part_anew(name):
    assert not redraws(pipeline(name))


def test_orders_without_fixed_positions_refuse_tokens_to_keep():
    pair = pipeline("maskgit")
    keep = redrawn(pair, picture(1), torch.zeros(16).bool(), LABELS[:1], 0)
    with pytest.raises(UserError, match="order maskgit keeps no tokens: only a fixed one"):
        list(keep)


def test_a_reconstruction_says_what_it_costs():
    model = pipeline("sequence").tokenizer
    made = reconstruct(model, picture(0, 40), 3)
    assert torch.equal(made.original, fitted(model, picture(0, 40)))
    assert str(made).startswith("3 of 6 tokens, 2 bytes, PSNR ")
    assert "no bytes" in str(reconstruct(of_latents(), picture(0), 16))
    with pytest.raises(UserError, match="length 7"):
        reconstruct(model, picture(0), 7)


@pytest.mark.parametrize("name", [*PAIRS, "scales"])
def test_every_plan_of_the_list_fits(name):
    pair = pipeline(name)
    choices = plan_choices(pair.generator, pair.decoding.plan)
    assert pair.decoding.plan in (None, Order(choices[0]))
    for choice in choices:
        assert len(pair.generator.plan(Order(choice)))


@pytest.mark.parametrize("setting", [Schedule(1.5), Schedule("linear(1,4)"), Corrected("90/8/1")])
def test_fields_are_written_as_settings_are_read(setting):
    assert type(setting)(spelt(setting)) == setting
    assert "constant" not in spelt(setting)


def test_empty_fields_leave_settings_alone():
    own = Decoding(guidance=Schedule(3), top_k=Corrected(7))
    fields = {"plan": "", "guidance": None, "temperature": " 0.5 ", "top_k": "0"}
    changed = read_settings(own, fields)
    assert changed == own.changed(temperature=Schedule(0.5), top_k=Corrected(0))
    for wrong in ({"plan": "rastre"}, {"guidance": "much"}, {"top_k": "linear(1)"}):
        with pytest.raises(UserError):
            read_settings(own, wrong)
    for value in (None, -1, 2.5, 11):
        with pytest.raises(UserError, match=r"seed .*: 0 to 10 fit"):
            whole(value, "seed", 0, 10)
    assert whole(3.0, "seed", 0, 10) == 3


def handler(page, name: str):
    return next(event.fn for event in page.blocks.fns.values() if event.name == name)


def test_mistakes_show_as_one_line(monkeypatch):
    gradio = pytest.importorskip("gradio", reason="the page is made by gradio")
    from vistok.demo.page import Page

    generate = handler(Page(pipeline("raster")), "generate")
    right = [[0, 1], "zipar(2)", "2", "1", "0", "", 0, 3]
    *_, (_, progress) = generate(*right)
    assert progress == "pass 12 of 12, 16 of 16 tokens"
    for place, wrong in [(0, []), (1, "mar(4)"), (1, "zipar(x)"), (2, "x"), (6, None), (7, 99)]:
        with pytest.raises(gradio.Error) as caught:
            list(generate(*right[:place], wrong, *right[place + 1 :]))
        assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize("name", ["mar", "sequence", "scales"])
def test_pages_of_a_tokenizer_alone_have_no_generator(name):
    pytest.importorskip("gradio", reason="the page is made by gradio")
    from vistok.demo.page import Page

    def tabs(model) -> list[str]:
        blocks = Page(model).blocks.blocks.values()
        return [block.label for block in blocks if type(block).__name__ == "Tab"]

    pair = pipeline(name)
    assert tabs(pair.tokenizer) == ["Reconstruct", "Edit"]
    assert tabs(pair) == ["Generate", "Reconstruct", "Edit"]
