"""The importer of TokenBridge, on random weights in its layout."""

import pytest
import torch

from vistok.checkpoints import tokenbridge
from vistok.errors import CheckpointError
from vistok.quantizers.dimension_wise import normal_cells
from vistok.tokens import TokenSpec

DIM, DECODER, WIDTH, LEVELS, CHANNELS, CLASSES, BUFFER, POSITIONS = 24, 32, 16, 8, 16, 5, 3, 9
HEADS = {"num_heads": 3, "decoder_num_heads": 4, "head_heads": 2}


def block(dim):
    shapes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    shapes |= {"mlp.fc1": (2 * dim, dim), "mlp.fc2": (dim, 2 * dim)}
    return shapes | {"norm1": (dim,), "norm2": (dim,)}


def weights(buffers=True):
    shapes = {"z_proj": (DIM, CHANNELS), "decoder_embed": (DECODER, DIM)}
    shapes |= {"z_proj_ln": (DIM,), "encoder_norm": (DIM,), "decoder_norm": (DECODER,)}
    for name, dim, depth in (("encoder", DIM, 2), ("decoder", DECODER, 1), ("channel", WIDTH, 2)):
        for i in range(depth):
            shapes |= {f"{name}_blocks.{i}.{part}": shape for part, shape in block(dim).items()}
    for i in range(2):
        own = f"channel_blocks.{i}"
        shapes |= {f"{own}.adaLN_modulation.1": (6 * WIDTH, WIDTH)}
        shapes |= {f"{own}.attn.{part}_norm": (WIDTH // 2,) for part in "qk"}
    shapes |= {"condition_proj": (WIDTH, DECODER), "channel_norm": (WIDTH,)}
    shapes |= {"channel_final.adaLN_modulation.1": (2 * WIDTH, WIDTH)}
    shapes |= {f"channel_heads.{i}": (LEVELS, WIDTH) for i in range(CHANNELS)}
    tensors = {f"{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    tensors |= {f"token_embeddings.{i}.weight": (LEVELS, WIDTH) for i in range(CHANNELS - 1)}
    tensors |= {"class_emb.weight": (CLASSES, DIM), "fake_latent": (1, DIM)}
    tensors |= {"encoder_pos_embed_learned": (1, BUFFER + POSITIONS, DIM)}
    tensors |= {"decoder_pos_embed_learned": (1, BUFFER + POSITIONS, DECODER)}
    tensors |= {"output_pos_embed": (1, POSITIONS, DECODER), "mask_token": (1, 1, DECODER)}
    tensors |= dict.fromkeys(("channel_embed", "timesteps_embeddings"), (1, CHANNELS, WIDTH))
    made = {name: torch.randn(shape) / 8 for name, shape in tensors.items()}
    if buffers:
        bounds, means = normal_cells(LEVELS, 3.0)
        made |= {"reconstruction_values": means, "boundaries": bounds}
        made |= {"channel_mask": torch.full((CHANNELS, CHANNELS), -torch.inf).triu(1)}
    return made


def test_sizes_are_those_of_the_weights():
    given = weights(buffers=False)
    model = tokenbridge.generator(given, limit=4.0, dropout=0.2, **HEADS)
    numbers = sum(tensor.numel() for tensor in given.values())
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert model.spec == TokenSpec.factorised((3, 3), (LEVELS,) * CHANNELS, values="normal(4,3)")
    assert len(model.class_names) == CLASSES
    assert (model.head.width, len(model.head.blocks)) == (WIDTH, 2)
    assert model.head.sampling_adds_first_step
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.2}


def test_tables_and_heads_lie_in_the_order_of_drawing():
    given = weights()
    head = tokenbridge.generator(given, **HEADS).head
    table = head.digit_embedding.weight.unflatten(0, (CHANNELS - 1, LEVELS))
    for row in (0, 2, 10, 14):
        assert torch.equal(table[row], given[f"token_embeddings.{row}.weight"])
        assert torch.equal(head.digit_logits.weight[row], given[f"channel_heads.{row}.weight"])
    last = given["channel_final.adaLN_modulation.1.bias"]
    assert torch.equal(head.modulation.bias[-2 * WIDTH :], last)


def test_averaged_weights_lack_buffers():
    given = weights()
    without = {name: tensor for name, tensor in given.items() if name in weights(buffers=False)}
    models = [tokenbridge.generator(w, **HEADS) for w in (given, without)]
    assert models[0].fingerprint() == models[1].fingerprint()


def test_levels_of_another_quantizer_are_refused():
    given = weights()
    with pytest.raises(CheckpointError, match=r"model\.pth: .* give deviations"):
        tokenbridge.generator(given, deviations=3.5, where="model.pth", **HEADS)
    given["reconstruction_values"] = torch.zeros(LEVELS + 1)
    with pytest.raises(CheckpointError, match="give deviations"):
        tokenbridge.generator(given, **HEADS)


def test_what_does_not_fit_is_named():
    with pytest.raises(CheckpointError, match="width 16 has not 3 heads: give head_heads"):
        tokenbridge.generator(weights(), **{**HEADS, "head_heads": 3})
    with pytest.raises(CheckpointError, match="give num_heads"):
        tokenbridge.generator(weights(), **{**HEADS, "num_heads": 5})
    short = weights()
    del short["token_embeddings.3.weight"]
    with pytest.raises(CheckpointError, match=r"not a TokenBridge .*token_embeddings\.3"):
        tokenbridge.generator(short, **HEADS)
    with pytest.raises(CheckpointError, match=r"unexpected .* extra"):
        tokenbridge.generator({**weights(), "extra": torch.zeros(1)}, **HEADS)
    with pytest.raises(CheckpointError, match="not a TokenBridge"):
        tokenbridge.generator({"weight": torch.zeros(2, 2)})
