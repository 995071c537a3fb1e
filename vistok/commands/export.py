"""vistok export: a trained pair as one small checkpoint with its model card.

vistok export --checkpoint runs/emoji --output assets/emoji --tokenizer_dtype float16
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal, Unpack

import torch
import yaml
from torch import nn

from vistok.commands.scores import table
from vistok.decoding import DecodingOptions
from vistok.errors import UserError
from vistok.metrics import read_results
from vistok.pipelines import ImagePipeline

DType = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]


def main(
    checkpoint: str,
    output: str,
    tokenizer_dtype: DType = "float32",
    generator_dtype: DType = "float32",
    results: str | None = None,
    note: str = "",
    **changes: Unpack[DecodingOptions],
) -> None:
    """Write a pipeline's weights and a card that says how they were made and what they score.

    Args:
        checkpoint: directory with the training runs tokenizer/ and generator/
        output: directory of the checkpoint
        tokenizer_dtype: of the tokenizer's saved weights; they load in float32
        generator_dtype: of the generator's
        results: JSON file of results, for the card
        note: a sentence for the card
        changes: how the checkpoint decodes where it is not told otherwise
    """
    pipeline = ImagePipeline.from_pretrained(checkpoint)
    # diffusers' own `to` warns of modules to keep in float32, even where there are none.
    nn.Module.to(pipeline.tokenizer, getattr(torch, tokenizer_dtype))
    nn.Module.to(pipeline.generator, getattr(torch, generator_dtype))
    pipeline.decoding = pipeline.decoding.changed(**changes)
    runs = [describe_run(Path(checkpoint, part)) for part in ("tokenizer", "generator")]
    scores = describe_scores(results) if results else ""
    pipeline.save_pretrained(output, "\n\n".join(filter(None, [note, scores, *runs])))
    print(f"{checkpoint}, tokenizer in {tokenizer_dtype}, generator in {generator_dtype}: {output}")


def describe_run(run: Path) -> str:
    """Return how a model was trained, from the options and the log that its run left."""
    options, log = run / "config.yaml", run / "log.jsonl"
    if not (options.exists() and log.exists()):
        return ""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    images = [0, *(line["images"] for line in lines)]
    seconds = sum(
        (after - before) / line["images_per_second"]
        for before, after, line in zip(images, images[1:], lines, strict=False)
    )
    last = lines[-1]
    held_out = "".join(f", {key} {last[key]:.4g}" for key in last if key.startswith("validation/"))
    return (
        f"## How the {run.name} was trained\n\n"
        f"`accelerate launch train/{run.name}.py --config config.yaml`: {last['images']:,} images "
        f"({last['epoch']:.0f} epochs) in {seconds / 60:.0f} minutes; at the end loss "
        f"{last['loss']:.4g}{held_out}. The options, in config.yaml:\n\n"
        f"```yaml\n{options.read_text()}```"
    )


def describe_scores(file: str) -> str:
    """Return the results in `file`, each with its protocol."""
    results = read_results(file)
    if not results:
        raise UserError(f"--results {file}: holds none; make them by `vistok evaluate`")
    protocols = yaml.safe_dump({name: asdict(r.protocol) for name, r in results.items()})
    return f"## Scores\n\n{table(results)}\n\nBy these protocols:\n\n```yaml\n{protocols}```"
