"""TokenFlow's generator of images from text (Qu et al., 2024, arXiv:2412.03069), `TokenFlow-t2i`: a
directory as transformers saves it, in which the tokenizer of images is not held."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.checkpoints.files import Weights, load, read_weights, rename
from vistok.checkpoints.llamagen_vq import count_of
from vistok.errors import CheckpointError
from vistok.generators import NextScaleLlama
from vistok.quantizers import MultiScale
from vistok.text import PromptReader, remember_encoder
from vistok.tokenizers import Tokenizer

FILES = ("model*.safetensors", "pytorch_model*.bin")  # whole or in parts
START, END = "<img>", "</img>"  # which are words to the Llama, of several ids each
PROMPT_LENGTH = 128
# The released one is another list of the same kind.
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry"
)
RULES = (
    (r"\.rotary_emb\.inv_freq$|image_token_(start|end)$", None),  # constants
    (r"^model\.layers\.", "blocks."),
    (r"\.input_layernorm\.", ".attention_norm."),  # which, unlike Llama's, follows attention
    (r"\.post_attention_layernorm\.", ".feed_forward_norm."),
    (r"\.self_attn\.o_proj\.", ".attention.out."),
    (r"\.self_attn\.qknorm\.query_norm\.", ".attention.q_norm."),
    (r"\.self_attn\.qknorm\.key_norm\.", ".attention.k_norm."),
    (r"\.mlp\.down_proj\.", ".feed_forward.out."),
    (r"^model\.mm_projector\.", "code_embed."),
    (r"^model\.lvl_embed\.", "scale_embedding."),
    (r"^model\.pos_1LC$", "position_table"),
    (r"^model\.norm\.", "norm."),
)


def directory(
    path: str,
    tokenizer: str,
    text: str | None = None,
    negative: str = NEGATIVE,
    prompt_length: int = PROMPT_LENGTH,
    **options: Any,
) -> NextScaleLlama:
    """Return the model in a directory.

    Args:
        path: the directory, of .safetensors or .bin files.
        tokenizer: directory or Hub repository of the tokenizer of images, as vistok keeps it.
        text: that of the Llama's tokenizer of text; None for the same as `path`.
        negative: prompt that images are guided away from.
        prompt_length: ids to which prompts are padded or cut.
        options: other arguments of `generator`.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    weights = read_directory(path)
    codes = getattr(Tokenizer.from_pretrained(tokenizer), "quantizer", None)
    if not isinstance(codes, MultiScale):
        raise CheckpointError(f"{tokenizer}: holds no tokenizer of scales, as TokenFlow's is")
    text = text or path
    reader = PromptReader(text, prompt_length, text_vocab_size(weights, codes, path))
    ids = {"start_ids": START, "end_ids": END, "null_ids": negative}
    ids = {name: reader.ids(words) for name, words in ids.items()}
    ids["end_ids"].append(reader.tokenizer.eos_token_id)
    model = generator(weights, codes, prompt_length, **ids | options, where=path)
    remember_encoder(model, text)
    return model


def read_directory(path: str) -> Weights:
    """Return the tensors of all files of a directory; raise `CheckpointError` where it has none, or
    one tensor twice."""
    found = [sorted(Path(path).glob(pattern)) for pattern in FILES]
    files = next((files for files in found if files), None)
    if files is None:
        raise CheckpointError(f"{path}: no directory with {' or '.join(FILES)}")
    weights = {}
    for file in files:
        part = read_weights(file)
        if twice := weights.keys() & part.keys():
            raise CheckpointError(f"{file}: {min(twice)} stands in a file before it, too")
        weights |= part
    return weights


def generator(
    weights: Weights,
    codes: MultiScale,
    prompt_length: int = PROMPT_LENGTH,
    start_ids: Sequence[int] = (),
    end_ids: Sequence[int] = (),
    null_ids: Sequence[int] = (),
    where: str = "weights",
    **transformer: Any,
) -> NextScaleLlama:
    """Return the model that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        codes: the quantizer of its tokenizer.
        prompt_length: ids to which prompts are padded.
        start_ids, end_ids, null_ids: see `NextScaleLlama`.
        where: what errors are about, as the file that was read.
        transformer: arguments of `NextScaleLlama` that shapes do not tell: `rope_base`, `norm_eps`,
            and rates of dropout for training, which is published without.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    try:
        num_text = text_vocab_size(weights, codes, where)
        weights = in_our_shapes(rename(weights, RULES, where), num_text)
        head_dim = len(weights["blocks.0.attention.q_norm.weight"])
        dim, width = weights["blocks.0.attention.out.weight"].shape
        num_heads = width // head_dim
        qkv_rows = len(weights["blocks.0.attention.qkv.weight"])
        sizes = {
            "dim": dim,
            "depth": count_of(weights, "blocks.{}.attention_norm.weight"),
            "num_heads": num_heads,
            "num_kv_heads": (qkv_rows // head_dim - num_heads) // 2,
            "hidden_dim": weights["blocks.0.feed_forward.out.weight"].shape[1],
        }
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: not TokenFlow's generator ({error})") from error
    model = NextScaleLlama(
        codes.spec(codes.scales[-1]),
        [],
        codes,
        caption_length=prompt_length,
        text_vocab_size=num_text,
        start_ids=start_ids,
        end_ids=end_ids,
        null_ids=null_ids,
        **sizes | {"condition_dropout": 0.0} | transformer,
    )
    own = {f"codes.{name}": tensor for name, tensor in codes.state_dict().items()}
    load(model, weights | own, where)
    return model


def text_vocab_size(weights: Weights, codes: MultiScale, where: str) -> int:
    """Return how many of the ids are text's, those of padding among them; the rest are codes."""
    if "lm_head.weight" not in weights or len(weights["lm_head.weight"]) <= codes.vocab_size:
        raise CheckpointError(
            f"{where}: no lm_head of more than the {codes.vocab_size} codes of the tokenizer; "
            "expected TokenFlow's generator and its own tokenizer"
        )
    return len(weights["lm_head.weight"]) - codes.vocab_size


def in_our_shapes(weights: Weights, num_text: int) -> Weights:
    """Return the weights with matrices joined, tables split into text and images, and rotary pairs
    side by side."""
    weights = dict(weights)
    weights["condition.weight"] = weights.pop("model.embed_tokens.weight")[:num_text]
    head = weights.pop("lm_head.weight")
    weights["text_head.linear.weight"] = head[:num_text]
    weights["head.linear.weight"] = head[num_text:]
    levels = weights["scale_embedding.weight"]
    # No row of a sequence has the second one: the first scale counts as text.
    weights["scale_embedding.weight"] = torch.cat([levels[:1], levels[2:]])
    for name in [name for name in weights if name.endswith(".self_attn.q_proj.weight")]:
        block = name.removesuffix(".self_attn.q_proj.weight")
        for norm in (f"{block}.attention.q_norm.weight", f"{block}.attention.k_norm.weight"):
            weights[norm] = paired(weights[norm], len(weights[norm]))
        head_dim = len(weights[norm])
        query, key, value = (weights.pop(f"{block}.self_attn.{p}_proj.weight") for p in "qkv")
        qkv = [paired(query, head_dim), paired(key, head_dim), value]
        weights[f"{block}.attention.qkv.weight"] = torch.cat(qkv)
        pair = [weights.pop(f"{block}.mlp.{part}_proj.weight") for part in ("gate", "up")]
        weights[f"{block}.feed_forward.gate_value.weight"] = torch.cat(pair)
    return weights


def paired(rows: Float[Tensor, "r *i"], head_dim: int) -> Float[Tensor, "r *i"]:
    """Return the rows of each head in another order: channels which turn together, j and j + half
    a head in Llama's weights, become neighbours."""
    heads = rows.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)
