"""The index of a tar shard: where each sample's picture and caption lie, and its label.

Scanning reads headers and labels once and keeps the result as .npz, valid while size and
modification time of the shard and the choice of fields stay the same. Nothing is unpacked or
unpickled.
"""

import json
import logging
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import IOBase
from pathlib import Path

import numpy as np

from vistok.data.sources import keep_index
from vistok.data.storage import NOTHING, Shard, Span, read_span
from vistok.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
CAPTION_FIELDS = ("txt", "caption")
PICKLES = frozenset({"pyd", "pkl", "pickle", "pth", "pt"})
MAX_CLASSES = 2**20


@dataclass(frozen=True)
class Fields:
    """The fields of a sample to read; None lets the shard decide, `label="none"` reads no label."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard as columns; a sample without caption has the span `NOTHING`."""

    keys: np.ndarray  # (n,) UTF-8 bytes
    images: np.ndarray  # (n, 2) spans
    captions: np.ndarray  # (n, 2) spans
    labels: np.ndarray  # (n,)


def load_or_scan(shard: Shard, fields: Fields, directory: str | Path | None) -> ShardIndex:
    """Return the index of `shard` from its file in `directory` (default: beside the shard), or scan
    the shard and write that file."""
    header = json.dumps([FORMAT, *shard.version(), fields.image, fields.label])
    place = shard.index_path(directory)
    try:
        with np.load(place, allow_pickle=False) as saved:
            if str(saved["header"]) == header:
                return ShardIndex(*(saved[name] for name in ShardIndex.__dataclass_fields__))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # no index, or none that can be read: made again below
    try:
        index = scan(shard, fields)
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error})") from error

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.savez(file, header=header, **vars(index))

    keep_index(place, write)
    return index


def scan(shard: Shard, fields: Fields) -> ShardIndex:
    """Read the headers of a shard and the labels of its samples; raises `UserError` for an archive
    or a sample that is not whole."""
    keys, images, captions, labels = [], [], [], []
    with shard.open() as file:
        for key, sample in _samples(shard, file):
            where = f"{shard}: {key}"
            caption = next((field for field in CAPTION_FIELDS if field in sample), None)
            keys.append(key.encode("utf-8", "surrogateescape"))
            images.append(sample[_choose(fields.image, IMAGE_FIELDS, sample, where)])
            captions.append(sample[caption] if caption else NOTHING)
            labels.append(_label(fields.label, sample, file, where))
    return ShardIndex(
        np.array(keys, dtype=np.bytes_),
        np.array(images, dtype=np.int64).reshape(-1, 2),
        np.array(captions, dtype=np.int64).reshape(-1, 2),
        np.array(labels, dtype=np.int64),
    )


def _members(shard: Shard, file: IOBase) -> Iterator[tuple[str, Span]]:
    """Yield (name, span) of the regular files of a whole, uncompressed tar."""
    ignored = 0
    try:
        # Mode "r:" refuses compressed archives, which have no offsets to seek to.
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    yield member.name, (member.offset_data, member.size)
                elif not member.isdir():
                    ignored += 1
            # tarfile takes a cut between two members, or inside a header, for the end.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("the end-of-archive mark is missing: truncated?")
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{shard}: not a whole, uncompressed tar file ({error})") from error
    if ignored:
        logger.warning("%s: %d links, devices or sparse files left out", shard, ignored)


def _samples(shard: Shard, file: IOBase) -> Iterator[tuple[str, dict[str, Span]]]:
    """Gather consecutive members of one key into samples {field: span}, as webdataset does: the key
    is the path up to the first dot of the base name, the field what follows, in lower case."""
    current, sample, seen = None, {}, set()
    for name, span in _members(shard, file):
        folder, _, base = name.rpartition("/")
        stem, dot, field = base.partition(".")
        field = field.lower()
        if not (stem and dot):
            continue
        if field.rpartition(".")[2] in PICKLES:
            raise UserError(f"{shard}: {name} is a pickle, which could run code: refused")
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if sample:
                yield current, sample
            if key in seen:
                raise UserError(f"{shard}: key {key} appears twice")
            seen.add(key)
            current, sample = key, {}
        if field in sample:
            raise UserError(f"{shard}: {name} appears twice")
        sample[field] = span
    if sample:
        yield current, sample


def _choose(given: str | None, known: Sequence[str], sample: dict[str, Span], where: str) -> str:
    """Return the field to read; raises `UserError` where none or several fit."""
    wanted = (given,) if given else known
    fitting = [field for field in wanted if field in sample]
    if len(fitting) != 1:
        problem = "more than one field of" if fitting else "no field"
        raise UserError(f"{where}: {problem} {', '.join(wanted)}; found: {', '.join(sample)}")
    return fitting[0]


def _label(wanted: str | None, sample: dict[str, Span], file: IOBase, where: str) -> int:
    if wanted == "none":
        return 0
    given, _, key = (wanted or "").partition(":")
    known = ("cls",) if "cls" in sample else ("cls", "json")
    field = _choose(given, known, sample, where)
    text = read_span(file, sample[field])
    try:
        label = json.loads(text)[key or "label"] if field == "json" else int(text)
    except (ValueError, LookupError, TypeError) as error:
        shown = text[:40].decode("utf-8", "replace").strip()
        raise UserError(f"{where}: no integer label in {field}: {shown!r}") from error
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        raise UserError(f"{where}: label {label!r} is no class number; classes count from 0")
    return label
