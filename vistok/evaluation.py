"""What scores are of, pictures, reconstructions, samples or tokens, and how they are made: every
process is shown its share, batch by batch, and the result goes into a file with its protocol.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from vistok import metrics as m
from vistok.curves import decode_first
from vistok.data import shard_range, to_uint8
from vistok.decoding import Decoding
from vistok.errors import UserError
from vistok.losses.perceptual import LPIPS
from vistok.pipelines import ImagePipeline
from vistok.text import class_captions, decoder_text
from vistok.tokenizers import Tokenizer
from vistok.training.processes import together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scan:
    """Shows collections to all processes, to each its share, batch by batch."""

    accelerator: Accelerator
    batch_size: int
    num_workers: int

    def __call__(self, shown: "Collection", use: Callable[..., None]) -> None:
        """Call `use` with what the collection makes of each batch of its images."""
        here, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = Subset(shown.images, shard_range(len(shown.images), here, world))
        loader = DataLoader(mine, self.batch_size, num_workers=self.num_workers)
        with together(self.accelerator, str(shown)), torch.inference_mode():
            for batch in tqdm(loader, shown.task, disable=not self.accelerator.is_main_process):
                use(*shown.make(batch))

    def statistics(
        self, shown: "Collection", network: m.FeatureNetwork | None
    ) -> m.Statistics | None:
        """Return the statistics of a collection's images, on each process; without a network show
        them only."""
        if network is None:
            self(shown, lambda *_: None)
            return None
        collector = m.Collector(network, len(shown.images), str(shown), shown.size)
        self(shown, collector.update)
        return collector.reduce()


class Results:
    """The file that a result is written into, `name` it goes by, and an earlier one, `baseline`, to
    compare it with."""

    def __init__(self, path: str, name: str | None, baseline: str | None):
        self.path, self.name = path, name
        earlier = m.read_results(path)
        self.before = m.find_result(earlier, baseline, path) if baseline else None

    def check(self, protocol: m.Protocol) -> None:
        """Raise `UserError` unless a result by this protocol compares with the baseline."""
        if self.before:
            m.require_same_protocol(self.before.protocol, protocol)

    def write(self, result: m.Result, subject: str) -> None:
        """Write and print a result."""
        name = self.name or result.protocol.task
        m.write_result(self.path, name, result)
        print(f"{name}, {subject}:")
        print(result.table(m.compare(self.before, result) if self.before else None))
        print(f"written to {self.path}")


class Collection:
    """Pictures as they are read."""

    task = "pictures"
    labels = "of the pictures"
    metrics: tuple[str, ...] = get_args(m.SetMetric)
    aliases: ClassVar[dict[str, str]] = {}

    def __init__(self, images: m.Pictures):
        self.images = images
        self.size = images.size
        self.pictures = images.presentation
        self.record = {"data": str(images)}

    def __str__(self) -> str:
        return str(self.images)

    def make(self, batch: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (indices, images) of a batch of `images`."""
        indices, pixels = batch
        return indices, pixels

    def pair_scores(self) -> dict[str, float]:
        """Return the scores of images against their originals; all processes must call it."""
        return {}


class Reconstructions(Collection):
    """What a tokenizer makes of pictures."""

    task = "reconstruction"
    aliases: ClassVar[dict[str, str]] = {"fid": "rfid"}

    def __init__(
        self, model: Tokenizer, originals: m.Pictures, lpips: LPIPS | None, length: int | None
    ):
        super().__init__(originals)
        self.pictures = str(originals)
        spec = model.spec if length is None else model.spec.first(length)
        self.record |= {"tokens": str(spec), "fingerprint": model.fingerprint()}
        self.model, self.length = model, spec.num_tokens
        self.text = decoder_text(model, device=model.device)
        num_codes = model.spec.vocab_size or 0
        self.pairs = m.PairScores(
            len(originals), num_codes, lpips, model.device, num_positions=self.length
        )
        self.metrics = ("fid", *self.pairs.metrics)

    def __str__(self) -> str:
        return f"reconstructions of {self.images}"

    def make(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        indices, originals = batch
        tokens = self.model.encode(originals.to(self.model.device) / 255)
        text = self.text and self.text.encode(class_captions(self.images.class_names(indices)))
        made = to_uint8(decode_first(self.model, tokens, self.length, 0, indices, text))
        self.pairs.update(indices, made, originals, tokens.flatten(1)[:, : self.length])
        return indices, made

    def pair_scores(self) -> dict[str, float]:
        scores = self.pairs.reduce()
        if self.pairs.position_bits is not None:
            self.record["bits_per_position"] = self.pairs.position_bits
        return scores


class Tokens(Collection):
    """The features of a tokenizer's tokens of pictures, of the first `length` where it is given."""

    task = "probe"

    def __init__(
        self, model: Tokenizer, images: m.Pictures, pooling: m.Pooling, length: int | None
    ):
        super().__init__(images)
        if length is not None and model.spec.is_scales:
            raise UserError(f"--length {length}: a probe reads {model.spec} as their sum")
        spec = model.spec if length is None else model.spec.first(length)
        self.record |= {"tokens": str(spec), "fingerprint": model.fingerprint()}
        self.model, self.length = model, length
        example = self.features(torch.zeros(1, *model.input_shape, device=model.device))
        self.tables = m.FeatureTables(images.labels(), example, pooling, model.device)

    def __str__(self) -> str:
        return f"features of {self.images}"

    @torch.inference_mode()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        found = self.model.features(images)
        return {name: tokens[:, : self.length] for name, tokens in found.items()}

    def make(self, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return what `tables` take of a batch of `images`."""
        indices, pixels = batch
        images = pixels.to(self.model.device) / 255
        return indices, self.features(images), images


class Samples(Collection):
    """What a pipeline samples, its classes in turn."""

    task = "generation"

    def __init__(self, pipeline: ImagePipeline, count: int, seed: int, decoding: Decoding):
        self.pipeline, self.seed, self.decoding = pipeline, seed, decoding
        self.images = range(count)
        self.num_classes = len(pipeline.class_names)
        self.size = pipeline.tokenizer.image_size
        self.pictures = f"sampled, {self.size[1]} x {self.size[0]}"
        self.labels = f"balanced: image i of class i mod {self.num_classes}"
        self.record = {
            "fingerprints": [pipeline.tokenizer.fingerprint(), pipeline.generator.fingerprint()],
            "seed": seed,
            "decoding": str(decoding),
        }

    def __str__(self) -> str:
        return f"{len(self.images)} samples"

    def make(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        labels = batch % self.num_classes
        return batch, to_uint8(self.pipeline.sample(labels, self.seed, batch, self.decoding))


def score_images(
    scan: Scan,
    results: Results,
    subject: Collection,
    metrics: list[str] | None,
    network: m.FeatureNetwork | None,
    reference: m.Reference | None,
) -> None:
    """Score images, by default (None) by all metrics that apply. Raises `UserError` before any work
    for those that do not."""
    wanted = m.choose(metrics, subject.metrics, len(subject.images), network, reference)
    if not wanted:
        raise UserError("nothing to score: give --reference")
    protocol = m.Protocol(
        task=subject.task,
        count=len(subject.images),
        pictures=subject.pictures,
        labels=subject.labels,
        reference=str(reference) if reference else "none",
        features=network.label if network else "none",
        estimators=m.ESTIMATORS,
    )
    results.check(protocol)
    read = None  # what can be broken is read before anything is sampled
    if reference and reference.pictures:
        read = scan.statistics(Collection(reference.pictures), network)
    made = scan.statistics(subject, network)
    pairs = subject.pair_scores()
    if scan.accelerator.is_main_process:
        scores = m.set_scores(wanted, made, reference and reference.completed(read))
        scores = {subject.aliases.get(key, key): value for key, value in scores.items()}
        scores |= {key: value for key, value in pairs.items() if key.split("_")[0] in wanted}
        notes = m.caveats(wanted, made, reference)
        results.write(m.Result(scores, protocol, subject.record, notes), str(subject))


def probe_tokens(
    scan: Scan,
    results: Results,
    model: Tokenizer,
    held_out: m.Pictures,
    training: m.Pictures,
    pooling: m.Pooling,
    length: int | None,
) -> None:
    """Score what the tokens of held-out pictures tell of their classes."""
    m.require_probe_sets(training, held_out)
    protocol = m.Protocol(
        task=Tokens.task,
        count=len(held_out),
        pictures=str(held_out),
        labels=f"of the pictures, {held_out.source.num_classes} classes",
        reference=str(training),
        features=f"of tokens, {pooling}",
        estimators=m.PROBE_ESTIMATORS,
    )
    results.check(protocol)
    found = []
    for pictures in (training, held_out):
        tokens = Tokens(model, pictures, pooling, length)
        scan(tokens, tokens.tables.update)
        found.append(tokens.tables.reduce())
    if scan.accelerator.is_main_process:
        scores, notes = m.probe_scores(*found), m.probe_caveats(*found)
        record = tokens.record | {"data": str(held_out)}
        results.write(m.Result(scores, protocol, record, notes), f"features of {held_out}")


def load_lpips(
    metrics: list[str] | None, weights: str | None, device: torch.device
) -> LPIPS | None:
    """Return LPIPS if it is asked for, or if everything is and its weights are at hand."""
    if metrics is not None and "lpips" not in metrics:
        return None
    try:
        return LPIPS(weights).to(device)
    except UserError as error:
        if metrics or weights:
            raise
        logger.info("left out: %s", error)
        return None
