"""Score a tokenizer, what its tokens tell of classes, a generator, or pictures.

vistok evaluate --tokenizer DIR --data Emoji --data.split held-out
vistok evaluate --checkpoint DIR --count 1000 --reference Emoji --features random
vistok evaluate --probe true --tokenizer DIR --data val/ --reference train/
accelerate launch --num_processes 8 -m vistok.cli evaluate --data samples.npz --reference ref.npz
vistok evaluate --data ImageFolder --data.root DIR --size 256 --statistics ref.npz
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack, get_args

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from vistok import metrics as m
from vistok.curves import decode_first
from vistok.data import ImageSource, Transform, shard_range, to_uint8
from vistok.decoding import Decoding, DecodingOptions
from vistok.errors import UserError
from vistok.losses.perceptual import LPIPS
from vistok.pipelines import ImagePipeline
from vistok.text import class_captions, decoder_text
from vistok.tokenizers import Tokenizer
from vistok.training.processes import together

logger = logging.getLogger(__name__)

OF_SETS = frozenset(get_args(m.SetMetric))
Metric = m.SetMetric | Literal["psnr", "ssim", "lpips", "codebook"]


def main(
    tokenizer: str | None = None,
    checkpoint: str | None = None,
    untrained: bool = False,
    probe: bool = False,
    data: ImageSource | str | None = None,
    reference: ImageSource | str | None = None,
    statistics: str | None = None,
    output: str = "metrics.json",
    name: str | None = None,
    baseline: str | None = None,
    metrics: list[Metric] | None = None,
    features: str = "inception",
    feature_weights: str | None = None,
    lpips_weights: str | None = None,
    pooling: m.Pooling = "mean",
    transform: str = "resize-center-crop",
    size: int | None = None,
    count: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    **changes: Unpack[DecodingOptions],
) -> None:
    """Score reconstructions (--tokenizer with --data), samples (--checkpoint) or pictures (--data).
    With --probe, score how well a linear classifier and retrieval by the tokenizer's tokens, both
    given the labelled pictures of --reference, tell the classes of --data, which is held out.

    Pictures are a data set by name, a folder, tar shards or an npz. A result is written with its
    protocol; results of different protocols are not compared.

    Args:
        tokenizer: directory or Hub repository of a tokenizer, scored on the data
        checkpoint: directory or Hub repository of a pipeline, sampled on the fly
        untrained: sample the checkpoint's generator as it was before training, for a baseline
        probe: score classification and retrieval by the tokenizer's tokens
        data: pictures to reconstruct, or to be scored themselves
        reference: pictures to compare with, or npz statistics of them; a tokenizer's are its data;
            those that a probe is trained on
        statistics: npz file for the statistics of what is scored: a reference for later
        output: JSON file of results; others in it are kept
        name: of the result in that file; by default reconstruction, generation, pictures or probe
        baseline: name of an earlier result in that file to compare with
        metrics: which scores; by default all that apply
        features: inception, dinov2-..., clip-..., or random (offline; no published numbers)
        feature_weights: local file of the feature network's weights
        lpips_weights: local file of torchvision's VGG-16
        pooling: of the tokens that a probe reads: their mean, or all in a row (flat)
        transform: how pictures become the size
        size: side in pixels; by default the model's, or that of the pictures as they are
        count: images to sample, 50,000 by default; or pictures to take, all by default
        seed: of samples; image i is of class i mod the number of classes
        batch_size: images at once on each process
        num_workers: processes that read pictures, for each process
        changes: how samples are decoded; of these a tokenizer reads the length
    """
    accelerator = Accelerator()
    scan = Scan(accelerator, batch_size, num_workers)
    results = Results(output, name, baseline)
    if batch_size < 1 or (count is not None and count < 1):
        raise UserError(f"--batch_size {batch_size}, --count {count}: both must be at least 1")
    if probe:
        if checkpoint or metrics or statistics or not (tokenizer and data and reference):
            raise UserError(
                "--probe takes --tokenizer, --data, which is held out, and --reference, which is "
                "trained on, but no --checkpoint, --metrics or --statistics"
            )
        model = Tokenizer.from_pretrained(tokenizer).to(accelerator.device).eval()
        crop = Transform(transform, model.image_size[0])
        held_out = m.Pictures(m.open_pictures(data), crop, count)
        training = m.Pictures(m.open_pictures(reference), crop)
        probe_tokens(scan, results, model, held_out, training, pooling, changes.get("length"))
        return
    network = against = read = None
    if statistics or not OF_SETS.isdisjoint(metrics or OF_SETS):
        network = m.load_features(features, feature_weights).to(accelerator.device)
    if checkpoint and not (tokenizer or data):
        pipeline = ImagePipeline.from_pretrained(checkpoint)
        pipeline = (pipeline.untrained() if untrained else pipeline).to(accelerator.device)
        if pipeline.conditioning == "text":
            raise UserError(
                f"{checkpoint} is text-conditional: sample it by `vistok generate --prompts FILE` "
                "and score the folder by --data"
            )
        decoding = pipeline.decoding.changed(**changes)
        decoding.plan_of(pipeline.generator)  # what does not fit is an error here
        subject = Samples(pipeline, count or 50_000, seed, decoding)
    elif tokenizer and data and not checkpoint:
        model = Tokenizer.from_pretrained(tokenizer).to(accelerator.device).eval()
        crop = Transform(transform, model.image_size[0])
        originals = m.Pictures(m.open_pictures(data), crop, count)
        lpips = load_lpips(metrics, lpips_weights, accelerator.device)
        subject = Reconstructions(model, originals, lpips, changes.get("length"))
        against = network and m.Reference(None, originals)
    elif data and not (checkpoint or tokenizer):
        crop = None if size is None else Transform(transform, size)
        subject = Collection(m.Pictures(m.open_pictures(data), crop, count))
    else:
        raise UserError("give --checkpoint, or --tokenizer with --data, or --data alone")

    if network and reference is not None:
        with_vectors = not {"kid", "precision_recall"}.isdisjoint(metrics or subject.metrics)
        against = m.Reference.open(reference, transform, subject.size, network, with_vectors)
    wanted = m.choose(metrics, subject.metrics, len(subject.images), network, against)
    if not (wanted or statistics):
        raise UserError("nothing to score: give --reference, or --statistics FILE to make one")
    protocol = m.Protocol(
        task=subject.task,
        count=len(subject.images),
        pictures=subject.pictures,
        labels=subject.labels,
        reference=str(against) if against else "none",
        features=network.label if network else "none",
        estimators=m.ESTIMATORS,
    )
    results.check(protocol)

    def collect(shown: Collection) -> m.Statistics | None:
        if network is None:
            scan(shown, lambda *_: None)
            return None
        collector = m.Collector(network, len(shown.images), str(shown), shown.size)
        scan(shown, collector.update)
        return collector.reduce()

    # What can be broken is read before anything is sampled.
    if not checkpoint:
        made = collect(subject)
    if against and against.pictures:
        read = collect(Collection(against.pictures))
    if checkpoint:
        made = collect(subject)
    pairs = subject.pair_scores()
    if not accelerator.is_main_process:
        return
    if statistics is not None:
        made.save(statistics)
        print(f"statistics of {subject}: {statistics}")
    if not wanted:
        return
    scores = m.set_scores(wanted, made, against and against.completed(read))
    scores = {subject.aliases.get(key, key): value for key, value in scores.items()}
    scores |= {key: value for key, value in pairs.items() if key.split("_")[0] in wanted}
    notes = m.caveats(wanted, made, against)
    results.write(m.Result(scores, protocol, subject.record, notes), str(subject))


def probe_tokens(
    scan: "Scan",
    results: "Results",
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
