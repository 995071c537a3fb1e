"""vistok generate: images sampled from a checkpoint.

vistok generate --checkpoint assets/emoji --plan "zipar(4)"
vistok generate --checkpoint DIR --prompts '["a red circle", "a blue square"]'
accelerate launch --num_processes 8 -m vistok.cli generate --checkpoint DIR --count 50000 --npz true
"""

import json
import re
import textwrap
import time
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from vistok.data import shard_range
from vistok.decoding import DecodingOptions
from vistok.errors import UserError
from vistok.files import replaced
from vistok.images import image_grid, to_pil
from vistok.options import resolved_config
from vistok.pipelines import ImagePipeline

MAX_ROWS = 100  # of the grid

# Options that change how images are made but not which, or whose effect other settings hold.
INDIFFERENT = {
    *("batch_size", "checkpoint", "compile", "count", "npz", "output", "prompts", "text_encoder"),
    *DecodingOptions.__annotations__,
}


def main(
    checkpoint: str,
    output: str = "runs/samples",
    classes: list[str] | None = None,
    prompts: list[str] | str | None = None,
    text_encoder: str | None = None,
    count: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    npz: bool = False,
    compile: bool = False,
    **changes: Unpack[DecodingOptions],
) -> None:
    """Sample images from a checkpoint; a run that was cut off goes on where it stopped.

    Args:
        checkpoint: directory or Hub repository with tokenizer/ and generator/
        output: folder for the PNG files; a labelled grid of the first of them goes beside it
        classes: class names or numbers, taken in turn; all of them by default
        prompts: for a text-conditional checkpoint, prompts taken in turn; or a file, one a line
        text_encoder: directory or Hub repository of what reads them, a T5 or a tokenizer of text;
            the one that the checkpoint was trained with by default
        count: number of images; 8 of each class or prompt by default
        seed: image i depends on the seed and i alone, whatever the batch or the processes
        batch_size: images decoded at once on each process
        npz: also write samples.npz as ADM's evaluator reads it (arr_0, uint8 NHWC)
        compile: compile the generator's step and the tokenizer's decoder
        changes: how images are decoded
    """
    process = Accelerator()
    pipeline = ImagePipeline.from_pretrained(checkpoint, text_encoder).to(process.device)
    if prompts is None:
        labels = pipeline.labels(classes or range(len(pipeline.class_names)))
        names = [pipeline.class_names[label] for label in labels]
    elif classes is None:
        names = read_prompts(prompts)
        pipeline.captions(names[:1])  # an encoder that does not load is reported before all else
    else:
        raise UserError("give either --classes or --prompts")
    count = 8 * len(names) if count is None else count
    if count < 1 or batch_size < 1:
        raise UserError(f"--count {count}, --batch_size {batch_size}: both must be at least 1")
    decoding = pipeline.decoding.changed(**changes)
    plan = decoding.plan_of(pipeline.generator)  # what does not fit is an error here
    if compile:
        pipeline.compile()

    folder = Path(output)
    settings = {"decoding": decoding.to_dict()}
    if prompts is not None:
        settings |= {"prompts": names, "text_encoder": pipeline.text_encoder}
    if process.is_main_process:
        claim(folder, pipeline, settings)
    process.wait_for_everyone()
    slugs = [slug(name) for name in names]
    files = [folder / f"{i:06d}-seed{seed}-{slugs[i % len(names)]}.png" for i in range(count)]
    todo = [
        i
        for i in shard_range(count, process.process_index, process.num_processes)
        if not files[i].exists()
    ]
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    began = time.perf_counter()
    for batch in tqdm(batches, "sampling", disable=not process.is_main_process):
        wanted = [i % len(names) for i in batch]
        if prompts is None:
            condition = labels[wanted]
        else:
            condition = pipeline.captions([names[i] for i in wanted])
        images = pipeline.sample(condition, seed, batch, decoding)
        for i, picture in zip(batch, to_pil(images.float()), strict=True):
            with replaced(files[i]) as file:
                picture.save(file, "PNG")
    seconds = time.perf_counter() - began
    process.wait_for_everyone()
    if not process.is_main_process:
        return

    rate = f"{len(todo) / seconds:.1f} images/s a process" if todo else "all were there already"
    most = "at most " if decoding.plan and decoding.plan.adaptive_window else ""
    print(f"{count} images in {folder}: {rate}, {most}{len(plan)} passes an image")
    if count >= len(names):
        write_grid(folder.with_name(folder.name + ".png"), files, names)
    if npz:
        write_npz(folder / "samples.npz", files)


def read_prompts(prompts: list[str] | str) -> list[str]:
    """Return the prompts of a list, or of a file with one a line."""
    lines = prompts
    if isinstance(prompts, str):
        try:
            lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(
                f"--prompts {prompts}: no file of prompts ({error}); a list of them is written "
                """'["a red circle"]'"""
            ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"--prompts {prompts}: holds no prompt")
    return found


def slug(name: str) -> str:
    """Return a name's letters and digits, as many as a file's name holds in any script."""
    return re.sub(r"\W+", "-", name.lower()).strip("-")[:50]


def claim(folder: Path, pipeline: ImagePipeline, settings: dict[str, Any]) -> None:
    """Keep images of other weights or settings out of one folder."""
    settings |= {k: v for k, v in resolved_config().items() if k not in INDIFFERENT}
    settings["weights"] = [pipeline.tokenizer.fingerprint(), pipeline.generator.fingerprint()]
    file = folder / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = [k for k in settings if before.get(k) != settings[k]]
        if changed:
            raise UserError(
                f"{folder} holds images of other settings ({', '.join(changed)}): "
                "choose another --output, or remove it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(file) as aside:
        aside.write_text(json.dumps(settings, indent=2))


def write_grid(file: Path, images: list[Path], row_labels: list[str]) -> None:
    """Write the first images as a grid, one class or prompt a row."""
    period = len(row_labels)
    row_labels = [textwrap.shorten(label, 40, placeholder="...") for label in row_labels[:MAX_ROWS]]
    rows = range(len(row_labels))
    columns = min(len(images) // period, 12)
    order = [images[row + column * period] for row in rows for column in range(columns)]
    pixels = torch.stack([pil_to_tensor(Image.open(image)) for image in order]) / 255
    with replaced(file) as aside:
        grid = image_grid(pixels, columns, row_labels, scale=max(1, 64 // pixels.shape[-1]))
        grid.save(aside, "PNG")
    print(f"grid: {file}")


def write_npz(file: Path, images: list[Path]) -> None:
    """Pack the images in their order."""
    pixels = np.stack([np.asarray(Image.open(image)) for image in tqdm(images, "packing")])
    with replaced(file) as aside, aside.open("wb") as stream:
        np.savez(stream, arr_0=pixels)
    print(f"npz: {file}, {pixels.shape}")
