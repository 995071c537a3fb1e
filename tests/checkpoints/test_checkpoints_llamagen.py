"""The importer of LlamaGen's, PAR's and NAR's transformers, on random weights in their layout."""

import pytest
import torch

from vistok.checkpoints.llamagen import convert, generator
from vistok.decoding import Decoding, Noise, Schedule, decode
from vistok.errors import CheckpointError, UserError
from vistok.generators import NAR, PAR, Captions, LlamaGen

DIM, HIDDEN, VOCAB, CLASSES = 64, 96, 17, 4


def published(extra=(), depth=2, kv_heads=4, text=False):
    """Weights under the published names; `extra` maps further names to shapes."""
    shapes = {"tok_embeddings.weight": (VOCAB, DIM), "norm.weight": (DIM,)}
    shapes["output.weight"] = (VOCAB, DIM)
    if text:
        shapes |= {
            "cls_embedding.cap_proj.fc1.weight": (DIM, 6),
            "cls_embedding.cap_proj.fc2.weight": (DIM, DIM),
            "cls_embedding.uncond_embedding": (5, 6),
        }
    else:
        shapes["cls_embedding.embedding_table.weight"] = (CLASSES + 1, DIM)
    for i in range(depth):
        block = {
            "attention.wqkv": ((4 + 2 * kv_heads) * DIM // 4, DIM),
            "attention.wo": (DIM, DIM),
            "feed_forward.w1": (HIDDEN, DIM),
            "feed_forward.w3": (HIDDEN, DIM),
            "feed_forward.w2": (DIM, HIDDEN),
            "attention_norm": (DIM,),
            "ffn_norm": (DIM,),
        }
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return {name: torch.randn(shape) / 8 for name, shape in (shapes | dict(extra)).items()}


NAR_EXTRA = {"medusa_norm.weight": (DIM,), "medusa_output.weight": (VOCAB, DIM)}
PAR_EXTRA = {"spe_tok_embeddings.special_embeddings.weight": (3, DIM)}


@pytest.mark.parametrize(
    ("weights", "family", "plan"),
    [
        (published(), LlamaGen, "raster"),
        (published(kv_heads=2), LlamaGen, "raster"),
        (published(text=True), LlamaGen, "raster"),
        (published(PAR_EXTRA), PAR, "par"),
        (published(NAR_EXTRA), NAR, "nar"),
        (published(NAR_EXTRA, text=True), NAR, "nar"),
    ],
)
def test_the_file_tells_the_family_and_its_sizes(weights, family, plan):
    model = generator(weights, (4, 6), num_heads=4).eval()
    assert type(model) is family
    assert model.plan().name == plan
    assert sum(w.numel() for w in weights.values()) == sum(
        t.numel() for t in model.state_dict().values()
    )
    condition = torch.tensor([0, 1])
    if model.config.caption_dim:
        condition = Captions(torch.randn(2, 5, 6), torch.ones(2, 5).bool())
    tokens = decode(model, condition, Noise(0, range(2)), Decoding(guidance=Schedule(2)))
    assert tokens.shape == (2, 4, 6)


def test_what_sampling_left_behind_is_dropped():
    weights = published()
    model = generator(dict(weights), num_heads=4)
    stale = {"freqs_cis": torch.zeros(3), "layers.0.attention.kv_cache.k_cache": torch.zeros(3)}
    again = generator({**weights, **stale}, num_heads=4)
    assert again.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.ffn_norm.weight": None}, "1 missing"),
        ({"tok_embeddings.weight": None}, "not a transformer"),
        ({"layers.1.attention.wo.weight": torch.zeros(DIM, DIM + 1)}, "1 mismatched"),
        ({"layers.0.attention.bias": torch.zeros(3)}, "1 unexpected"),
        ({"medusa_output.weight": torch.zeros(VOCAB, DIM)}, "not a transformer"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    weights = {k: v for k, v in (published() | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=f"file.pt: .*{message}"):
        generator(weights, num_heads=4, where="file.pt")


def test_unknown_widths_ask_for_the_heads():
    with pytest.raises((CheckpointError, UserError), match="num_heads"):
        generator(published(), num_heads=7)


def test_convert_tells_transformers_from_tokenizers():
    assert isinstance(convert(published(), num_heads=4), LlamaGen)
    with pytest.raises(CheckpointError, match="not a VQ tokenizer"):
        convert({"quantize.embedding.weight": torch.zeros(8, 4)})


def test_a_thousand_classes_are_imagenets():
    weights = published({"cls_embedding.embedding_table.weight": (1001, DIM)})
    names = generator(weights, num_heads=4).class_names
    assert len(names) == 1000
    assert names[207] == "golden retriever"
