"""Show pictures above what a tokenizer makes of them.

python sample/reconstruct.py --tokenizer assets/emoji/tokenizer --output reconstructions.png
"""

from pathlib import Path

import torch
from accelerate import Accelerator

from vistok.cli import run
from vistok.data import Emoji, EvaluationImages, ImageSource, Transform
from vistok.errors import UserError
from vistok.files import replaced
from vistok.images import image_grid
from vistok.tokenizers import Tokenizer


@torch.inference_mode()
def main(
    tokenizer: str,
    output: str = "runs/reconstructions.png",
    data: ImageSource | None = None,
    transform: str = "resize-center-crop",
    count: int = 48,
    columns: int = 12,
) -> None:
    """Write a grid in which each row of pictures stands above its reconstructions.

    Args:
        tokenizer: directory or Hub repository of the tokenizer
        output: PNG file to write
        data: pictures; the held-out emoji by default
        transform: how a picture becomes the tokenizer's size
        count: number of pictures, spread evenly over the data
        columns: pictures in a row
    """
    data = data or Emoji("held-out")
    device = Accelerator().device
    model = Tokenizer.from_pretrained(tokenizer).to(device).eval()
    if len(data) < 1 or not 1 <= columns <= count:
        raise UserError(f"--count {count} must be at least --columns {columns}, and data not empty")
    images = EvaluationImages(data, Transform(transform, model.image_size[0]))
    chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist()
    originals = torch.stack([images[i]["image"] for i in chosen])
    reconstructions = model.decode(model.encode(originals.to(device))).cpu()

    pairs = zip(originals.split(columns), reconstructions.split(columns), strict=True)
    rows = [row for pair in pairs for row in pair]
    titles = ["original", f"{model.spec.bits / 8:.0f} bytes"] * (len(rows) // 2)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with replaced(Path(output)) as aside:
        scale = max(1, 64 // model.image_size[1])
        image_grid(torch.cat(rows), columns, titles, scale).save(aside, "PNG")
    print(f"{len(originals)} pictures of {data.name} as {model.spec}: {output}")


if __name__ == "__main__":
    run(main)
