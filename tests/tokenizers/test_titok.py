import pytest
import torch

from vistok.errors import UserError
from vistok.layers.conv import Upsample
from vistok.layers.vit import TransformerBlock
from vistok.quantizers import FSQ, VQ, Gaussian
from vistok.tokenizers import MaskGITVQGAN, TiTok, Tokenizer, TwoStageTiTok
from vistok.tokenizers.sequence import token_contribution

VIT = {
    "image_size": 16,
    "num_latent_tokens": 6,
    "encoder_width": 24,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "decoder_width": 20,
    "decoder_depth": 2,
    "decoder_heads": 4,
}
VQGAN = {
    "num_proxy_codes": 32,
    "vqgan_channels": 8,
    "vqgan_channel_multipliers": (1, 2, 1),
    "vqgan_res_blocks": 1,
    "vqgan_dim": 6,
}


def titok(quantizer=None, **options) -> TiTok:
    return TiTok(quantizer or FSQ([8, 5, 4]), **{"patch_size": 4} | VIT | options).eval()


def two_stage(stage: int, **options) -> TwoStageTiTok:
    return TwoStageTiTok(VQ(40, 4), stage, patch_size=4, **VIT | VQGAN | options)


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16)


@torch.no_grad()
def test_a_last_block_returns_the_rows_that_are_read():
    block, x = TransformerBlock(24, 4), torch.randn(2, 7, 24)
    visible = torch.rand(2, 7) < 0.7
    visible[:, 0] = True
    for rows in (slice(1, 4), slice(5, None)):
        for mask in (None, visible):
            torch.testing.assert_close(block(x, rows, mask), block(x, visible=mask)[:, rows])
    kept = block(x[:1, visible[0]])
    torch.testing.assert_close(block(x[:1], visible=visible[:1])[:, visible[0]], kept)


@torch.no_grad()
@pytest.mark.parametrize(
    "tail_drop, lower, nearest",
    [
        (None, [2, 3], [[0, 1, 2, 3]] * 2),
        ("uniform", [0, 1, 2, 3], [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2),
    ],
)
def test_a_start_on_the_grid_gives_latents_places(tail_drop, lower, nearest):
    """Of 8 latents over 4x4 patches the last 4 are half of 2x4 areas, or all of a level's 2x2."""
    options = {"num_latent_tokens": 8, "encoder_width": 48, "encoder_heads": 2}
    encoder = titok(**options, tail_drop=tail_drop, start="grid").encoder
    patches = encoder.positional_embedding[1:].unflatten(0, (4, 4))[lower].flatten(0, 1)
    latents = encoder.latent_token_positional_embedding
    assert torch.cdist(patches, latents[-4:]).argmin(1).view(-1, 4).tolist() == nearest


def test_a_start_on_the_grid_needs_levels():
    with pytest.raises(UserError, match="power of two, not 6"):
        titok(start="grid")


@pytest.mark.parametrize("size", [(23, 24), (32, 48)])
def test_upsampling_is_the_same_without_gradient(size):
    upsample = Upsample(5)
    x = torch.randn(2, 5, *size)
    plain = upsample(x)
    with torch.no_grad():
        torch.testing.assert_close(upsample(x), plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [titok, lambda **more: two_stage(2, **more).eval()])
def test_prefixes_decode_cut_off_or_masked(make, images):
    model = make(tail_drop="uniform", text_length=3, text_dim=5)
    assert model.spec.ordered
    text = torch.randn(3, 3, 5)
    tokens = model.encode(images)
    lengths = torch.tensor([1, 4, 6])
    together = model.decode(tokens, lengths, text)
    for i, n in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        torch.testing.assert_close(model.decode(tokens[one, :n], text=text[one])[0], together[i])
    other = tokens.clone()
    other[0, 1:], other[1, 4:] = 0, 1
    assert torch.equal(model.decode(other, lengths, text), together)


def test_training_drops_tails_and_says_so(images):
    model = titok(tail_drop="uniform(2,4,sample)").train()
    output = model(images)
    lengths = (output.kept * 6).round().long()
    assert ((lengths >= 2) & (lengths <= 4)).all()
    again = model(images, lengths=lengths)
    torch.testing.assert_close(output.reconstruction, again.reconstruction)
    assert model(images, lengths=3).kept.tolist() == [0.5] * 3
    assert model.eval()(images).kept is None
    with pytest.raises(UserError, match="decode as a whole"):
        titok().decode(torch.zeros(1, 6, dtype=torch.int64), torch.tensor([2]))


def test_text_is_needed_where_it_is_read(images, tmp_path):
    model = titok(text_length=3, text_dim=5, decoder_patch_size=8)
    tokens, text = model.encode(images), torch.randn(3, 3, 5)
    assert model.text_shape == (3, 5)
    decoded = model.decode(tokens, text=text)
    assert not torch.allclose(decoded, model.decode(tokens, text=-text))
    with pytest.raises(UserError, match=r"got no text, expected features \(3, 3, 5\)"):
        model.decode(tokens)
    with pytest.raises(UserError, match=r"got text \(3, 2, 5\), expected"):
        model(images, text[:, :2])
    model.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.decode(tokens, text=text), decoded)
    without = titok()  # text does not concern it
    assert torch.equal(without.decode(tokens, text=text), without.decode(tokens))


def test_continuous_tokens(images, tmp_path):
    model = titok(Gaussian(3, kl=0.1), tail_drop="pow2")
    assert str(model.spec) == "6 ordered latents of dim 3"
    tokens = model.encode(images)
    assert tokens.shape == (3, 6, 3) and torch.equal(tokens, model.encode(images))
    torch.testing.assert_close(model.decode(tokens), model(images).reconstruction.clamp(0, 1))
    output = model.train()(images)
    (output.reconstruction.square().mean() + output.losses["kl"]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not torch.equal(output.tokens, tokens)
    model.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).fingerprint() == model.fingerprint()


def test_stages_start_from_what_they_build_on(images, tmp_path):
    vqgan = MaskGITVQGAN(VQ(32, 6, l2_normalise=False, revival=True), 16, 8, (1, 2, 1), 1)
    first, second = two_stage(1), two_stage(2)
    first.start_from(vqgan)
    assert torch.equal(first.proxy_codes(images), vqgan.encode(images))
    assert not any(p.requires_grad for p in first.vqgan.parameters())
    with pytest.raises(UserError, match=r"cannot start from this MaskGITVQGAN: .* do not fit"):
        second.start_from(vqgan)
    second.start_from(first)
    assert torch.equal(second.encode(images), first.encode(images))
    assert torch.equal(second.vqgan.decoder.conv_in.weight, vqgan.decoder.conv_in.weight)
    with pytest.raises(UserError, match="cannot start from this TwoStageTiTok of stage 1"):
        second.start_from(two_stage(1, vqgan_channels=None))
    for stage, model in enumerate((first, second), 1):
        model.save_pretrained(tmp_path / str(stage))
        loaded = Tokenizer.from_pretrained(tmp_path / str(stage))
        frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
        assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
        parts = {name.split(".")[0] for name in frozen}
        assert parts == ({"vqgan"} if stage == 1 else {"latent_tokens", "encoder", "quantizer"})
        loaded.start_from(model)


def test_stage_1_learns_the_codes_that_it_decodes(images):
    model = two_stage(1).eval()
    output = model(images)
    assert output.reconstruction is None
    assert set(output.losses) == {"proxy", "codebook", "commitment"}
    logits = model.proxy_logits(model.quantizer.decode(output.tokens))
    assert logits.shape == (3, 32, 4, 4)
    decoded = model.decode(output.tokens)
    torch.testing.assert_close(decoded, model.vqgan.decode(logits.argmax(1)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    before = output.losses["proxy"].item()
    for _ in range(8):
        optimizer.zero_grad()
        loss = sum(model(images).losses.values())
        loss.backward()
        optimizer.step()
    assert model(images).losses["proxy"] < before


def test_stage_2_leaves_the_tokens_alone(images):
    model = two_stage(2, tail_drop="uniform").train()
    tokens, state = model.encode(images), model.quantizer.state_dict()
    output = model(images)
    assert output.losses == {}
    output.reconstruction.square().mean().backward()
    model.update_codebook(output.latents)
    assert all(torch.equal(state[k], v) for k, v in model.quantizer.state_dict().items())
    assert torch.equal(model.encode(images), tokens)


def test_a_bare_stage_1_encodes_and_predicts(images):
    model = two_stage(1, vqgan_channels=None).eval()
    tokens = model.encode(images)
    assert model.proxy_logits(model.quantizer.decode(tokens)).shape == (3, 32, 4, 4)
    for act in (lambda: model.decode(tokens), lambda: model(images)):
        with pytest.raises(UserError, match=r"has no VQGAN .* import it with the option vqgan"):
            act()


def test_sizes_are_refused():
    with pytest.raises(UserError, match="decoder_width 20 must be divisible by decoder_heads 3"):
        titok(decoder_heads=3)
    with pytest.raises(UserError, match=r"4 patches .* 16 codes .* decoder_patch_size must be 4"):
        two_stage(1, decoder_patch_size=8)
    with pytest.raises(UserError, match="expected stage 1, or stage 2 with a VQGAN"):
        two_stage(2, vqgan_channels=None)
    with pytest.raises(UserError, match="18x16 must be divisible by 4"):
        MaskGITVQGAN(VQ(32, 6), (18, 16), 8, (1, 1, 1))


def test_contributions_do_not_depend_on_how_many_are_decoded_together(images):
    model = titok(tail_drop="uniform")
    tokens = model.encode(images)
    replacement = torch.randint(160, tokens.shape)
    replacement[:, 3] = tokens[:, 3]
    positions = [5, 3, 0]
    maps = token_contribution(model, tokens, replacement, positions)
    for few in (1, 6):
        again = token_contribution(model, tokens, replacement, positions, batch_size=few)
        torch.testing.assert_close(again, maps, atol=1e-5, rtol=1e-5)
    absolute, squared = maps
    assert absolute.shape == squared.shape == (3, 16, 16)
    assert absolute[1].sum() == 0 and absolute[0].sum() > 0 and absolute[2].sum() > 0
    changed = tokens.clone()
    changed[:, 0] = replacement[:, 0]
    images = [model.to_images(model.quantizer.decode(t)) for t in (tokens, changed)]
    torch.testing.assert_close(squared[2], (images[1] - images[0]).square().sum((0, 1)))
