"""vistok info: say what a checkpoint holds.

vistok info assets/emoji
"""

from pathlib import Path

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
        print(f"  image size   {model.image_size[0]}x{model.image_size[1]}")
    if isinstance(model, Generator):
        print(f"  classes      {len(model.class_names)}: {', '.join(model.class_names[:10])}")
        print(f"  plan         {model.plan().name}, {len(model.plan())} passes an image")
    print(f"  fingerprint  {model.fingerprint()[:16]}")
    for name, value in model.arguments.items():
        if name not in ("spec", "class_names"):
            print(f"  {name:12} {value}")
