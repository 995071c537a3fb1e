"""vistok info: say what a checkpoint holds.

vistok info assets/emoji
"""

from pathlib import Path

from vistok.decoding import Order
from vistok.generators import Generator
from vistok.models import Model
from vistok.tokenizers import Tokenizer


def main(checkpoint: str) -> None:
    """Print a checkpoint's models, their tokens, sizes and settings.

    Args:
        checkpoint: directory of a model, or of a pipeline with tokenizer/ and generator/
    """
    parts = [p for p in ("tokenizer", "generator") if Path(checkpoint, p, "config.json").exists()]
    for part in parts or [None]:
        describe(Model.from_pretrained(checkpoint, subfolder=part))


def describe(model: Model) -> None:
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters")
    if isinstance(model, Tokenizer | Generator):
        print(f"  tokens       {model.spec} ({model.spec.bits:g} bits an image)")
    if isinstance(model, Tokenizer):
        frames = f"{model.frames} frames of " if model.frames else ""
        print(f"  image size   {frames}{model.image_size[0]}x{model.image_size[1]}")
        print(f"  fits         generators of {model.spec}")
    if isinstance(model, Generator):
        rest = ", ..." if len(model.class_names) > 10 else ""
        print(f"  classes      {len(model.class_names)}: {', '.join(model.class_names[:10])}{rest}")
        for order in model.orders:
            print(f"  plan         {order}{describe_passes(model, order)}")
        print(f"  head         {type(model.head).__name__}")
        print(f"  fits         tokenizers of {model.spec}")
    print(f"  fingerprint  {model.fingerprint()[:16]}")
    for name, value in model.arguments.items():
        if name not in ("spec", "class_names"):
            print(f"  {name:12} {value}")


def describe_passes(model: Generator, order: str) -> str:
    """Return the passes of an order; of a family of orders, those at both ends."""
    if "(steps" in order:
        return ", as many passes an image"
    if "(corrections" in order:
        once, twice = (len(model.plan(Order(order.replace("corrections", n)))) for n in "01")
        return f", {twice - once} passes more for each"
    if order != "zipar(s)":
        return f", {len(model.plan(Order(order.replace('seed', '0'))))} passes an image"
    width = model.spec.shape[1]
    most, least = (len(model.plan(Order(f"zipar({s})"))) for s in (width, 1))
    return f" for windows s from 1 ({least} passes) to {width} ({most})"
