"""The importer of FlowAR, on random weights in its layout."""

import pytest
import torch

from vistok.checkpoints import flowar
from vistok.errors import CheckpointError

DIM, HIDDEN, CHANNELS, CLASSES, ROWS, WIDTH = 24, 40, 3, 5, 21, 64


def gated(dim, hidden, bias=True):
    """Shapes of what all blocks have."""
    shapes = {"attn.proj": (dim, dim), "mlp.fc1_g": (hidden, dim), "mlp.fc1_x": (hidden, dim)}
    shapes |= {"mlp.fc2": (dim, hidden)}
    return shapes | ({"attn.qkv": (3 * dim, dim)} if bias else {})


def weights(cross, buffers=True):
    shapes = {"z_proj": (DIM, CHANNELS), "decoder_embed": (DIM, DIM)}
    for half, depth in (("encoder", 2), ("decoder", 1)):
        for i in range(depth):
            block = gated(DIM, HIDDEN) | {"ada_lin.1": (6 * DIM, DIM)}
            shapes |= {f"{half}_blocks.{i}.{name}": shape for name, shape in block.items()}
    head = {"time_embed.mlp.0": (WIDTH, 256), "time_embed.mlp.2": (WIDTH, WIDTH)}
    head |= {"cond_embed": (WIDTH, DIM), "input_proj": (WIDTH, CHANNELS)}
    head |= {"final_layer.linear": (CHANNELS, WIDTH)}
    head |= {"final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}
    plain = {"class_emb": (CLASSES + 1, DIM)}
    plain |= dict.fromkeys(("z_proj_ln", "encoder_norm", "decoder_norm"), (DIM,))
    for i in range(2):
        block = gated(WIDTH, 8 * WIDTH // 3, bias=False)
        own = {"attn.qkv": (3 * WIDTH, WIDTH)}
        if cross:
            block |= {f"ada_lin_{part}": (3 * WIDTH, WIDTH) for part in ("attn", "mlp")}
            block |= {"crossattn.proj": (WIDTH, WIDTH)}
            own |= {"crossattn.q": (WIDTH, WIDTH), "crossattn.kv": (2 * WIDTH, DIM)}
            own |= {"norm2_1": (WIDTH,), "norm2_2": (DIM,)}
        else:
            block |= {"ada_lin": (6 * WIDTH, WIDTH)}
        head |= {f"res_blocks.{i}.{name}": shape for name, shape in block.items()}
        plain |= {f"flownet.res_blocks.{i}.{name}": shape for name, shape in own.items()}
    shapes |= {f"flownet.{name}": shape for name, shape in head.items()}
    tensors = {f"{name}.weight": shape for name, shape in (shapes | plain).items()}
    tensors |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    for table in ("encoder_pos", "decoder_pos", "diffusion_pos"):
        tensors[f"{table}_embed_learned"] = (1, ROWS, DIM)
    if buffers:
        tensors |= {"mask": (1, 1, ROWS, ROWS), "flownet.res_blocks.0.attn.rope.freqs": (16,)}
        tensors |= {"encoder_blocks.0.attn.rope.freqs": (2,)}  # a head of 8 channels
        tensors |= {"decoder_blocks.0.attn.rope.freqs": (3,)}
    return {name: torch.randn(shape) / 8 for name, shape in tensors.items()}


@pytest.mark.parametrize("cross", [False, True])
def test_sizes_are_those_of_the_weights(cross):
    given = weights(cross)
    model = flowar.generator(given)
    buffers = [name for name in given if name == "mask" or ".rope." in name]
    numbers = sum(p.numel() for name, p in given.items() if name not in buffers)
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert model.scales == (1, 2, 4)
    assert (model.spec.shape, model.spec.dim) == ((4, 4), CHANNELS)
    assert len(model.class_names) == CLASSES
    assert (model.head.width, model.head.depth, model.head.cross) == (WIDTH, 2, cross)
    trunk = model.trunk
    assert [len(half.blocks) for half in (trunk.encoder, trunk.decoder)] == [2, 1]
    heads = [half.blocks[0].attention.num_heads for half in (trunk.encoder, trunk.decoder)]
    assert heads == [3, 2]
    gates = trunk.encoder.blocks[1].feed_forward.gate_value.weight
    assert torch.equal(gates[:HIDDEN], given["encoder_blocks.1.mlp.fc1_g.weight"])


def test_heads_are_asked_for_where_the_file_does_not_tell():
    bare = weights(cross=True, buffers=False)
    with pytest.raises(CheckpointError, match=r"model\.pth: .* give num_heads"):
        flowar.generator(bare, where="model.pth")
    with pytest.raises(CheckpointError, match="give num_heads"):
        flowar.generator(bare, num_heads=5)
    trunk = flowar.generator(bare, num_heads=4).trunk
    assert trunk.decoder.blocks[0].attention.num_heads == 4


def test_what_does_not_fit_is_named():
    given = weights(cross=False)
    with pytest.raises(CheckpointError, match="21 positions are not those of scales"):
        flowar.generator(given, scales=(1, 4))
    missing = {k: v for k, v in given.items() if k != "z_proj_ln.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing tensor.*trunk\.embed_norm\.weight"):
        flowar.generator(missing)
    with pytest.raises(CheckpointError, match="unexpected"):
        flowar.generator(given | {"pred.weight": torch.zeros(3, DIM)})
    with pytest.raises(CheckpointError, match="not a FlowAR"):
        flowar.generator({"z_proj.weight": torch.zeros(4, 3)})
