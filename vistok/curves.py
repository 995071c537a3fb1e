"""Quality against size: a tokenizer at several lengths, and image formats at several qualities, all
scored on the same pictures (One-D-Piece: Miwa et al., 2025, arXiv:2501.10064, section 4).

Each batch of pictures is encoded once and its prefixes decoded. Scores are those of
`vistok evaluate`, and hold on any number of processes.
"""

import csv
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from vistok import metrics as m
from vistok.codec import file_size, payload_size
from vistok.data import shard_range, to_uint8
from vistok.decoding import Noise
from vistok.errors import UserError
from vistok.files import replaced
from vistok.losses.perceptual import LPIPS
from vistok.metrics.statistics import IndexedTable
from vistok.tokenizers import Tokenizer
from vistok.tokens import TokenSpec
from vistok.training.processes import together

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Point:
    """Scores at one setting: `bytes` of a file with all it needs, in the mean over the pictures;
    `payload` of the tokens alone, None where a format does not tell them apart. `subject` says what
    was scored, `notes` what a reader must know of the scores."""

    codec: str
    setting: int
    bytes: float
    payload: int | None
    bits_per_pixel: float
    scores: dict[str, float]
    subject: dict[str, Any]
    notes: list[str]

    def row(self) -> dict[str, Any]:
        """Return what a table says of it."""
        return {
            "codec": self.codec,
            "setting": self.setting,
            "bytes": round(self.bytes, 2),
            "payload_bytes": "" if self.payload is None else self.payload,
            "bits_per_pixel": round(self.bits_per_pixel, 5),
            **{name: round(value, 5) for name, value in self.scores.items()},
        }


@dataclass(frozen=True)
class Scoring:
    """What curves are scored on and by: PSNR and SSIM, LPIPS and the features of rFID where they
    are given, all on images as bytes."""

    pictures: m.Pictures
    lpips: LPIPS | None
    network: m.FeatureNetwork | None
    device: torch.device

    @classmethod
    def load(
        cls,
        pictures: m.Pictures,
        features: str | None,
        feature_weights: str | None,
        lpips_weights: str | None,
        device: torch.device,
    ) -> "Scoring":
        """Load the networks. LPIPS, and Inception where `features` is None, are left out with a
        word where no weights are named and none are at hand; `features` 'none' leaves rFID out."""
        lpips = _if_at_hand(lambda: LPIPS(lpips_weights), lpips_weights is not None)
        network = None
        if features != "none" and len(pictures) > 1:
            asked = (features or feature_weights) is not None
            name = features or "inception"
            network = _if_at_hand(lambda: m.load_features(name, feature_weights), asked)
        return cls(pictures, lpips and lpips.to(device), network and network.to(device), device)

    @property
    def protocol(self) -> m.Protocol:
        """That of `vistok evaluate` for the same pictures and features."""
        return m.Protocol(
            task="reconstruction",
            count=len(self.pictures),
            pictures=str(self.pictures),
            labels="of the pictures",
            reference=str(self.pictures) if self.network else "none",
            features=self.network.label if self.network else "none",
            estimators=m.ESTIMATORS,
        )

    def collector(self, what: str) -> m.Collector | None:
        if self.network is None:
            return None
        return m.Collector(self.network, len(self.pictures), what, self.pictures.size, 0)


class Curve:
    """Points of one codec at its `settings`. A subclass makes the pictures.

    Attributes: `codec`, its name; `subject`, what results say of it.
    """

    codec: str
    subject: dict[str, Any]

    def __init__(self, scoring: Scoring, settings: Sequence[int]):
        self.scoring, self.settings = scoring, settings
        count = len(scoring.pictures)
        self.sizes = IndexedTable(count, len(settings), device=scoring.device)
        self.pairs = [m.PairScores(count, 0, scoring.lpips, scoring.device) for _ in settings]
        self.sets = [scoring.collector(f"{self.codec} at {setting}") for setting in settings]

    def coded(
        self, indices: Int64[Tensor, "b"], originals: UInt8[Tensor, "b 3 h w"]
    ) -> "list[tuple[UInt8[Tensor, 'b 3 h w'], list[int]]]":
        """Return the pictures and the bytes of their files at each of the settings."""
        raise NotImplementedError

    def payload(self, setting: int) -> int | None:
        return None

    def update(self, indices: Int64[Tensor, "b"], originals: UInt8[Tensor, "b 3 h w"]) -> None:
        """Add some pictures."""
        results = self.coded(indices, originals)
        self.sizes.update(indices, torch.tensor([size for _, size in results]).T.float())
        for (made, _), pairs, collector in zip(results, self.pairs, self.sets, strict=True):
            pairs.update(indices, made, originals, indices)
            if collector:
                collector.update(indices, made)

    def reduce(self, reference: m.Statistics | None) -> list[Point]:
        """Return the points of what all processes added, on each of them."""
        sizes = self.sizes.all_reduce().cpu().double().mean(0).tolist()
        pixels = math.prod(self.scoring.pictures.size)
        points = []
        for setting, size, pairs, collector in zip(
            self.settings, sizes, self.pairs, self.sets, strict=True
        ):
            scores, notes = pairs.reduce(), []
            if collector:
                made = collector.reduce()
                scores["rfid"] = m.set_scores(["fid"], made, reference)["fid"]
                notes = m.caveats(["fid"], made, None)
            point = Point(
                self.codec,
                setting,
                size,
                self.payload(setting),
                8 * size / pixels,
                scores,
                self.subject,
                notes,
            )
            points.append(point)
        return points


class TokenizerCurve(Curve):
    """A tokenizer at several lengths, the setting: bytes are those of `.vtk` files. Decoders that
    draw draw the same at every length, from the streams (seed, picture)."""

    def __init__(self, scoring: Scoring, model: Tokenizer, lengths: Sequence[int], seed: int = 0):
        self.model, self.seed = model, seed
        self.codec = type(model).__name__
        self.file_sizes = [file_size(model.spec, length) for length in lengths]
        self.subject = {"tokens": str(model.spec), "fingerprint": model.fingerprint()}
        super().__init__(scoring, lengths)

    def coded(self, indices, originals):
        tokens = self.model.encode(originals.to(self.model.device) / 255)
        return [
            (
                to_uint8(decode_first(self.model, tokens, length, self.seed, indices)),
                [size] * len(indices),
            )
            for length, size in zip(self.settings, self.file_sizes, strict=True)
        ]

    def payload(self, setting: int) -> int:
        return payload_size(self.model.spec, setting)


class FormatCurve(Curve):
    """A format of Pillow at several qualities, the setting: bytes are those of whole files."""

    OPTIONS: ClassVar[dict[str, dict[str, Any]]] = {
        "JPEG": {"optimize": True, "subsampling": "4:2:0"},
        "WebP": {"method": 6},
    }
    QUALITIES = (0, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)

    def __init__(self, scoring: Scoring, codec: str):
        self.codec = codec
        self.subject = {"format": codec, **self.OPTIONS[codec]}
        super().__init__(scoring, self.QUALITIES)

    def coded(self, indices, originals):
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in originals]
        results = []
        for quality in self.settings:
            files = [self._file(picture, quality) for picture in pictures]
            made = [np.array(Image.open(file).convert("RGB")) for file in files]
            stacked = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)
            sizes = [file.getbuffer().nbytes for file in files]
            results.append((stacked.to(self.scoring.device), sizes))
        return results

    def _file(self, picture: Image.Image, quality: int) -> io.BytesIO:
        file = io.BytesIO()
        picture.save(file, self.codec, quality=quality, **self.OPTIONS[self.codec])
        return file


def decode_first(
    model: Tokenizer,
    tokens: Tensor,
    length: int,
    seed: int,
    indices: Sequence[int] | Tensor,
    text: Tensor | None = None,
) -> Tensor:
    """Return images of the first `length` tokens, drawn, where the decoder draws, from the streams
    of images `indices`: the same at every length."""
    first = tokens[:, :length] if model.spec.has_prefixes else tokens
    return model.decode(first, text=text, noise=Noise(seed, indices))


def read_lengths(lengths: Sequence[int] | str | None, spec: TokenSpec) -> list[int]:
    """Return lengths in order: those given, as `1,2,4` or a list, or by default the powers of two
    and the whole of a sequence, and of other tokens all lengths that decode. Raises `UserError` for
    one that does not."""
    if lengths is None:
        lengths = spec.lengths
        if isinstance(lengths, range):
            lengths = [*(2**i for i in range(spec.num_tokens.bit_length())), spec.num_tokens]
    elif isinstance(lengths, str):
        try:
            lengths = [int(length) for length in lengths.split(",")]
        except ValueError as error:
            raise UserError(f"--lengths {lengths}: expected numbers, as 1,2,4,8") from error
    for length in lengths:
        spec.first(length)
    return sorted(set(lengths))


def measure(
    accelerator: Accelerator,
    scoring: Scoring,
    curves: Sequence[Curve],
    batch_size: int,
    num_workers: int,
) -> list[Point]:
    """Return the points of all curves, each process reading its share of the pictures once."""
    count = len(scoring.pictures)
    originals_set = scoring.collector(str(scoring.pictures))
    mine = shard_range(count, accelerator.process_index, accelerator.num_processes)
    loader = DataLoader(Subset(scoring.pictures, mine), batch_size, num_workers=num_workers)
    with together(accelerator, "measuring curves"), torch.inference_mode():
        for indices, originals in tqdm(loader, disable=not accelerator.is_main_process):
            if originals_set:
                originals_set.update(indices, originals)
            for curve in curves:
                curve.update(indices, originals)
    reference = originals_set and originals_set.reduce()
    return [point for curve in curves for point in curve.reduce(reference)]


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_results(path: Path, protocol: m.Protocol, points: Sequence[Point]) -> None:
    """Put points among the results of a file, each as its codec and setting."""
    for point in points:
        subject = {**point.subject, "setting": point.setting}
        scores = {"bytes": point.bytes, **point.scores}
        result = m.Result(scores, protocol, subject, point.notes)
        m.write_result(path, f"{point.codec} {point.setting}", result)


def plot(path: Path, points: Sequence[Point], against: str, title: str) -> None:
    """Draw each score over `against`, which is `bytes` of files or the `tokens` of a tokenizer."""
    from matplotlib.figure import Figure  # half a second that only plots need wait for

    scores = list(points[0].scores)
    figure = Figure(figsize=(4 * len(scores), 3.6), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        for codec in dict.fromkeys(point.codec for point in points):
            own = [point for point in points if point.codec == codec]
            x = [p.bytes if against == "bytes" else p.setting for p in own]
            axes.plot(x, [p.scores[score] for p in own], marker="o", markersize=3, label=codec)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("bytes of a file, mean" if against == "bytes" else "tokens")
        axes.set_title({"rfid": "rFID"}.get(score, score.upper()))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(title, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as aside:
        figure.savefig(aside, format="png", dpi=120)


def _if_at_hand(load: Callable[[], Loaded], asked: bool) -> Loaded | None:
    try:
        return load()
    except UserError as error:
        if asked:
            raise
        logger.info("left out: %s", error)
        return None
