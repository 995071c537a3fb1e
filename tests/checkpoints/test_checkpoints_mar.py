"""The importer of MAR, on random weights in its layout."""

import pytest
import torch

from vistok.checkpoints import mar
from vistok.errors import CheckpointError

DIM, DECODER, HIDDEN, WIDTH = 32, 48, 2, 24
SLOTS, POSITIONS, CHANNELS, CLASSES = 5, 16, 3, 4


def with_bias(shapes):
    """Names of layers to those of their tensors."""
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in shapes.items()}


def published(positions=POSITIONS, channels=CHANNELS):
    layers = {"z_proj": (DIM, channels), "z_proj_ln": (DIM,), "decoder_embed": (DECODER, DIM)}
    for part, dim, depth in (("encoder", DIM, 1), ("decoder", DECODER, 2)):
        layers[f"{part}_norm"] = (dim,)
        block = {"norm1": (dim,), "norm2": (dim,), "mlp.fc1": (HIDDEN * dim, dim)}
        block |= {"mlp.fc2": (dim, HIDDEN * dim), "attn.qkv": (3 * dim, dim)}
        block |= {"attn.proj": (dim, dim)}
        layers |= {f"{part}_blocks.{i}.{k}": s for i in range(depth) for k, s in block.items()}
    net = {"time_embed.mlp.0": (WIDTH, 256), "time_embed.mlp.2": (WIDTH, WIDTH)}
    net |= {"cond_embed": (WIDTH, DECODER), "input_proj": (WIDTH, channels)}
    net |= {"res_blocks.0.in_ln": (WIDTH,), "res_blocks.0.adaLN_modulation.1": (3 * WIDTH, WIDTH)}
    net |= {f"res_blocks.0.mlp.{i}": (WIDTH, WIDTH) for i in (0, 2)}
    net |= {"final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}
    net |= {"final_layer.linear": (2 * channels, WIDTH)}
    shapes = with_bias(layers | {f"diffloss.net.{name}": shape for name, shape in net.items()})
    shapes |= {"class_emb.weight": (CLASSES, DIM), "fake_latent": (1, DIM)}
    shapes |= {"encoder_pos_embed_learned": (1, SLOTS + positions, DIM)}
    shapes |= {"decoder_pos_embed_learned": (1, SLOTS + positions, DECODER)}
    shapes |= {"diffusion_pos_embed_learned": (1, positions, DECODER)}
    shapes |= {"mask_token": (1, 1, DECODER)}
    return {name: torch.randn(shape) / 8 for name, shape in shapes.items()}


def imported(weights, **options):
    return mar.generator(weights, **{"num_heads": 4, "decoder_num_heads": 6, **options})


def test_every_weight_has_its_place():
    weights = published()
    model = imported(dict(weights))
    assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in weights.values())
    assert model.spec.shape == (4, 4)
    assert len(model.class_names) == CLASSES
    fresh = type(model).from_config(model.arguments)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    null = model.condition(model.null_condition(torch.zeros(1).long()))
    assert torch.equal(null[0], weights["fake_latent"])


@pytest.mark.parametrize(
    ("positions", "options", "shape"),
    [
        (16, {"shape": (16,)}, (16,)),
        (16, {"shape": (2, 8)}, (2, 8)),
        (16, {"shape": (6, 5)}, (6, 5)),
        (6, {}, (6,)),
        (6, {"shape": (2, 3)}, (2, 3)),
    ],
)
def test_shapes_beside_the_square_of_the_file(positions, options, shape):
    model = imported(published(positions), **options)
    assert model.spec.shape == shape
    assert model.plan().masked[0] == len(model.output_position)


def test_squares_of_positions_are_an_option():
    model = imported(published(channels=12), patch_size=2)
    assert model.spec.shape == (8, 8)
    assert model.spec.dim == 3
    assert imported(published(channels=12), patch_size=2, shape=(4, 6)).spec.shape == (4, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_norm.bias": None}, "1 missing"),
        ({"encoder_norm.bias": torch.zeros(5)}, "1 mismatched"),
        ({"extra": torch.zeros(5)}, "1 unexpected"),
        ({"fake_latent": None}, "not a MAR"),
        ({"diffloss.net.input_proj.weight": None}, "not a MAR"),
        ({"z_proj.weight": None}, "not a MAR"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    weights = {k: v for k, v in (published() | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=f"file.pth: .*{message}"):
        imported(weights, where="file.pth")


@pytest.mark.parametrize("heads", [{"num_heads": 5}, {"decoder_num_heads": 5}])
def test_other_numbers_of_heads_are_refused(heads):
    with pytest.raises(CheckpointError, match="has not 5 heads: give num_heads"):
        imported(published(), **heads)
