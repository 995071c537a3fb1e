"""What is compared: tokenizers, generators over them, and rows, each a generator decoded in a way.

    title: Orders of decoding
    data: {class_path: Emoji, init_args: {split: train}}
    held_out: {class_path: Emoji, init_args: {split: held-out}}
    budget: {tokenizer_images: 48000, generator_images: 24000}
    tokenizers:
      grid: {config: configs/tokenizers/conv_emoji.yaml}
    generators:
      raster: {config: configs/generators/raster_emoji.yaml, tokenizer: grid}
    rows:
      LlamaGen: {generator: raster}
      ZipAR: {generator: raster, decoding: {plan: zipar(2)}}

Paths are those of the working directory, as everywhere on the command line.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vistok.decoding import Decoding, DecodingOptions
from vistok.errors import UserError, suggestion


@dataclass(frozen=True)
class Budget:
    """Length of every training of a comparison, in images seen.

    Args:
        tokenizer_images: of a tokenizer, or of each of its stages
        generator_images: of a generator
    """

    tokenizer_images: int
    generator_images: int


@dataclass(frozen=True)
class TokenizerEntry:
    """A tokenizer that is trained, made of another, or loaded.

    Args:
        config: YAML file of its training; its data, length and output are the comparison's
        checkpoint: directory or Hub repository of one that is there already
        latents: another of the comparison, of which this is the one with latents of unit variance
        quantize: another of the comparison, of which this cuts the latents into `levels`
        initial: another of the comparison that training starts from, as a stage before
        levels: of each dimension (TokenBridge)
        options: of the training, by their dotted names, over those of the config
    """

    config: str | None = None
    checkpoint: str | None = None
    latents: str | None = None
    quantize: str | None = None
    initial: str | None = None
    levels: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require_one_source(self, "config", "checkpoint", "latents", "quantize")

    @property
    def source(self) -> str | None:
        """The tokenizer of the comparison that this one is made from."""
        return self.latents or self.quantize or self.initial


@dataclass(frozen=True)
class GeneratorEntry:
    """A generator that is trained on the tokens of a tokenizer, or loaded.

    Args:
        tokenizer: one of the comparison
        config: YAML file of its training; its data, tokenizer, length and output are the
            comparison's
        checkpoint: directory or Hub repository of one that is there already
        options: of the training, by their dotted names, over those of the config
    """

    tokenizer: str
    config: str | None = None
    checkpoint: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require_one_source(self, "config", "checkpoint")


@dataclass(frozen=True)
class Row:
    """A row of the report: a generator, decoded in a way.

    Args:
        generator: one of the comparison
        decoding: settings other than the generator's own (plan, guidance, steps, ...)
        note: a word on what this is, for the report
    """

    generator: str
    decoding: DecodingOptions = field(default_factory=dict)
    note: str = ""

    def decoding_from(self, own: Decoding) -> Decoding:
        """Return the generator's own settings changed by the row's."""
        return own.changed(**self.decoding)


@dataclass(frozen=True)
class Comparison:
    """Systems that are compared on one data set with one budget.

    Args:
        title: of the report
        data: pictures that all are trained on, as class_path and init_args
        held_out: pictures that validate, that are reconstructed, and that samples are compared with
        budget: length of the trainings
        tokenizers: by name
        generators: by name
        rows: by name, in the order of the report
        transform: how a picture becomes the tokenizers' size where it is not trained on
        count: images sampled and scored of each row
        features: of FID and IS: inception, dinov2-..., or random (offline; no published numbers)
        feature_weights: local file of the feature network's weights
        seed: of the samples
        batch_size: images at once when samples are scored
        timed_batch: images at once when rates are taken
        timed_rounds: rounds over all rows, taking turns, of which the median counts
    """

    title: str
    data: dict[str, Any]
    held_out: dict[str, Any]
    budget: Budget
    tokenizers: dict[str, TokenizerEntry]
    generators: dict[str, GeneratorEntry]
    rows: dict[str, Row]
    transform: str = "resize-center-crop"
    count: int = 432
    features: str = "inception"
    feature_weights: str | None = None
    seed: int = 0
    batch_size: int = 64
    timed_batch: int = 36
    timed_rounds: int = 3

    def __post_init__(self):
        for name, tokenizer in self.tokenizers.items():
            if tokenizer.source is not None:
                require_known(f"tokenizer {name}", tokenizer.source, self.tokenizers)
        for name, generator in self.generators.items():
            require_known(f"generator {name}", generator.tokenizer, self.tokenizers)
        for name, row in self.rows.items():
            require_known(f"row {name}", row.generator, self.generators)
        if not self.rows:
            raise UserError("a comparison without rows: name at least one")
        for number in ("count", "batch_size", "timed_batch", "timed_rounds"):
            if getattr(self, number) < 1:
                raise UserError(f"{number} {getattr(self, number)} must be at least 1")
        tuple(self.tokenizers_in_order())

    @property
    def metrics(self) -> list[str]:
        """What samples are scored by: IS only by a network that tells classes."""
        return ["fid", "is"] if self.features == "inception" else ["fid"]

    def tokenizers_in_order(self) -> Iterator[str]:
        """Yield the names of tokenizers, each after the one that it is made from."""
        made: set[str] = set()
        while len(made) < len(self.tokenizers):
            ready = [
                name
                for name, entry in self.tokenizers.items()
                if name not in made and (entry.source is None or entry.source in made)
            ]
            if not ready:
                circle = ", ".join(name for name in self.tokenizers if name not in made)
                raise UserError(f"tokenizers {circle} are made from one another")
            made.update(ready)
            yield from ready


def require_one_source(entry: TokenizerEntry | GeneratorEntry, *sources: str) -> None:
    """Raise `UserError` unless an entry says in one way where its model comes from."""
    given = [source for source in sources if getattr(entry, source) is not None]
    if len(given) != 1:
        raise UserError(
            f"{type(entry).__name__}: give one of {', '.join(sources)}, not "
            f"{' and '.join(given) or 'none'}"
        )


def require_known(where: str, name: str, known: dict[str, Any]) -> None:
    if name not in known:
        raise UserError(f"{where}: no '{name}' among {', '.join(known)}{suggestion(name, known)}")
