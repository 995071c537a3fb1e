"""vistok evaluate: score a tokenizer, what its tokens tell of classes, a generator, or pictures.

vistok evaluate --tokenizer DIR --data Emoji --data.split held-out
vistok evaluate --checkpoint DIR --count 1000 --reference Emoji --features random
vistok evaluate --probe true --tokenizer DIR --data val/ --reference train/
vistok evaluate --data samples.npz --reference ref.npz --baseline generation
accelerate launch --num_processes 8 -m vistok.cli evaluate --checkpoint DIR --reference ref.npz
"""

from typing import Literal, Unpack, get_args

from accelerate import Accelerator

from vistok import metrics as m
from vistok.data import ImageSource, Transform
from vistok.decoding import DecodingOptions
from vistok.errors import UserError
from vistok.evaluation import (
    Collection,
    Reconstructions,
    Results,
    Samples,
    Scan,
    load_lpips,
    probe_tokens,
    score_images,
)
from vistok.pipelines import ImagePipeline
from vistok.tokenizers import Tokenizer

OF_SETS = frozenset(get_args(m.SetMetric))
Metric = m.SetMetric | Literal["psnr", "ssim", "lpips", "codebook"]


def main(
    tokenizer: str | None = None,
    checkpoint: str | None = None,
    untrained: bool = False,
    probe: bool = False,
    data: ImageSource | str | None = None,
    reference: ImageSource | str | None = None,
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
        reference: pictures to compare with, or npz statistics of them, as `vistok stats` writes; a
            tokenizer's are its data; those that a probe is trained on
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
        if checkpoint or metrics or not (tokenizer and data and reference):
            raise UserError(
                "--probe takes --tokenizer, --data, which is held out, and --reference, which is "
                "trained on, but no --checkpoint or --metrics"
            )
        model = Tokenizer.from_pretrained(tokenizer).to(accelerator.device).eval()
        crop = Transform(transform, model.image_size[0])
        held_out = m.Pictures(m.open_pictures(data), crop, count)
        training = m.Pictures(m.open_pictures(reference), crop)
        probe_tokens(scan, results, model, held_out, training, pooling, changes.get("length"))
        return
    network = against = None
    if not OF_SETS.isdisjoint(metrics or OF_SETS):
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
    score_images(scan, results, subject, metrics, network, against)
