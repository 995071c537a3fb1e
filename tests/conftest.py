"""Shared settings: shapes in signatures are checked, numbers are reproducible, threads are few."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels compile in this process: no pool of workers has to start on a busy machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

install_import_hook(
    [
        "vistok.checkpoints",
        "vistok.codec",
        "vistok.curves",
        "vistok.data",
        "vistok.decoding",
        "vistok.generators",
        "vistok.heads",
        "vistok.layers",
        "vistok.losses",
        "vistok.metrics",
        "vistok.quantizers",
        "vistok.text",
        "vistok.tokenizers",
        "vistok.training",
    ],
    "beartype.beartype",
)

import torch  # noqa: E402 - after the thread count is set


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory) -> str:
    """Directory of a T5 of 16 channels that reads letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("text-encoder")
    letters = ["<pad>", "</s>", "<unk>", " ", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    T5EncoderModel(T5Config(vocab_size=len(letters), **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> str:
    """Directory of a CLIP of 16 channels that reads letters, 8 positions."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["!", *letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 4
    text = {"vocab_size": len(words), "max_position_embeddings": 8, **sizes}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    vision = {"image_size": 8, "patch_size": 4, **sizes}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)
