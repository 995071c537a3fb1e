"""vistok bench: how fast a checkpoint decodes, and how far that is from what the device could do.

vistok bench assets/emoji --plans '["raster", "zipar(4)"]' --batch_sizes 1,16
vistok bench DIR --steps "linear(50,5)" --dtype bfloat16 --compile true --output runs/speed.json
vistok bench assets/emoji/tokenizer --batch_sizes 1,16
"""

import json
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from vistok.curves import write_table
from vistok.decoding import DecodingOptions, Order
from vistok.errors import UserError
from vistok.files import replaced
from vistok.pipelines import ImagePipeline
from vistok.speed import Case, check_counts, device_name, measure, measure_tokenizer, table
from vistok.tokenizers import Tokenizer


def main(
    checkpoint: str,
    plans: list[Order] | None = None,
    batch_sizes: list[int] | str = "1,16",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: bool = False,
    repeats: int = 5,
    threads: int | None = None,
    output: str | None = None,
    **changes: Unpack[DecodingOptions],
) -> None:
    """Print the speed of a checkpoint, a row for each plan and batch size.

    Network calls are those of the network that draws tokens, one after another. The floor is the
    least time in which the device could read the weights, keys and values of each pass, or make its
    products, at the rates measured between the runs. Of a tokenizer alone, its own speed.

    Args:
        checkpoint: directory or Hub repository with tokenizer/ and generator/, or of a tokenizer
        plans: orders of decoding, as '["raster", "zipar(4)"]'; the checkpoint's by default
        batch_sizes: images decoded at once, as 1,16
        dtype: of weights and activations
        compile: time the compiled loop and decoder
        repeats: timed rounds over the rows, of which the medians are printed
        threads: of the CPU; PyTorch's choice by default
        output: file for the figures, .json or .csv, or -o
        changes: how images are decoded
    """
    batches = read_batch_sizes(batch_sizes)
    check_counts(repeats, batches)
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads} must be at least 1")
    if output and Path(output).suffix not in (".json", ".csv"):
        raise UserError(f"--output {output}: must end in .json or .csv")
    torch.set_num_threads(threads or torch.get_num_threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        "checkpoint": checkpoint,
        "device": device_name(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "compiled": compile,
        "repeats": repeats,
    }
    if Path(checkpoint, "config.json").exists():
        tokenizer = Tokenizer.from_pretrained(checkpoint, torch_dtype=getattr(torch, dtype))
        tokenizer = tokenizer.to(device).eval()
        if compile:
            tokenizer.decode = torch.compile(tokenizer.decode)
        rows = [speed.row() for speed in measure_tokenizer(tokenizer, batches, repeats)]
    else:
        pipeline = ImagePipeline.from_pretrained(checkpoint, torch_dtype=getattr(torch, dtype))
        pipeline = pipeline.to(device)
        chosen = cases(pipeline, plans, batches, changes)
        if compile:
            pipeline.compile()
        speeds = measure(chosen, repeats)
        rows = [speed.row() for speed in speeds]
        rates = speeds[0].rates
        facts |= {"GB/s read": rates.reading / 1e9, "GFLOP/s": rates.multiplying / 1e9}
        decoding = pipeline.decoding.changed(**changes).to_dict()
        facts["decoding"] = {k: v for k, v in decoding.items() if k != "plan"}
    print(f"{table(rows)}\n\n{protocol(facts)}")
    if output:
        write(Path(output), facts, rows)


def read_batch_sizes(sizes: list[int] | str) -> list[int]:
    """Return the numbers of a list, or of a text as 1,16."""
    try:
        return [int(size) for size in (sizes.split(",") if isinstance(sizes, str) else sizes)]
    except ValueError as error:
        raise UserError(f"--batch_sizes {sizes}: expected numbers, as 1,16") from error


def cases(
    pipeline: ImagePipeline,
    plans: list[Order] | None,
    batches: list[int],
    changes: DecodingOptions,
) -> list[Case]:
    """Return a case for each plan and batch size; raise `UserError` for a plan that does not
    fit."""
    if plans and changes.get("plan"):
        raise UserError("give either --plan or --plans")
    decodings = [pipeline.decoding.changed(**changes)]
    if plans:
        decodings = [decodings[0].changed(plan=plan) for plan in plans]
    found = []
    for decoding in decodings:
        name = str(decoding.plan or pipeline.generator.orders[0])
        decoding.plan_of(pipeline.generator)
        found += [Case(name, pipeline, batch, decoding) for batch in batches]
    return found


def protocol(facts: dict[str, Any]) -> str:
    """Return how the figures were taken, in words."""
    lines = [", ".join(f"{k} {facts[k]}" for k in ("device", "dtype", "threads", "compiled"))]
    if "decoding" in facts:
        lines[0] += f"; {facts['GB/s read']:.1f} GB/s read, {facts['GFLOP/s']:.0f} GFLOP/s"
        lines.append(f"decoding: {', '.join(f'{k} {v}' for k, v in facts['decoding'].items())}")
    lines.append(
        f"medians of {facts['repeats']} rounds, in which rows take turns, after one that is not "
        "counted; times end when the device is done"
    )
    return "\n".join(lines)


def write(file: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Keep the figures: as JSON beside how they were taken, or as CSV."""
    if file.suffix == ".csv":
        write_table(file, rows)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced(file) as aside:
        aside.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
