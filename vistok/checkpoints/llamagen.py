"""The transformers of LlamaGen (Sun et al., 2024, arXiv:2406.06525), PAR (Wang et al., 2024,
arXiv:2412.15119) and NAR (He et al., 2025, arXiv:2503.10696): one layout, told apart by what each
adds. ZipAR decodes LlamaGen's."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.models import ResNet18_Weights

from vistok.checkpoints import llamagen_vq
from vistok.checkpoints.files import Weights, load, rename
from vistok.errors import CheckpointError
from vistok.generators import NAR, PAR, LlamaGen
from vistok.layers.positions import sincos_table
from vistok.tokenizers import ConvTokenizer
from vistok.tokens import TokenSpec

RULES = (
    (r"^freqs_cis$|\.kv_cache\.|causal_mask", None),  # what sampling left behind
    (r"^cls_embedding\.(embedding_table|cap_proj)\.", "condition."),
    (r"^cls_embedding\.uncond_embedding$", "condition.null_features"),
    (r"^tok_embeddings\.", "token_embedding."),
    (r"^spe_tok_embeddings\.special_embeddings\.", "placeholders."),
    (r"^layers\.", "blocks."),
    (r"\.attention\.wqkv\.", ".attention.qkv."),
    (r"\.attention\.wo\.", ".attention.out."),
    (r"\.feed_forward\.w2\.", ".feed_forward.out."),
    (r"\.ffn_norm\.", ".feed_forward_norm."),
    (r"^(abs_pe|positional_embedding)$", "position_table"),
)
# Norm and matrix of each head: of LlamaGen and PAR, of NAR on images, of NAR on videos.
HEADS = {
    1: (("norm", "output"),),
    2: (("norm", "output"), ("medusa_norm", "medusa_output")),
    3: (("norm_R", "output_R"), ("norm_D", "output_D"), ("norm_B", "output_B")),
}
# Published widths whose heads have not 64 channels.
NUM_HEADS = {3200: 32, 4096: 32}


def convert(weights: Weights, where: str = "weights", **options: Any) -> LlamaGen | ConvTokenizer:
    """Return the tokenizer or the transformer that has these weights; see `llamagen_vq.tokenizer`
    and `generator` for the options of each."""
    is_tokenizer = "quantize.embedding.weight" in weights
    return (llamagen_vq.tokenizer if is_tokenizer else generator)(weights, where=where, **options)


def generator(
    weights: Weights,
    shape: Sequence[int] = (16, 16),
    ordered: bool = False,
    num_heads: int | None = None,
    class_names: Sequence[str] | None = None,
    null_class: bool = True,
    extra_depth: int = 1,
    where: str = "weights",
    **transformer: Any,
) -> LlamaGen:
    """Return the model that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        shape: of the tokens, which the file does not tell: (16, 16) for models of 256 pixels,
            (24, 24) for 384, (32, 32) for 512, (4, 16, 16) for videos.
        ordered: whether the tokens are a sequence of which any first ones decode.
        num_heads: attention heads; None for those of the published model of this width.
        class_names: in the order of the labels; None for ImageNet's or numbers.
        null_class: whether the last class of the table is the null class.
        extra_depth: blocks between NAR's heads.
        where: what errors are about, as the file that was read.
        transformer: arguments of `LlamaGen` that shapes do not tell: `rope_base`, `norm_eps`, and
            rates of dropout for training.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    num_directions = 3 if "output_R.weight" in weights else 1 + ("medusa_output.weight" in weights)
    try:
        weights = rename(weights, RULES, where)
        join_matrices(weights, HEADS[num_directions])
        vocab_size, dim = weights["token_embedding.weight"].shape
        num_heads = num_heads or NUM_HEADS.get(dim) or dim // 64
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        qkv_rows = len(weights["blocks.0.attention.qkv.weight"])
        hidden_dim = weights["blocks.0.feed_forward.out.weight"].shape[1]
        is_text = "condition.null_features" in weights
        rows = 0 if is_text else len(weights["condition.weight"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{where}: not a transformer of LlamaGen, PAR or NAR ({error})"
        ) from (error)
    if num_heads == 0 or dim % num_heads:
        raise CheckpointError(f"{where}: width {dim} is no published one: give num_heads")
    if not null_class:
        weights["condition.weight"] = torch.nn.functional.pad(
            weights["condition.weight"],
            (0, 0, 0, 1),  # never trained: samples without guidance
        )
        rows += 1
    arguments = {
        "dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "num_kv_heads": (qkv_rows * num_heads // dim - num_heads) // 2,
        "hidden_dim": hidden_dim,
        **transformer,
    }
    if is_text:
        length, channels = weights["condition.null_features"].shape
        arguments |= {"caption_dim": channels, "caption_length": length}
    if "position_table" in weights:
        table = weights.pop("position_table").reshape(-1, dim)
        fixed = sincos_table(torch.arange(len(table)), dim)
        arguments["positions"] = "fixed" if torch.allclose(table, fixed, atol=1e-5) else "learned"
        if arguments["positions"] == "learned":
            weights["position_table"] = table
    family = LlamaGen
    if num_directions > 1:
        family = NAR
        arguments["depth"] = depth - extra_depth * (num_directions - 1)
        arguments["extra_depth"] = extra_depth
    elif "placeholders.weight" in weights:
        family = PAR
        arguments["regions"] = len(weights["placeholders.weight"]) + 1
    spec = TokenSpec.ids(tuple(shape), vocab_size, ordered)
    model = family(spec, list(class_names or names_of(rows - 1)), **arguments)
    load(model, weights, where)
    return model


def join_matrices(weights: Weights, heads: Sequence[tuple[str, str]]) -> None:
    """Put gate and value of each block side by side, and the heads with their norms in order."""
    for name in [name for name in weights if name.endswith(".feed_forward.w1.weight")]:
        block = name.removesuffix(".w1.weight")
        pair = [weights.pop(f"{block}.{w}.weight") for w in ("w1", "w3")]
        weights[f"{block}.gate_value.weight"] = torch.cat(pair)
    for i, (norm, _) in enumerate(heads):
        name = "norm.weight" if len(heads) == 1 else f"norm.{i}.weight"
        weights[name] = weights.pop(f"{norm}.weight")
    matrices = [weights.pop(f"{output}.weight") for _, output in heads]
    weights["head.linear.weight"] = torch.cat(matrices, dim=1)


def names_of(num_classes: int) -> list[str]:
    """Return ImageNet's names of 1000 classes, numbers otherwise."""
    if num_classes == 1000:
        return ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return [str(i) for i in range(num_classes)]
