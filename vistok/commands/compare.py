"""vistok compare: systems side by side, trained alike or loaded, in one report.

vistok compare benchmarks/comparison/emoji.yaml --output runs/compare
vistok compare SPEC.yaml --output DIR --launch "--num_processes 8 --mixed_precision bf16"
"""

import shlex
from pathlib import Path

import yaml

from vistok import metrics as m
from vistok.compare import Comparison
from vistok.compare.report import PAGE, PICTURES, Heading, write_report
from vistok.compare.rows import describe, draw_reconstructions, draw_samples, open_rows, paces
from vistok.compare.steps import TRAIN_GENERATOR, TRAIN_TOKENIZER, Kept, Steps, link_pairs
from vistok.data import ImageSource
from vistok.options import parser_of, resolved_config
from vistok.train import generator, tokenizer


def main(spec: Comparison, output: str = "runs/compare", launch: str = "") -> None:
    """Train or load systems on one data set with one budget, score them by one protocol, and write
    a report: report.html, report.csv, report.md, two plots of quality, and pictures/.

    Every training, cache and score that is there already is kept: a comparison that was cut off, or
    that grew by a row, goes on with the same command.

    Args:
        spec: YAML file of the comparison: its data, budget, tokenizers, generators and rows
        output: directory of all models, scores and the report, or -o
        launch: options of accelerate launch for trainings and scores, as "--num_processes 8"
    """
    folder = Path(output)
    steps = Steps(spec, folder)
    held_out = check(steps)
    link_pairs(steps)
    made_of = Kept(steps, tuple(shlex.split(launch))).run(print)

    pipelines = open_rows(steps)
    pace, device = paces(steps, pipelines, made_of)
    results = m.read_results(steps.scores)
    (folder / PICTURES).mkdir(exist_ok=True)
    draw_reconstructions(folder / PICTURES / "reconstructions.png", spec, pipelines, held_out)
    draw_samples(folder / PICTURES / "samples.png", spec, pipelines)
    first, row = next(iter(spec.rows.items()))
    heading = Heading(
        title=spec.title,
        budget=budget(spec),
        protocols={
            "samples": results[first].protocol,
            "reconstructions": results[
                f"tokenizer {spec.generators[row.generator].tokenizer}"
            ].protocol,
        },
        rates=f"Images a second: tokens alone, {spec.timed_batch} at once, on {device}.",
        spec=yaml.safe_dump(resolved_config()["spec"], sort_keys=False),
    )
    lines = [describe(name, spec, pipelines[name], pace[name], results) for name in spec.rows]
    write_report(folder, heading, lines)
    print(f"written to {folder / PAGE}")


def check(steps: Steps) -> ImageSource:
    """Read the options of every training as it will read them, so that mistakes end in one line
    before anything has been done; return the held-out pictures."""
    mains = {TRAIN_TOKENIZER: tokenizer.main, TRAIN_GENERATOR: generator.main}
    for step in steps:
        if step.module in mains:
            parser_of(mains[step.module], step.key).parse_args(list(step.arguments))

    def pictures(held_out: ImageSource) -> None:
        """Take the pictures of a comparison."""

    parser = parser_of(pictures, "held_out")
    return parser.instantiate(parser.parse_object({"held_out": steps.comparison.held_out})).held_out


def budget(spec: Comparison) -> str:
    """Return the budget in words."""
    text = (
        f"Every stage of a tokenizer saw {spec.budget.tokenizer_images:,} images, every generator "
        f"{spec.budget.generator_images:,}, of the same data."
    )
    models = [*spec.tokenizers.items(), *spec.generators.items()]
    loaded = ", ".join(name for name, entry in models if entry.checkpoint is not None)
    return f"{text} Loaded, not trained here: {loaded}." if loaded else text
