"""The VQ-8 and VQ-16 tokenizers of LlamaGen (Sun et al., 2024, arXiv:2406.06525), which PAR, NAR
and ZipAR share: `vq_ds8_c2i.pt`, `vq_ds16_c2i.pt`, `vq_ds16_t2i.pt`."""

from collections.abc import Sequence
from itertools import count
from typing import Any

from vistok.checkpoints.files import Weights, load, rename
from vistok.errors import CheckpointError
from vistok.quantizers import VQ
from vistok.tokenizers import ConvTokenizer

RULES = (
    (r"^quantize\.codebook_used$", None),  # the codes of the last training steps
    (r"^quantize\.", "quantizer."),
    (r"\.(down|up)sample\.", ".resample."),
)


def tokenizer(
    weights: Weights,
    image_size: int | Sequence[int] = 256,
    where: str = "weights",
    **vq: bool | float,
) -> ConvTokenizer:
    """Return the tokenizer that has these weights, its sizes read from their shapes.

    Args:
        weights: the tensors under their published names.
        image_size: pixels of a side, or (height, width).
        where: what errors are about, as the file that was read.
        vq: arguments of `VQ` that shapes do not tell: `l2_normalise` (True in all published
            files), and `commitment` and `entropy` for training.

    Raises `CheckpointError` if a tensor is missing, superfluous or of another shape.
    """
    weights = rename(weights, RULES, where)
    try:
        sizes = conv_sizes(weights, where)
        vocab_size, dim = weights["quantizer.embedding.weight"].shape
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: not a VQ tokenizer of LlamaGen (no usable tensor {error})"
        ) from error
    attention = "encoder.mid.1.q.weight" in weights
    model = ConvTokenizer(VQ(vocab_size, dim, **vq), image_size, attention=attention, **sizes)
    load(model, weights, where)
    return model


def conv_sizes(weights: Weights, where: str) -> dict[str, Any]:
    """Return the arguments of the convolutional encoder and decoder that have these weights; raise
    `KeyError` for a tensor that is not there, `CheckpointError` for widths that do not belong
    together."""
    blocks = "{}.conv_blocks.{}.res.{}.conv1.weight"
    levels = count_of(weights, blocks.format("encoder", "{}", 0))
    encoder = [len(weights[blocks.format("encoder", i, 0)]) for i in range(levels)]
    decoder = [len(weights[blocks.format("decoder", i, 0)]) for i in reversed(range(levels))]
    channels = len(weights["encoder.conv_in.weight"])
    if not levels or channels < 1 or any(width % channels for width in encoder + decoder):
        raise CheckpointError(
            f"{where}: levels of {encoder} and {decoder} channels; expected multiples of {channels}"
        )
    return {
        "channels": channels,
        "channel_multipliers": [width // channels for width in encoder],
        "decoder_channel_multipliers": [width // channels for width in decoder],
        "num_res_blocks": count_of(weights, blocks.format("encoder", 0, "{}")),
        "z_channels": len(weights["encoder.conv_out.weight"]),
    }


def count_of(weights: Weights, name: str) -> int:
    """Return how many of the numbers 0, 1, ... give the name of a tensor."""
    return next(i for i in count() if name.format(i) not in weights)
