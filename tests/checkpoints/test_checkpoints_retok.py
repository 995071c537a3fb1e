"""The importers of ReToK's and GigaTok's tokenizers and transformers, on random weights."""

import pytest
import torch
import torch.nn.functional as F

from vistok.checkpoints import retok
from vistok.errors import CheckpointError
from vistok.generators import LlamaGen
from vistok.quantizers import VQ
from vistok.tokenizers import ReTok

SIZES = {
    "image_size": 16,
    "num_latent_tokens": 8,
    "channels": 8,
    "channel_multipliers": [1, 2],
    "decoder_channel_multipliers": [2, 1],
    "num_res_blocks": 1,
    "z_channels": 12,
    "groups": 4,
    "encoder_width": 64,
    "encoder_depth": 1,
    "encoder_heads": 1,
    "decoder_width": 128,
    "decoder_depth": 2,
    "decoder_heads": 2,
}
NAMES = (  # ours and the published
    ("quantizer.", "quantize."),
    ("post_quant_proj.", "post_quant_conv."),
    ("quant_proj.", "quant_conv."),
    (".mid.2.", ".mid.1."),
    ("to_tokens.proj_out.", "s2to1encoder.conv_out."),
    ("to_tokens.memory_positions", "s2to1encoder.positional_embedding"),
    ("to_tokens.query_positions", "s2to1encoder.latent_token_positional_embedding"),
    ("to_tokens.embed.", "s2to1encoder.encoder_embed."),
    ("to_tokens.", "s2to1encoder."),
    ("to_grid.query_positions", "s1to2decoder.positional_embedding"),
    ("to_grid.memory_positions", "s1to2decoder.latent_token_positional_embedding"),
    ("to_grid.embed.", "s1to2decoder.decoder_embed."),
    ("to_grid.alignment.", "s1to2decoder.distill_mlp."),
    ("to_grid.", "s1to2decoder."),
    (".layers.", ".transformer."),
    (".cross_attn.", ".multihead_attn."),
)
POINTWISE = ("quant_conv.weight", "post_quant_conv.weight", "s2to1encoder.conv_out.weight")


def published(model):
    weights = {"quantize.codebook_used": torch.zeros(64)}
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        if name.startswith("encoder."):
            name = name.replace(".resample.", ".downsample.")
        if name.startswith("decoder."):
            up = ".upsample.conv1." if model.config.d2s_up else ".upsample.conv."
            name = name.replace(".resample.conv.", up)
        if name in POINTWISE:
            tensor = tensor[:, :, None, None]
        if name.endswith("positional_embedding"):
            tensor = tensor[:, None]
            if "latent_token" in name and len(tensor) > 8:
                tensor, weights[f"{name}_comp"] = tensor[:8], tensor[8:]
        weights[name] = tensor.clone()
    return weights


@pytest.mark.parametrize(
    "changes",
    [
        {"num_redundant": 6, "tail_drop": "uniform(2,14)", "alignment_dim": 5, "distill_depth": 2},
        {"num_redundant": 0},
        {"num_redundant": 0, "adaptive_gn": False, "d2s_up": False},
    ],
)
def test_round_trip(changes):
    model = ReTok(VQ(16, 4, rotation=True), **SIZES, **changes)
    weights = published(model)
    options = {k: v for k, v in changes.items() if k == "distill_depth"}
    loaded = retok.convert(weights, image_size=16, groups=4, **options)
    assert loaded.fingerprint() == model.fingerprint()


def test_refuses_other_files():
    weights = published(ReTok(VQ(16, 4), num_redundant=0, **SIZES))
    options = {"image_size": 16, "groups": 4}
    with pytest.raises(CheckpointError, match="not a tokenizer of ReToK"):
        retok.tokenizer({"a": torch.zeros(1)}, where="f.pt")
    with pytest.raises(CheckpointError, match="1 missing tensor"):
        lacking = {k: v for k, v in weights.items() if k != "s1to2decoder.ln_post.bias"}
        retok.tokenizer(lacking, **options)
    with pytest.raises(CheckpointError, match="mismatched"):
        retok.tokenizer(weights, image_size=32, groups=4)
    with pytest.raises(CheckpointError, match="no positional_embedding"):
        retok.generator({"tok_embeddings.weight": torch.zeros(1, 1)})


DIM, HIDDEN, VOCAB, CLASSES, LENGTH = 128, 96, 17, 4, 6


def gpt():
    shapes = {
        "cls_embedding.embedding_table.weight": (CLASSES + 1, DIM),
        "tok_embeddings.weight": (VOCAB, DIM),
        "positional_embedding": (LENGTH + 1, DIM),
        "norm.weight": (DIM,),
        "output.weight": (VOCAB, DIM),
    }
    for i in range(2):
        block = {
            "attention.wqkv": (3 * DIM, DIM),
            "attention.wo": (DIM, DIM),
            "feed_forward.w1": (HIDDEN, DIM),
            "feed_forward.w3": (HIDDEN, DIM),
            "feed_forward.w2": (DIM, HIDDEN),
            "attention_norm": (DIM,),
            "ffn_norm": (DIM,),
        }
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return {name: torch.randn(shape) / 8 for name, shape in shapes.items()}


def logits(weights, tokens, labels):
    """GigaTok's gpt_1d in plain operations, for two heads."""

    def norm(x, name):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return x * scale * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    rows = [
        weights["cls_embedding.embedding_table.weight"][labels][:, None],
        weights["tok_embeddings.weight"][tokens[:, :-1]],
    ]
    x = torch.cat(rows, dim=1) + weights["positional_embedding"][: tokens.shape[1]]
    for i in range(2):
        h = norm(x, f"layers.{i}.attention_norm")
        q, k, v = linear(h, f"layers.{i}.attention.wqkv").unflatten(2, (3, 2, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (DIM // 2) ** 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + linear(mixed, f"layers.{i}.attention.wo")
        h = norm(x, f"layers.{i}.ffn_norm")
        gated = F.silu(linear(h, f"layers.{i}.feed_forward.w1"))
        gated = gated * linear(h, f"layers.{i}.feed_forward.w3")
        x = x + linear(gated, f"layers.{i}.feed_forward.w2")
    return linear(norm(x, "norm"), "output")


@torch.no_grad()
def test_the_generator_is_llamagen_with_learned_positions():
    weights = gpt()
    model = retok.convert(dict(weights)).eval()
    assert type(model) is LlamaGen
    assert model.spec.shape == (LENGTH,) and model.spec.ordered
    assert not retok.generator(dict(weights), ordered=False).spec.ordered
    assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in weights.values())
    tokens, labels = torch.randint(0, VOCAB, (3, LENGTH)), torch.tensor([0, 3, CLASSES])
    ours = model.head.linear(model.teacher_forced(tokens, labels))
    torch.testing.assert_close(ours, logits(weights, tokens, labels), atol=1e-4, rtol=1e-4)
