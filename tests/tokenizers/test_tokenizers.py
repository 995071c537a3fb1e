import pytest
import torch
from PIL import Image

from vistok import tokenizers
from vistok.codec import Codec, dumps, file_size, loads
from vistok.errors import CheckpointError, UserError
from vistok.layers.image_towers import CLIPTower
from vistok.quantizers import FSQ, VQ, MultiScale
from vistok.tokenizers import (
    LARP,
    ConvTokenizer,
    FlexTok,
    KLAutoencoder,
    KLTokenizer,
    MaskGITVQGAN,
    QuantizedTokenizer,
    ReTok,
    TiTok,
    TokenFlow,
    Tokenizer,
    TokenizerOutput,
    TwoStageTiTok,
)

VIT = {
    "encoder_width": 24,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "decoder_width": 20,
    "decoder_depth": 1,
    "decoder_heads": 4,
}
CONV = {"channels": 8, "num_res_blocks": 1, "z_channels": 12}
PROXY = {
    "image_size": 16,
    "patch_size": 8,
    "decoder_patch_size": 4,
    "num_latent_tokens": 5,
    "num_proxy_codes": 32,
    "vqgan_channels": 8,
    "vqgan_channel_multipliers": (1, 2, 1),
    "vqgan_res_blocks": 1,
    "vqgan_dim": 6,
}


def flextok(quantizer):
    """A FlexTok whose gates and heads are open, so that gradients reach all of it."""
    vae = KLAutoencoder(3, [8, 8], layers_per_block=1, norm_groups=4)
    model = FlexTok(quantizer, vae, 16, 3, num_tokens=5, time_dim=16, steps=2, **VIT)
    for p in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.2)
    return model


def tokenflow(quantizer):
    """A TokenFlow with a margin around its 4x4 patches, and without a teacher."""
    scales = MultiScale(quantizer, (1, 2, 4), smoothers=0, jointly=False)
    tower = CLIPTower(4, width=24, depth=1, num_heads=2, grid=4)
    return TokenFlow(scales, tower, 18, 1, None, channel_multipliers=(1, 2, 3), **CONV)


TOKENIZERS = {
    "conv": lambda q: ConvTokenizer(q, 16, channel_multipliers=(1, 2, 3), **CONV),
    "conv-patches": lambda q: ConvTokenizer(
        q, (16, 24), channel_multipliers=(2, 1), patch_size=2, attention=False, **CONV
    ),
    "conv-scales": lambda q: ConvTokenizer(
        MultiScale(q, (1, 2, 4), smoothers=2),
        16,
        channel_multipliers=(1, 2, 3),
        kernel_size=3,
        groups=4,
        **CONV,
    ),
    "titok": lambda q: TiTok(q, 16, 4, num_latent_tokens=5, decoder_patch_size=8, **VIT),
    "titok-stem": lambda q: TiTok(q, 16, 4, num_latent_tokens=5, stem_channels=8, **VIT),
    "titok-taildrop": lambda q: TiTok(
        q, 16, 4, num_latent_tokens=5, tail_drop="uniform(sample)", **VIT
    ),
    "maskgit-vqgan": lambda q: MaskGITVQGAN(q, (16, 24), 8, (1, 2, 2), num_res_blocks=1),
    "titok-stage-1": lambda q: TwoStageTiTok(q, 1, **PROXY, **VIT),
    "titok-stage-2": lambda q: TwoStageTiTok(q, 2, **PROXY, **VIT),
    "retok": lambda q: ReTok(q, 16, 8, 6, channel_multipliers=(1, 2), **VIT, **CONV),
    "flextok": flextok,
    "tokenflow": tokenflow,
    "larp": lambda q: LARP(q, 4, (16, 24), (2, 4, 8), (1, 8, 8), token_shape=(2, 3, 2), **VIT),
}
QUANTIZERS = {
    "fsq": lambda: FSQ([8, 5, 4]),
    "vq": lambda: VQ(64, 4),
    "vq-revival": lambda: VQ(64, 4, l2_normalise=False, entropy=0.1, revival=True),
}


@pytest.fixture(params=[(t, q) for t in TOKENIZERS for q in QUANTIZERS], ids="+".join)
def tokenizer(request):
    family, quantizer = request.param
    return TOKENIZERS[family](QUANTIZERS[quantizer]())


@pytest.fixture
def images(tokenizer):
    return torch.rand(3, *tokenizer.input_shape)


def loss_of(output: TokenizerOutput) -> torch.Tensor:
    compared = output.reconstruction
    return sum(output.losses.values(), 0 if compared is None else compared.square().mean())


def test_every_exported_tokenizer_is_tried():
    exported = (getattr(tokenizers, name) for name in tokenizers.__all__)
    bases = (Tokenizer, QuantizedTokenizer, KLTokenizer)  # the last makes latents: test_kl.py
    concrete = {c for c in exported if issubclass(c, Tokenizer) and c not in bases}
    assert {type(make(FSQ([8, 5, 4]))) for make in TOKENIZERS.values()} == concrete


def test_round_trip_is_the_forward_pass(tokenizer, images):
    tokenizer.eval()
    tokens = tokenizer.encode(images)
    tokenizer.spec.check(tokens, "encode")
    assert tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < tokenizer.spec.vocab_size
    output = tokenizer(images)
    assert torch.equal(output.tokens, tokens)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    if output.reconstruction is not None:
        torch.testing.assert_close(decoded, output.reconstruction.clamp(0, 1))


def test_training_step_reaches_every_parameter(tokenizer, images):
    output = tokenizer(images)
    loss_of(output).backward()
    trained = {name: p for name, p in tokenizer.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    assert without == []
    assert tokenizer.last_layer.grad.abs().sum() > 0
    first = next(tokenizer.encoder.parameters())
    if first.requires_grad:
        assert first.grad.abs().sum() > 0, "the gradient passes the quantizer"
    tokenizer.update_codebook(output.latents)
    assert all(p.isfinite().all() for p in tokenizer.parameters())


def test_save_and_load(tokenizer, images, tmp_path):
    tokenizer.eval().save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    tokens = tokenizer.encode(images)
    assert torch.equal(loaded.decode(tokens), tokenizer.decode(tokens))


def test_a_picture_becomes_a_file_and_a_picture(tokenizer):
    if tokenizer.frames is not None:
        with pytest.raises(UserError, match="works on videos"):
            Codec(tokenizer)
        return
    codec = Codec(tokenizer.eval())
    pixels = torch.rand(30, 20, 3).mul(255).byte().numpy()
    image = Image.fromarray(pixels)
    whole = codec.encode(image)
    lengths = (1, codec.spec.num_tokens) if codec.spec.has_prefixes else (codec.spec.num_tokens,)
    for length in lengths:
        stream = whole.first(length, codec.spec)
        content = dumps(stream, codec.spec)
        assert len(content) == file_size(codec.spec, length)
        read = loads(content, codec.spec, codec.fingerprint, "a.vtk")
        assert torch.equal(read.tokens, stream.tokens)
        decoded = codec.decode(read)
        assert decoded.size == image.size
        assert decoded.tobytes() == codec.decode(stream).tobytes()
    alone = [codec.psnr(whole, image, [length])[0] for length in lengths]
    assert codec.psnr(whole, image, lengths) == pytest.approx(alone, abs=0.05)


def test_bfloat16(tokenizer, images):
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer(images)
        loss = loss_of(output)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters() if p.requires_grad)
    tokenizer.eval().bfloat16()
    decoded = tokenizer.decode(tokenizer.encode(images))
    assert decoded.dtype == torch.float32
    assert decoded.isfinite().all()


def test_refuses_images_and_tokens_of_another_shape(tokenizer):
    *size, width = tokenizer.input_shape
    with pytest.raises(UserError, match=f"expected \\(B, {', '.join(map(str, size))}, {width}\\)"):
        tokenizer.encode(torch.rand(1, *size, width + 1))
    with pytest.raises(UserError, match="expected"):
        tokenizer.decode(torch.zeros(1, 99, dtype=torch.int64))


def test_conv_weights_serve_any_image_size(tmp_path):
    small = TOKENIZERS["conv"](FSQ([8, 5, 4])).eval()
    small.save_pretrained(tmp_path)
    wide = Tokenizer.from_pretrained(tmp_path, image_size=[16, 32])
    assert wide.spec.shape == (4, 8)
    assert wide.encode(torch.rand(1, 3, 16, 32)).shape == (1, 4, 8)


def test_conv_refuses_sizes():
    with pytest.raises(UserError, match="20x16 must be divisible by 8"):
        ConvTokenizer(FSQ([8, 5]), (20, 16), channel_multipliers=(1, 1), patch_size=4, **CONV)
    with pytest.raises(UserError, match="counts must be equal"):
        ConvTokenizer(
            FSQ([8, 5]), 16, channel_multipliers=(1, 1), decoder_channel_multipliers=(1,), **CONV
        )


@pytest.mark.parametrize(
    ("multipliers", "parameters"), [((1, 1, 2, 2, 4), 71_883_403), ((1, 2, 2, 4), 70_109_835)]
)
def test_llamagen_sizes(multipliers, parameters):
    with torch.device("meta"):
        model = ConvTokenizer(VQ(16384, 8), channel_multipliers=multipliers)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_var_sizes():
    codes = MultiScale(VQ(4096, 32, l2_normalise=False))
    with torch.device("meta"):
        model = ConvTokenizer(codes, channels=160, z_channels=32, kernel_size=3)
    parts = (model.encoder, model.decoder, model.quantizer, model)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert [round(count / 1e6, 2) for count in counts] == [44.11, 64.65, 0.17, 108.95]


def test_titok_sizes():
    with torch.device("meta"):
        model = TiTok(
            VQ(8192, 64),
            num_latent_tokens=128,
            encoder_width=768,
            encoder_depth=12,
            encoder_heads=12,
            decoder_width=1024,
            decoder_depth=24,
            decoder_heads=16,
        )
    millions = [
        sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.encoder, model.decoder, model)
    ]
    assert [round(m, 1) for m in millions] == [86.0, 303.6, 390.2]


def test_titok_refuses_sizes():
    with pytest.raises(UserError, match="image_size 20 must be divisible by patch_size 8"):
        TiTok(FSQ([8, 5]), 20, 8, **VIT)


def test_loading_refuses_an_unknown_argument(tmp_path):
    TOKENIZERS["titok"](FSQ([8, 5, 4])).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"patch_size"', '"patch_sise"'))
    with pytest.raises(CheckpointError, match="did you mean 'patch_size'"):
        Tokenizer.from_pretrained(tmp_path)
