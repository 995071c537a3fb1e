"""Tensors to pictures that a person looks at."""

from collections.abc import Sequence

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vistok.data.transforms import to_uint8


def to_pil(images: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Return PIL images of images in [0, 1]."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in to_uint8(images).cpu()]


def image_grid(
    images: Float[Tensor, "b 3 h w"],
    columns: int,
    row_labels: Sequence[str] = (),
    scale: int = 1,
) -> Image.Image:
    """Return the images in rows of `columns` on white, a label to the left of each row; `scale`
    repeats pixels, so that small pictures can be seen."""
    pictures = to_pil(images)
    width, height = (side * scale for side in pictures[0].size)
    gap = 2 * scale
    font = ImageFont.load_default(size=min(16, height // 2 + 4))
    margin = max((int(font.getlength(label)) + 3 * gap for label in row_labels), default=gap)
    rows = -(-len(pictures) // columns)
    grid = Image.new(
        "RGB", (margin + columns * (width + gap), gap + rows * (height + gap)), "white"
    )
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        grid.paste(enlarged, (margin + column * (width + gap), gap + row * (height + gap)))
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(row_labels):
        middle = gap + row * (height + gap) + height // 2
        draw.text((gap, middle), label, fill="black", font=font, anchor="lm")
    return grid
