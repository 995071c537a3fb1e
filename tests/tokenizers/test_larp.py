import math

import pytest
import torch

from vistok.checkpoints import larp as importer
from vistok.errors import CheckpointError, UserError
from vistok.quantizers import VQ, StochasticVQ
from vistok.tokenizers import LARP, Tokenizer

TABLES = ["encoder_patch", "encoder_latent_query", "decoder_latent", "decoder_patch_query"]
SIZES = {
    "frames": 4,
    "image_size": (16, 24),
    "decoder_patch_size": (1, 8, 4),
    "token_shape": (2, 3, 2),
    "encoder_heads": 2,
    "decoder_heads": 4,
}
READ_FROM_SHAPES = {
    "patch_size": (2, 4, 8),
    "encoder_width": 24,
    "encoder_depth": 2,
    "decoder_width": 16,
    "decoder_depth": 1,
}


def larp(quantizer=None, **changes):
    return LARP(quantizer or VQ(64, 4), **SIZES | READ_FROM_SHAPES | changes)


@pytest.fixture
def videos():
    return torch.rand(2, 3, 4, 16, 24)


def test_tokens_are_declared_cells_of_a_grid(videos):
    grid, sequence = larp().eval(), larp(token_shape=(12,)).eval()
    sequence.load_state_dict(grid.state_dict())
    assert grid.spec.shape == (2, 3, 2)
    tokens = grid.encode(videos)
    assert tokens.shape == (2, 2, 3, 2)
    assert torch.equal(tokens.flatten(1), sequence.encode(videos))
    assert torch.equal(grid.decode(tokens), sequence.decode(tokens.flatten(1)))


@pytest.mark.parametrize("tables", [[], TABLES], ids=["fixed", "trained"])
@pytest.mark.parametrize("quantizer", [VQ, StochasticVQ])
def test_training_step_reaches_every_parameter(tables, quantizer, videos):
    model = larp(quantizer(64, 4, entropy=0.1), learned=tables, typed=tables)
    trained = {name for name, _ in model.named_parameters() if name.startswith("tables.")}
    assert trained == {f"tables.{t}.{kind}" for t in tables for kind in ("rows", "type_embed")}
    output = model(videos)
    (output.reconstruction.square().mean() + sum(output.losses.values())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.any() for p in model.parameters())


def test_stochastic_codes_stay_in_training(videos):
    model = larp(StochasticVQ(64, 4, temperature=10.0))
    assert not torch.equal(model(videos).tokens, model(videos).tokens)
    model.eval()
    assert torch.equal(model(videos).tokens, model.encode(videos))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_tables_survive_saving(dtype, videos, tmp_path):
    model = larp().eval()
    assert not any("encoder_patch" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path, torch_dtype=dtype)
    assert torch.equal(loaded.tables.encoder_patch(), model.tables.encoder_patch())
    assert loaded.decode(loaded.encode(videos)).isfinite().all()


def test_fixed_tables():
    model = larp(latent_base=100.0)

    def row(position, width, base=10000.0):
        angles = [position * base ** (-2 * i / width) for i in range(width // 2)]
        return [f(angle) for f in (math.sin, math.cos) for angle in angles]

    cells = [(t, y, x) for t in range(2) for y in range(4) for x in range(3)]
    places = torch.tensor([row(x, 12) + row(y, 12) for _, y, x in cells])
    times = torch.tensor([row(t, 24) for t, _, _ in cells])
    torch.testing.assert_close(model.tables.encoder_patch(), places + times)
    latents = torch.tensor([row(k, 16, 100.0) for k in range(12)])
    torch.testing.assert_close(model.tables.decoder_latent(), latents)


def test_pixels_of_a_patch_are_ordered_by_time_height_width_colour():
    model = larp(decoder_patch_size=(2, 8, 4)).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.rand_like(model.head.bias))
    video = model.decode(torch.zeros(1, 2, 3, 2, dtype=torch.int64))[0]
    patch = model.head.bias.detach().reshape(2, 8, 4, 3).permute(3, 0, 1, 2)
    assert torch.equal(video, patch.repeat(1, 2, 2, 6))


@pytest.mark.parametrize("shape", [(1, 3, 16, 24), (1, 3, 5, 16, 24), (1, 3, 4, 16, 16)])
def test_refuses_videos_of_another_shape(shape):
    with pytest.raises(UserError, match=r"got videos .* expected \(B, 3, 4, 16, 24\)"):
        larp().encode(torch.rand(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 5}, "5 frames of 16x24 pixels must be divisible"),
        ({"patch_size": (8, 8)}, "patch's \\(frames, height, width\\), got \\(8, 8\\)"),
        ({"encoder_width": 22}, "width 22 must be divisible by 4"),
        ({"learned": ["encoder_path"]}, "did you mean 'encoder_patch'"),
        ({"typed": ["latents"]}, "expected one of encoder_patch, encoder_latent_query"),
    ],
)
def test_refuses_settings(changes, message):
    with pytest.raises(UserError, match=message):
        larp(**changes)


def test_published_sizes():
    with torch.device("meta"):
        model = LARP(StochasticVQ(8192, 16))
    assert model.spec.shape == (4, 16, 16)
    assert model.input_shape == (3, 16, 128, 128)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 172.2


PUBLISHED = {
    "patch_embed": "x_embedder.proj",
    "proj_out": "bottleneck.in_linear",
    "proj_in": "bottleneck.out_linear",
    "quantizer": "bottleneck.regularizer",
    "norm": "final_layer.norm_final",
    "head": "final_layer.linear",
    "attn.in_proj": "attn.qkv",
    "attn.out_proj": "attn.proj",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "tables.encoder_patch.rows": "encoder_patch_pe",
    "tables.encoder_latent_query.rows": "encoder_latent_query_embed",
    "tables.decoder_latent.rows": "decoder_latent_pe",
    "tables.decoder_patch_query.rows": "decoder_patch_query_embed",
}


def published(model):
    """Return the weights as the official file has them, fixed tables and the prior included."""
    weights = {"prior_model.head.weight": torch.zeros(3)}
    buffers = {f"tables.{name}": table for name, table in model.tables.named_buffers()}
    for name, tensor in (model.state_dict() | buffers).items():
        if name.startswith("tables.") and "latent_query.rows" not in name:
            tensor = tensor.unsqueeze(0)
        for ours, theirs in PUBLISHED.items():
            name = name.replace(ours, theirs)
        name = name.removeprefix("tables.").replace(".type_embed", "_token_type_embed")
        weights[name] = tensor
    return weights


@pytest.mark.parametrize("tables", [["encoder_latent_query"], [], TABLES])
def test_import(tables, videos):
    model = larp(StochasticVQ(64, 4, 0.1), learned=tables, typed=tables[1:]).eval()
    imported = importer.tokenizer(published(model), learned=tables, temperature=0.1, **SIZES)
    assert imported.eval().fingerprint() == model.fingerprint()
    assert torch.equal(imported.encode(videos), model.encode(videos))


def without(weights, name):
    return {k: v for k, v in weights.items() if k != name}


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        (lambda w: without(w, "x_embedder.proj.weight"), {}, "file: no tokenizer of LARP"),
        (lambda w: without(w, "final_layer.linear.bias"), {}, "missing .* head.bias"),
        (lambda w: without(w, "decoder_latent_pe"), {}, "'tables.decoder_latent.rows'"),
        (lambda w: w | {"cls_token": torch.zeros(1)}, {}, "unexpected .* cls_token"),
        (lambda w: w, {"frames": 8}, "'tables.encoder_patch.rows' \\(24, 24\\) is not the fixed"),
        (lambda w: w, {"token_shape": (3, 5)}, "is not the fixed \\(15, 16\\)"),
        (lambda w: w, {"image_size": (24, 16)}, "is not the fixed"),
        (lambda w: w, {"latent_base": 100.0}, "is not the fixed"),
    ],
)
def test_import_refuses(change, sizes, message):
    with pytest.raises(CheckpointError, match=message):
        importer.tokenizer(change(published(larp())), where="file", **SIZES | sizes)
