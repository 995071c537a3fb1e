"""What a comparison does, command by command: each is kept, so that what is done is not done again.

OUTPUT/tokenizers/NAME    OUTPUT/tokens/NAME    OUTPUT/generators/NAME
OUTPUT/pairs/NAME         links to a generator and its tokenizer, as `vistok generate` reads
OUTPUT/metrics.json       scores with their protocols, by the names of tokenizers and rows
OUTPUT/done/KEY.json      a command that ended well, and what it was told
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vistok.compare.spec import Comparison, GeneratorEntry, TokenizerEntry
from vistok.errors import UserError
from vistok.files import replaced

TRAIN_TOKENIZER, TRAIN_GENERATOR = "vistok.train.tokenizer", "vistok.train.generator"


@dataclass(frozen=True)
class Step:
    """One command of a comparison: the module that runs, its arguments, and the keys of the steps
    whose results it reads."""

    key: str
    module: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()


class Steps:
    """The steps of a comparison in the folder `output`, in an order that works."""

    def __init__(self, comparison: Comparison, output: Path):
        self.comparison, self.output = comparison, output

    def __iter__(self) -> Iterator[Step]:
        comparison = self.comparison
        for name in comparison.tokenizers_in_order():
            yield from self._tokenizer(name, comparison.tokenizers[name])
        trained = {k: each for k, each in comparison.generators.items() if each.config is not None}
        for name in dict.fromkeys(entry.tokenizer for entry in trained.values()):
            yield self._vistok(
                f"tokens/{name}", "cache", {"tokenizer": self.tokenizer(name)},
                spelt("data", comparison.data),
                {"transform": comparison.transform, "output": self.output / "tokens" / name},
                after=(f"tokenizers/{name}",),
            )  # fmt: skip
        for name, entry in trained.items():
            yield self._generator(name, entry)
        for name in dict.fromkeys(entry.tokenizer for entry in comparison.generators.values()):
            yield self._score(
                f"scores/tokenizers/{name}", {"tokenizer": self.tokenizer(name)},
                spelt("data", comparison.held_out), {"transform": comparison.transform},
                {"metrics": ["fid", "psnr", "ssim"]}, name=f"tokenizer {name}",
                after=(f"tokenizers/{name}",),
            )  # fmt: skip
        for name, row in comparison.rows.items():
            entry = comparison.generators[row.generator]
            yield self._score(
                f"scores/rows/{name}", {"checkpoint": self.pair(row.generator)},
                {key: str(value) for key, value in row.decoding.items()},
                spelt("reference", comparison.held_out), {"transform": comparison.transform},
                {"metrics": comparison.metrics, "count": comparison.count, "seed": comparison.seed},
                name=name, after=(f"tokenizers/{entry.tokenizer}", f"generators/{row.generator}"),
            )  # fmt: skip

    @property
    def scores(self) -> Path:
        """The file of all scores."""
        return self.output / "metrics.json"

    def tokenizer(self, name: str) -> str:
        """Return where a tokenizer of the comparison is."""
        entry = self.comparison.tokenizers[name]
        return entry.checkpoint or str(self.output / "tokenizers" / name)

    def generator(self, name: str) -> str:
        """Return where a generator of the comparison is."""
        entry = self.comparison.generators[name]
        return entry.checkpoint or str(self.output / "generators" / name)

    def pair(self, name: str) -> str:
        """Return the folder of a generator and its tokenizer."""
        return str(self.output / "pairs" / name)

    def _tokenizer(self, name: str, entry: TokenizerEntry) -> Iterator[Step]:
        key, output = f"tokenizers/{name}", {"output": self.output / "tokenizers" / name}
        after = () if entry.source is None else (f"tokenizers/{entry.source}",)
        if entry.config is not None:
            initial = {"initial": self.tokenizer(entry.initial)} if entry.initial else {}
            images = self.comparison.budget.tokenizer_images
            yield self._training(TRAIN_TOKENIZER, key, entry, images, output | initial, after)
        elif entry.latents is not None:
            source = {"tokenizer": self.tokenizer(entry.latents)}
            data = spelt("data", self.comparison.data)
            yield self._vistok(key, "latents", source, data, output, after=after)
        elif entry.quantize is not None:
            source = {"tokenizer": self.tokenizer(entry.quantize), "levels": entry.levels}
            yield self._vistok(key, "quantize", source, output, after=after)

    def _generator(self, name: str, entry: GeneratorEntry) -> Step:
        return self._training(
            TRAIN_GENERATOR,
            f"generators/{name}",
            entry,
            self.comparison.budget.generator_images,
            {
                "tokenizer": self.tokenizer(entry.tokenizer),
                "tokens": self.output / "tokens" / entry.tokenizer,
                "output": self.output / "generators" / name,
            },
            (f"tokens/{entry.tokenizer}",),
        )

    def _training(
        self,
        module: str,
        key: str,
        entry: TokenizerEntry | GeneratorEntry,
        images: int,
        own: dict[str, Any],
        after: tuple[str, ...],
    ) -> Step:
        of_pictures = module == TRAIN_TOKENIZER  # generators read the tokens of the same data
        data = spelt("data", self.comparison.data) if of_pictures else {"data": "null"}
        held_out = spelt("validation", self.comparison.held_out)
        fixed = {"images": images, **own, "resume": True}
        arguments = as_arguments(data, held_out, entry.options, fixed)
        return Step(key, module, ("--config", entry.config, *arguments), after)

    def _score(self, key: str, *options: dict[str, Any], name: str, after: tuple[str, ...]) -> Step:
        comparison = self.comparison
        scoring = {
            "features": comparison.features,
            "feature_weights": comparison.feature_weights,
            "batch_size": comparison.batch_size,
            "name": name,
            "output": self.scores,
        }
        return self._vistok(key, "evaluate", *options, scoring, after=after)

    def _vistok(
        self, key: str, command: str, *options: dict[str, Any], after: tuple[str, ...]
    ) -> Step:
        return Step(key, "vistok.cli", (command, *as_arguments(*options)), after)


class Kept:
    """Runs steps under `accelerate launch`, and keeps in mind which are done: one is done again
    where it was told something else, or where one was that it reads from."""

    def __init__(self, steps: Steps, launch: tuple[str, ...] = ()):
        self.steps, self.launch = steps, launch
        self.folder = steps.output / "done"

    def run(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Do what is not done, and return what all was told; raises `UserError` where a command
        fails."""
        told: dict[str, Any] = {}  # what each step comes down to, those before it included
        for step in self.steps:
            before = {key: told.get(key) for key in step.after}
            told[step.key] = {"told": [step.module, *step.arguments], "after": before}
            mark = self.folder / f"{step.key.replace('/', ' ')}.json"
            if mark.exists() and json.loads(mark.read_text()) == told[step.key]:
                continue
            say(f"{step.key}: {step.module} {' '.join(step.arguments)}")
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *self.launch]
            ended = subprocess.run([*launcher, "-m", step.module, *step.arguments])
            if ended.returncode:
                raise UserError(
                    f"{step.key} ended with exit code {ended.returncode}; what is done is kept: "
                    "the same command goes on from here"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced(mark) as aside:
                aside.write_text(json.dumps(told[step.key], indent=2))
        return told


def link_pairs(steps: Steps) -> None:
    """Put links to each generator and its tokenizer side by side, where both are directories."""
    for name, entry in steps.comparison.generators.items():
        pair = Path(steps.pair(name))
        pair.mkdir(parents=True, exist_ok=True)
        sources = {
            "tokenizer": steps.tokenizer(entry.tokenizer),
            "generator": steps.generator(name),
        }
        for part, source in sources.items():
            link = pair / part
            link.unlink(missing_ok=True)
            link.symlink_to(Path(source).resolve(), target_is_directory=True)


def spelt(option: str, source: dict[str, Any]) -> dict[str, Any]:
    """Return a class with arguments as options of a command line."""
    arguments = source.get("init_args", {})
    return {option: source["class_path"]} | {f"{option}.{k}": v for k, v in arguments.items()}


def as_arguments(*options: dict[str, Any]) -> tuple[str, ...]:
    """Return options as a command line, none for None; of one name the last counts."""
    merged = {key: value for each in options for key, value in each.items() if value is not None}
    return tuple(part for key, value in merged.items() for part in (f"--{key}", word(value)))


def word(value: object) -> str:
    if isinstance(value, str | Path):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
