"""The importers of MaskGIT and RAR, on random weights in their layouts."""

import pytest
import torch

from vistok.checkpoints import maskgit, rar
from vistok.errors import CheckpointError

DIM, HIDDEN, VOCAB, CLASSES, TOKENS = 32, 48, 17, 4, 6
LINEARS = {"mlp.fc1": (HIDDEN, DIM), "mlp.fc2": (DIM, HIDDEN), "attn.proj": (DIM, DIM)}
NORMS = {"norm1": (DIM,), "norm2": (DIM,)}


def with_bias(shapes):
    """Names of layers to those of their tensors."""
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in shapes.items()}


def bert():
    shapes = with_bias({"model.embeddings.LayerNorm": (DIM,), "model.lm_head": (VOCAB, DIM)})
    tables = {"word": VOCAB + CLASSES + 2, "position": TOKENS + 1, "token_type": 2}
    shapes |= {f"model.embeddings.{name}_embeddings.weight": (n, DIM) for name, n in tables.items()}
    layer = {f"attention.self.{part}": (DIM, DIM) for part in ("query", "key", "value")}
    layer |= {"attention.output.dense": (DIM, DIM), "attention.output.LayerNorm": (DIM,)}
    layer |= {"intermediate.dense": (HIDDEN, DIM), "output.dense": (DIM, HIDDEN)}
    layer |= {"output.LayerNorm": (DIM,)}
    for i in range(2):
        shapes |= with_bias({f"model.encoder.layer.{i}.{k}": s for k, s in layer.items()})
    return drawn(shapes)


def uvit():
    shapes = with_bias({"norm": (DIM,), "lm_head": (VOCAB, DIM)})
    shapes |= {"embeddings.weight": (VOCAB + CLASSES + 2, DIM), "pos_embed": (1, TOKENS + 1, DIM)}
    for block in ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"):
        layers = LINEARS | NORMS
        if block.startswith("out"):
            layers = layers | {"skip_linear": (DIM, 2 * DIM)}
        shapes |= with_bias({f"{block}.{name}": shape for name, shape in layers.items()})
        shapes[f"{block}.attn.qkv.weight"] = (3 * DIM, DIM)
    return drawn(shapes)


def of_rar():
    shapes = {"cls_token": (1, 1, DIM), "embeddings.weight": (VOCAB + CLASSES + 2, DIM)}
    shapes |= {"pos_embed": (1, 90, DIM), "target_aware_pos_embed": (1, 90, DIM)}
    shapes |= {"timesteps_embeddings": (1, 50, DIM)}
    shapes |= with_bias(
        {"lm_head": (VOCAB, DIM), "adaln_before_head.adaLN_modulation.1": (2 * DIM, DIM)}
    )
    heads = {"attn.q_norm": (DIM // 4,), "attn.k_norm": (DIM // 4,)}
    layers = LINEARS | NORMS | heads
    layers |= {"attn.qkv": (3 * DIM, DIM), "adaLN_modulation.1": (6 * DIM, DIM)}
    for i in range(2):
        shapes |= with_bias({f"blocks.{i}.{name}": shape for name, shape in layers.items()})
    return drawn(shapes)


def drawn(shapes):
    return {name: torch.randn(shape) / 8 for name, shape in shapes.items()}


# Importer, weights, and the numbers that ours has less.
LAYOUTS = {
    "bert": (maskgit.generator, bert, 2 * DIM),
    "uvit": (maskgit.generator, uvit, 0),
    "rar": (rar.generator, of_rar, DIM * ((90 - 8) + (90 - 6) + (50 - 7) + 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_has_its_place(layout):
    importer, published, less = LAYOUTS[layout]
    weights = published()
    model = importer(dict(weights), shape=(2, 3), num_heads=4)
    found = sum(p.numel() for p in model.parameters())
    assert found == sum(w.numel() for w in weights.values()) - less
    assert model.spec.shape == (2, 3)
    assert len(model.class_names) == CLASSES
    fresh = type(model).from_config(model.config)
    assert fresh.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_does_not_fit_is_refused(layout):
    importer, published, _ = LAYOUTS[layout]
    last = {"bert": "model.encoder.layer.1.output.dense", "uvit": "out_blocks.1.mlp.fc2"}
    bias = last.get(layout, "blocks.1.mlp.fc2") + ".bias"
    head = "model.lm_head.weight" if layout == "bert" else "lm_head.weight"
    for change, message in (
        ({bias: None}, "1 missing"),
        ({bias: torch.zeros(5)}, "1 mismatched"),
        ({"extra": torch.zeros(5)}, "1 unexpected"),
        ({head: None}, "not a"),
    ):
        weights = {k: v for k, v in (published() | change).items() if v is not None}
        with pytest.raises(CheckpointError, match=f"file.pt: .*{message}"):
            importer(weights, shape=(2, 3), num_heads=4, where="file.pt")
    with pytest.raises(CheckpointError, match="give num_heads"):
        importer(published(), shape=(2, 3), num_heads=5)


def test_without_a_shape_maskgit_takes_a_sequence():
    assert maskgit.generator(bert(), num_heads=4, ordered=True).spec.shape == (TOKENS,)
