"""The importers of VAR, on random weights in its layout."""

import pytest
import torch

from vistok.checkpoints import var
from vistok.checkpoints.files import read_weights
from vistok.errors import CheckpointError

VOCAB, CODE, CHANNELS = 11, 6, 4
DIM, HEADS, HIDDEN, CLASSES = 24, 3, 40, 5


def blocks(*names):
    """Shapes of residual blocks, each a name, its channels, and those before, where they differ."""
    found = {}
    for name, wide, *before in names:
        inward = before[0] if before else wide
        found |= {f"{name}.norm1": (inward,), f"{name}.conv1": (wide, inward, 3, 3)}
        found |= {f"{name}.norm2": (wide,), f"{name}.conv2": (wide, wide, 3, 3)}
        if before:
            found[f"{name}.nin_shortcut"] = (wide, inward, 1, 1)
    return found


def tokenizer_weights(smoothers=("qresi_ls.0", "qresi_ls.1", "qresi_ls.2", "qresi_ls.3"), kernel=3):
    """Two levels of one block and, in the decoder, two; the lower one has attention."""
    wide = 2 * CHANNELS
    shapes = {"encoder.conv_in": (CHANNELS, 3, 3, 3), "encoder.norm_out": (wide,)}
    shapes |= {"encoder.conv_out": (CODE, wide, 3, 3), "decoder.conv_in": (wide, CODE, 3, 3)}
    shapes |= {"decoder.norm_out": (CHANNELS,), "decoder.conv_out": (3, CHANNELS, 3, 3)}
    shapes |= {"encoder.down.0.downsample.conv": (CHANNELS, CHANNELS, 3, 3)}
    shapes |= {"decoder.up.1.upsample.conv": (wide, wide, 3, 3)}
    shapes |= blocks(("encoder.down.0.block.0", CHANNELS))
    shapes |= blocks(("encoder.down.1.block.0", wide, CHANNELS), ("encoder.mid.block_1", wide))
    shapes |= blocks(("encoder.mid.block_2", wide), ("decoder.mid.block_1", wide))
    shapes |= blocks(("decoder.mid.block_2", wide), ("decoder.up.0.block.0", CHANNELS, wide))
    shapes |= blocks(("decoder.up.0.block.1", CHANNELS), ("decoder.up.1.block.0", wide))
    shapes |= blocks(("decoder.up.1.block.1", wide))
    attentions = ("encoder.down.1.attn.0", "decoder.up.1.attn.0", "decoder.up.1.attn.1")
    for name in (*attentions, "encoder.mid.attn_1", "decoder.mid.attn_1"):
        shapes |= {f"{name}.norm": (wide,), f"{name}.qkv": (3 * wide, wide, 1, 1)}
        shapes |= {f"{name}.proj_out": (wide, wide, 1, 1)}
    shapes |= dict.fromkeys(("quant_conv", "post_quant_conv"), (CODE, CODE, kernel, kernel))
    smooth = (f"quantize.quant_resi.{name}" for name in smoothers)
    shapes |= dict.fromkeys(smooth, (CODE, CODE, kernel, kernel))
    tensors = {f"{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    tensors["quantize.embedding.weight"] = (VOCAB, CODE)
    tensors["quantize.ema_vocab_hit_SV"] = (3, VOCAB)
    return {name: torch.randn(shape) / 8 for name, shape in tensors.items()}


def generator_weights(sides=(1, 2, 4), shared=False, cosine=True, buffers=True):
    n = sum(side**2 for side in sides)
    shapes = {"word_embed": (DIM, CODE), "head_nm.ada_lin.1": (2 * DIM, DIM), "head": (VOCAB, DIM)}
    tensors = {"class_emb.weight": (CLASSES + 1, DIM), "lvl_embed.weight": (len(sides), DIM)}
    tensors |= {"pos_start": (1, sides[0] ** 2, DIM), "pos_1LC": (1, n, DIM)}
    if shared:
        shapes["shared_ada_lin.1"] = (6 * DIM, DIM)
    for i in range(2):
        name = f"blocks.{i}"
        shapes |= {f"{name}.attn.proj": (DIM, DIM), f"{name}.ffn.fc1": (HIDDEN, DIM)}
        shapes |= {f"{name}.ffn.fc2": (DIM, HIDDEN)}
        tensors |= {f"{name}.attn.mat_qkv.weight": (3 * DIM, DIM)}
        tensors |= {f"{name}.attn.q_bias": (DIM,), f"{name}.attn.v_bias": (DIM,)}
        if shared:
            tensors[f"{name}.ada_gss"] = (1, 1, 6, DIM)
        else:
            shapes[f"{name}.ada_lin.1"] = (6 * DIM, DIM)
        if cosine:
            tensors[f"{name}.attn.scale_mul_1H11"] = (1, HEADS, 1, 1)
    tensors |= {f"{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    weights = {name: torch.randn(shape) / 8 for name, shape in tensors.items()}
    if buffers:
        weights |= {f"blocks.{i}.attn.zero_k_bias": torch.zeros(DIM) for i in range(2)}
        levels = [torch.full((side**2,), k) for k, side in enumerate(sides)]
        weights |= {"lvl_1L": torch.cat(levels)[None]}
        weights |= {"attn_bias_for_masking": torch.zeros(1, 1, n, n)}
    return weights


SMOOTHERS = [  # names, and which serves each of four scales
    (tuple(f"qresi_ls.{i}" for i in range(4)), [0, 1, 2, 3]),
    (("qresi",), [0, 0, 0, 0]),
    (("0", "1", "2"), [0, 0, 1, 2]),
    ((), []),
]


@pytest.mark.parametrize(("smoothers", "serve"), SMOOTHERS)
@torch.no_grad()
def test_tokenizer_has_the_sizes_and_values_of_the_weights(smoothers, serve):
    given = tokenizer_weights(smoothers, kernel=1)
    model = var.tokenizer(given, 8, (1, 2, 3, 4), groups=2, smoothing=0.3)
    numbers = sum(p.numel() for name, p in given.items() if "ema_" not in name)
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert model.quantizer.smoother_of == serve
    assert model.encoder.norm_out.num_groups == 2
    attention = model.decoder.conv_blocks[0].attn[1]
    published = given["decoder.up.1.attn.1.qkv.weight"]
    parts = [part.weight for part in (attention.q, attention.k, attention.v)]
    assert torch.equal(torch.cat(parts), published)
    codes, grid = given["quantize.embedding.weight"], torch.randn(1, 4, 4, CODE)
    assert torch.equal(model.quantizer.codes(torch.tensor([[3]]))[0][0, 0, 0], codes[3])
    if smoothers:
        name = f"quantize.quant_resi.{smoothers[-1]}"
        mixed = grid @ given[f"{name}.weight"][:, :, 0, 0].T + given[f"{name}.bias"]
        torch.testing.assert_close(model.quantizer.added(grid, 3), 0.7 * grid + 0.3 * mixed)


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("options", [{}, {"shared": True}, {"cosine": False, "sides": (2, 4)}])
def test_generator_has_the_sizes_and_values_of_the_weights(options, buffers):
    given = generator_weights(buffers=buffers, **options)
    sides = options.get("sides", (1, 2, 4))
    model = var.generator(
        given, tokenizer_weights(), None if buffers else sides, num_heads=HEADS, norm_eps=1e-5
    )
    fixed = ("zero_k_bias", "lvl_1L", "attn_bias_for_masking")
    numbers = sum(p.numel() for name, p in given.items() if not name.endswith(fixed))
    numbers += sum(p.numel() for p in model.codes.parameters())
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert model.spec.shape == tuple((side, side) for side in sides)
    assert torch.equal(model.position, given["pos_1LC"][0])
    assert len(model.start) == sides[0] ** 2
    assert model.blocks[0].attention.num_heads == HEADS
    assert (model.modulation is not None) == options.get("shared", False)


def test_files_of_the_trainer_hold_both(tmp_path):
    weights = {"var_wo_ddp": generator_weights(), "vae_local": tokenizer_weights()}
    file, flat = tmp_path / "ar-ckpt-last.pth", tmp_path / "vae.pth"
    torch.save({"epoch": 3, "iter": 0, "trainer": {"config": {"depth": 2}, **weights}}, file)
    torch.save(weights["vae_local"], flat)
    found = read_weights(file, var.ENTRIES)
    models = [var.convert(found, str(file), tokenizer=source) for source in (file, flat)]
    assert models[0].fingerprint() == models[1].fingerprint()
    tokenizer = var.convert(
        read_weights(file, var.TOKENIZER_ENTRIES), image_size=8, scales=(1, 2, 4), groups=2
    )
    model = var.convert(found, tokenizer=tokenizer)
    assert model.fingerprint() == models[0].fingerprint()
    assert model.spec == tokenizer.spec


def test_published_scales_are_known():
    assert [sum(s * s for s in scales) for scales in var.SCALES.values()] == [680, 2240, 9451]
    with pytest.raises(CheckpointError, match="no published scales end at 4x4"):
        var.tokenizer(tokenizer_weights(), 8)
    with pytest.raises(CheckpointError, match="no published scales have 21 positions"):
        var.generator(generator_weights(buffers=False), tokenizer_weights())


def test_what_does_not_fit_is_refused():
    given, codes = generator_weights(), tokenizer_weights()
    with pytest.raises(CheckpointError, match="give its file, too"):
        var.convert(given)
    with pytest.raises(CheckpointError, match="bias of keys; expected zeros"):
        var.generator(given | {"blocks.1.attn.zero_k_bias": torch.ones(DIM)}, codes)
    with pytest.raises(CheckpointError, match="1 unexpected tensor"):
        var.generator(given | {"blocks.0.attn.other": torch.zeros(1)}, codes)
    with pytest.raises(CheckpointError, match="missing tensor"):
        var.generator({k: w for k, w in given.items() if k != "pos_start"}, codes)
    codes["quantize.embedding.weight"] = torch.zeros(12, CODE)
    with pytest.raises(CheckpointError, match="11 tokens and width 24, but a tokenizer of 12"):
        var.generator(given, codes)
    with pytest.raises(CheckpointError, match="not VAR's tokenizer"):
        var.convert({"encoder.conv_in.weight": torch.zeros(1)})
