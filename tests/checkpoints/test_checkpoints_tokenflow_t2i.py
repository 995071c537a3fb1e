"""The importer of TokenFlow's generator, on random weights in its layout and directory."""

import importlib
import shutil

import pytest
import torch
from safetensors.torch import save_file

from vistok.checkpoints.tokenflow_t2i import directory, generator, paired, read_directory
from vistok.decoding import Corrected, Decoding, Order, Schedule
from vistok.errors import CheckpointError, UserError
from vistok.generators import Generator, NextScaleLlama
from vistok.layers.rotary import rotary_table, rotate
from vistok.pipelines import DEFAULT, ImagePipeline
from vistok.quantizers import VQ, MultiScale
from vistok.tokenizers import ConvTokenizer

DIM, HEADS, KV_HEADS, HIDDEN, TEXT, CODES, SCALES = 32, 4, 2, 24, 31, 11, (1, 2, 4)


def codes_of() -> MultiScale:
    return MultiScale(VQ(CODES, 6), SCALES, smoothers=0, jointly=False)


def published(depth=2):
    """Weights under the published names."""
    head = DIM // HEADS
    shapes = {
        "model.embed_tokens.weight": (TEXT + CODES, DIM),
        "lm_head.weight": (TEXT + CODES, DIM),
        "model.norm.weight": (DIM,),
        "model.lvl_embed.weight": (len(SCALES) + 1, DIM),
        "model.pos_1LC": (21, DIM),
        "model.mm_projector.0.weight": (DIM, 6),
        "model.mm_projector.0.bias": (DIM,),
        "model.mm_projector.2.weight": (DIM, DIM),
        "model.mm_projector.2.bias": (DIM,),
    }
    for i in range(depth):
        block = {
            "self_attn.q_proj": (DIM, DIM),
            "self_attn.k_proj": (KV_HEADS * head, DIM),
            "self_attn.v_proj": (KV_HEADS * head, DIM),
            "self_attn.o_proj": (DIM, DIM),
            "self_attn.qknorm.query_norm": (head,),
            "self_attn.qknorm.key_norm": (head,),
            "mlp.gate_proj": (HIDDEN, DIM),
            "mlp.up_proj": (HIDDEN, DIM),
            "mlp.down_proj": (DIM, HIDDEN),
            "input_layernorm": (DIM,),
            "post_attention_layernorm": (DIM,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    numbers = torch.Generator().manual_seed(0)
    return {name: torch.randn(s, generator=numbers) / 4 for name, s in shapes.items()}


def test_shapes_tell_the_sizes():
    weights, codes = published(), codes_of()
    model = generator(weights, codes, 5, (1, 2), (3,), (4,))
    sizes = (model.config[name] for name in ("dim", "depth", "num_heads", "num_kv_heads"))
    assert tuple(sizes) == (DIM, 2, HEADS, KV_HEADS)
    assert model.config["text_vocab_size"] == TEXT and model.condition.rows == 7
    assert torch.equal(model.head.linear.weight, weights["lm_head.weight"][TEXT:])
    assert torch.equal(model.condition.weight, weights["model.embed_tokens.weight"][:TEXT])
    assert torch.equal(
        model.codes.decode(torch.arange(21)[None] % 11), codes.decode(torch.arange(21)[None] % 11)
    )


def test_half_heads_become_pairs():
    """Turning channels j and j + 4 of 8 is turning our pair j, wherever they stand."""
    x, table = torch.randn(1, 2, 5, 8), rotary_table((5,), 8)
    order = paired(torch.arange(16.0), 8)[:8].long()
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    cos, sin = table[0, :, ::2].repeat(1, 2), table[1, :, 1::2].repeat(1, 2)
    left, right = x.chunk(2, dim=-1)
    halves = x * cos + torch.cat([-right, left], dim=-1) * sin
    torch.testing.assert_close(rotate(x[..., order], table), halves[..., order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.mlp.down_proj.weight": None}, "1 missing"),
        ({"model.layers.0.self_attn.k_proj.weight": None}, "not TokenFlow's generator"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(DIM)}, "1 unexpected"),
        ({"model.pos_1LC": torch.zeros(20, DIM)}, "1 mismatched"),
        ({"lm_head.weight": torch.zeros(9, DIM)}, "no lm_head of more than the 11 codes"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    weights = {k: v for k, v in (published() | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=f"file: .*{message}"):
        generator(weights, codes_of(), where="file")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_encoder) -> tuple[str, str]:
    """A directory in two parts with a tokenizer of letters, and one of the tokenizer of images."""
    path = tmp_path_factory.mktemp("tokenflow-t2i")
    weights = published()
    names = sorted(weights)
    for i, part in enumerate((names[:9], names[9:])):
        file = path / f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{text_encoder}/{name}", path)
    image = ConvTokenizer(codes_of(), 16, 32, (1, 1, 1), num_res_blocks=1, z_channels=32)
    image.save_pretrained(path / "image")
    return str(path), str(path / "image")


def test_a_directory_gives_images_of_prompts(folders, tmp_path):
    path, image = folders
    model = directory(path, tokenizer=image, negative="bad cat", prompt_length=12)
    assert type(model) is NextScaleLlama
    weights = generator(published(), model.codes, 12).state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    letters = {" ": 3} | {letter: 4 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    assert model.config["null_ids"] == [*(letters[letter] for letter in "bad cat"), 1]
    assert model.config["start_ids"] == [2, letters["i"], letters["m"], letters["g"], 2, 1]
    assert model.config["end_ids"][-1] == 1

    tokenizer = ConvTokenizer.from_pretrained(image)
    decoding = Decoding(Order("next_scale(1)"), guidance=Schedule("linear(1,4)"))
    ImagePipeline(tokenizer, model, decoding).save_pretrained(tmp_path)
    pipeline = ImagePipeline.from_pretrained(tmp_path)
    assert pipeline.conditioning == "text" and pipeline.text_encoder == path
    captions = pipeline.captions(["a cat", "a very long caption"])
    assert captions.mask.sum(1).tolist() == [6, 12]
    assert captions.ids[0].tolist() == [30] * 6 + [letters[letter] for letter in "a cat"] + [1]
    images = pipeline(prompts=["a cat", "a dog"], seed=3).images
    again = pipeline(prompts=pipeline.captions("a dog"), seed=3, indices=[1]).images
    assert images[1].size == (16, 16) and images[1].tobytes() == again[0].tobytes()
    assert Generator.from_pretrained(tmp_path, subfolder="generator").fingerprint() == (
        model.fingerprint()
    )


def test_the_command_keeps_how_it_is_sampled_and_what_reads_prompts(folders, tmp_path):
    path, image = folders
    command = importlib.import_module("vistok.commands.import")
    options = {"tokenizer": image, "negative": "bad cat", "prompt_length": 12}
    settings = {"plan": Order("next_scale(1)"), "top_k": Corrected("9/1"), "top_p": Corrected(0.8)}
    command.main("tokenflow-t2i", path, str(tmp_path), options, **settings)
    ConvTokenizer.from_pretrained(image).save_pretrained(tmp_path / "tokenizer")
    pipeline = ImagePipeline.from_pretrained(tmp_path)
    assert pipeline.text_encoder == path
    assert pipeline.decoding == DEFAULT.changed(**settings)


def test_directories_that_do_not_fit_are_refused(folders, tmp_path):
    path, image = folders
    with pytest.raises(CheckpointError, match="no directory with model"):
        read_directory(str(tmp_path))
    plain = ConvTokenizer(VQ(11, 6), 16, 32, (1, 1, 1), num_res_blocks=1, z_channels=32)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no tokenizer of scales"):
        directory(path, tokenizer=str(tmp_path / "plain"))
    with pytest.raises(UserError, match="no readable tokenizer"):
        directory(path, tokenizer=image, text=str(tmp_path))
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight stands in a file before"):
        read_directory(str(tmp_path))
