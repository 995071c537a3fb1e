"""What a comparison says of its rows: pipelines, their speed, their pictures, their lines."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.codec import payload_size
from vistok.compare.report import Line
from vistok.compare.spec import Comparison
from vistok.compare.steps import Steps
from vistok.data import EvaluationImages, ImageSource, Transform
from vistok.decoding import Decoding
from vistok.files import replaced
from vistok.images import image_grid
from vistok.metrics import Result
from vistok.pipelines import ImagePipeline
from vistok.speed import Case, device_name, measure

SHOWN = 12  # pictures of a strip


@dataclass(frozen=True)
class Pace:
    """How a row decodes one image, and how many in a second, the tokenizer's decoder left out."""

    passes: float
    calls: float
    images_per_second: float


def open_rows(steps: Steps) -> dict[str, ImagePipeline]:
    """Return the pipeline of each row, which decodes as the row says."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipelines = {}
    for name, row in steps.comparison.rows.items():
        pipeline = ImagePipeline.from_pretrained(steps.pair(row.generator)).to(device)
        pipeline.decoding = row.decoding_from(pipeline.decoding)
        pipelines[name] = pipeline
    return pipelines


def paces(
    steps: Steps, pipelines: Mapping[str, ImagePipeline], made_of: dict[str, Any]
) -> tuple[dict[str, Pace], str]:
    """Return the pace of each row and the device that they were taken on; measured, in turn, unless
    they were already with models `made_of` the same."""
    spec, file = steps.comparison, steps.output / "pace.json"
    if file.exists() and (kept := json.loads(file.read_text()))["made_of"] == made_of:
        return {name: Pace(**pace) for name, pace in kept["rows"].items()}, kept["device"]
    cases = [Case(name, each, spec.timed_batch) for name, each in pipelines.items()]
    rows = {
        speed.case.name: Pace(speed.cost.passes, speed.cost.calls, speed.images_per_second)
        for speed in measure(cases, spec.timed_rounds)
    }
    kept = {
        "made_of": made_of,
        "device": device_name(next(iter(pipelines.values())).device),
        "rows": {k: asdict(v) for k, v in rows.items()},
    }
    with replaced(file) as aside:
        aside.write_text(json.dumps(kept, indent=2))
    return rows, kept["device"]


def describe(
    name: str, spec: Comparison, pipeline: ImagePipeline, pace: Pace, results: Mapping[str, Result]
) -> Line:
    """Return the line of a row."""
    row = spec.rows[name]
    tokenizer, generator = pipeline.tokenizer, pipeline.generator
    samples = results[name].scores
    made = results[f"tokenizer {spec.generators[row.generator].tokenizer}"].scores
    tokens, usual = tokenizer.spec, Decoding().to_dict()
    settings = {"plan": generator.orders[0]}
    settings |= {k: v for k, v in pipeline.decoding.to_dict().items() if v != usual.get(k)}
    return Line(
        system=name,
        tokenizer=f"{type(tokenizer).__name__}, {tokens}",
        generator=f"{type(generator).__name__}, {type(generator.head).__name__}",
        decoding=", ".join(f"{k} {v}" for k, v in settings.items()),
        tokenizer_parameters=tokenizer.num_parameters(),
        generator_parameters=generator.num_parameters(),
        tokens=tokens.num_tokens,
        bytes=None if tokens.kind == "latents" else payload_size(tokens, tokens.num_tokens),
        passes=pace.passes,
        evaluations=pace.calls,
        images_per_second=pace.images_per_second,
        psnr=made["psnr"],
        rfid=made["rfid"],
        fid=samples["fid"],
        inception_score=samples.get("is"),
        note=row.note,
    )


@torch.inference_mode()
def draw_samples(file: Path, spec: Comparison, pipelines: Mapping[str, ImagePipeline]) -> None:
    """Write the same numbers of the same classes by each row, one under another."""
    strips = []
    for pipeline in pipelines.values():
        labels = torch.arange(SHOWN) % len(pipeline.class_names)
        strips.append(pipeline.sample(labels, spec.seed, range(SHOWN)).cpu())
    draw(file, strips, list(pipelines))


@torch.inference_mode()
def draw_reconstructions(
    file: Path, spec: Comparison, pipelines: Mapping[str, ImagePipeline], held_out: ImageSource
) -> None:
    """Write held-out pictures and, under them, what the tokenizer of each row makes of them."""
    chosen = torch.linspace(0, len(held_out) - 1, SHOWN).long().tolist()
    strips, names = [], []
    for name, row in spec.rows.items():
        tokenizer, label = pipelines[name].tokenizer, spec.generators[row.generator].tokenizer
        if label in names:
            continue
        images = EvaluationImages(held_out, Transform(spec.transform, tokenizer.image_size[0]))
        originals = torch.stack([images[i]["image"] for i in chosen])
        made = tokenizer.decode(tokenizer.encode(originals.to(tokenizer.device)))
        strips += [made.cpu()] if strips else [originals, made.cpu()]
        names += [label] if names else ["original", label]
    draw(file, strips, names)


def draw(file: Path, strips: list[Tensor], names: list[str]) -> None:
    pixels = strips[0].shape[-1]
    with replaced(file) as aside:
        image_grid(torch.cat(strips), SHOWN, names, max(1, 64 // pixels)).save(aside, "PNG")
