"""Sample images from a checkpoint.

python sample/generate.py --checkpoint assets/emoji
accelerate launch --num_processes 8 sample/generate.py --checkpoint DIR --count 50000 --npz true
"""

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from vistok.cli import resolved_config, run
from vistok.data import shard_range
from vistok.decoding import Schedule
from vistok.errors import UserError
from vistok.files import replaced
from vistok.images import image_grid, to_pil
from vistok.pipelines import ImagePipeline

# Options that change how images are made but not which, or whose effect `decoding` holds.
INDIFFERENT = {
    *("batch_size", "checkpoint", "compile", "count", "npz", "output"),
    *("guidance", "temperature", "top_k", "top_p"),
}


def main(
    checkpoint: str,
    output: str = "runs/samples",
    classes: list[str] | None = None,
    count: int | None = None,
    seed: int = 0,
    guidance: Schedule | None = None,
    temperature: Schedule | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 64,
    npz: bool = False,
    compile: bool = False,
) -> None:
    """Sample images from a checkpoint; a run that was cut off goes on where it stopped.

    Args:
        checkpoint: directory or Hub repository with tokenizer/ and generator/
        output: folder for the PNG files; a labelled grid of the first of them goes beside it
        classes: class names or numbers, taken in turn; all of them by default
        count: number of images; 8 of each class by default
        seed: image i depends on the seed and i alone, whatever the batch or the processes
        guidance: classifier-free guidance scale, or its schedule; the checkpoint's by default,
            as for the next three
        temperature: of the softmax; 0 takes the most likely token
        top_k: sample among the k most likely tokens; 0 among all
        top_p: sample among the most likely tokens that hold this share
        batch_size: images decoded at once on each process
        npz: also write samples.npz as ADM's evaluator reads it (arr_0, uint8 NHWC)
        compile: compile the generator's step and the tokenizer's decoder
    """
    process = Accelerator()
    pipeline = ImagePipeline.from_pretrained(checkpoint).to(process.device)
    cycle = pipeline.labels(classes or range(len(pipeline.class_names)))
    count = 8 * len(cycle) if count is None else count
    if count < 1 or batch_size < 1:
        raise UserError(f"--count {count}, --batch_size {batch_size}: both must be at least 1")
    labels = cycle[torch.arange(count) % len(cycle)]
    names = [pipeline.class_names[label] for label in labels]
    decoding = pipeline.decoding.changed(
        guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p
    )
    if compile:
        pipeline.compile()

    folder = Path(output)
    if process.is_main_process:
        claim(folder, pipeline, {"decoding": decoding.to_dict()})
    process.wait_for_everyone()
    files = [folder / f"{i:06d}-seed{seed}-{slug(name)}.png" for i, name in enumerate(names)]
    todo = [
        i
        for i in shard_range(count, process.process_index, process.num_processes)
        if not files[i].exists()
    ]
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    began = time.perf_counter()
    for batch in tqdm(batches, "sampling", disable=not process.is_main_process):
        images = pipeline.sample(labels[batch], seed, batch, decoding)
        for i, picture in zip(batch, to_pil(images.float()), strict=True):
            with replaced(files[i]) as file:
                picture.save(file, "PNG")
    seconds = time.perf_counter() - began
    process.wait_for_everyone()
    if not process.is_main_process:
        return

    rate = f"{len(todo) / seconds:.1f} images/s a process" if todo else "all were there already"
    print(f"{count} images in {folder}: {rate}, {len(pipeline.generator.plan())} passes an image")
    if count >= len(cycle):
        write_grid(folder.with_name(folder.name + ".png"), files, names[: len(cycle)])
    if npz:
        write_npz(folder / "samples.npz", files)


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


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
    """Write the first images as a grid, one class a row."""
    rows = len(row_labels)
    columns = min(len(images) // rows, 12)
    order = [images[row + column * rows] for row in range(rows) for column in range(columns)]
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


if __name__ == "__main__":
    run(main)
