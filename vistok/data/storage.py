"""Where tar shards lie: files, or objects of any store that fsspec reads by ranges of bytes.

A store's client holds connections that no forked process may share: it is looked up at each use,
and made once for each process.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import IOBase
from pathlib import Path

import fsspec

from vistok.data.sources import index_in, index_path
from vistok.errors import UserError

Span = tuple[int, int]  # offset and size in the shard, in bytes
NOTHING: Span = (0, -1)
Version = list[int]  # what changes when a shard is replaced


@dataclass(frozen=True)
class ShardFile:
    """A local or mounted file; raises `OSError` where it cannot be read."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> IOBase:
        return self.path.open("rb")

    def version(self) -> Version:
        return _version(self.path.stat())

    def read(self, spans: Sequence[Span], version: Version) -> list[bytes | None]:
        """Return the bytes of spans, None for `NOTHING`; raises `UserError` for another version."""
        with self.open() as file:
            if _version(os.fstat(file.fileno())) != version:
                raise UserError(f"{self}: was replaced while in use; start again")
            return [read_span(file, span) for span in spans]

    def index_path(self, directory: str | Path | None) -> Path:
        return index_path(self.path, directory, ".npz")


@dataclass(frozen=True)
class ShardObject:
    """An object of a store, by its URL. Raises `UserError` where the store does not give it: a
    store that fails is no broken sample, and ends a run that can go on later."""

    url: str

    def __str__(self) -> str:
        return self.url

    def open(self) -> IOBase:
        with _store(self.url) as (store, path):
            return store.open(path, "rb")

    def version(self) -> Version:
        with _store(self.url) as (store, path):
            return [store.size(path), store.checksum(path)]

    def read(self, spans: Sequence[Span], version: Version) -> list[bytes | None]:
        """Return the bytes of spans, None for `NOTHING`. The version is not asked for again, which
        would double the requests: objects must not be replaced while they are in use."""
        with _store(self.url) as (store, path):
            return [
                store.cat_file(path, begin, begin + size) if size >= 0 else None
                for begin, size in spans
            ]

    def index_path(self, directory: str | Path | None) -> Path:
        if directory is None:
            raise UserError(
                f"{self}: shards of a store need index=DIRECTORY, a local or mounted one, to keep "
                "where their samples lie: without it each process reads all of every shard first"
            )
        return index_in(directory, self.url, ".npz")


Shard = ShardFile | ShardObject


def read_span(file: IOBase, span: Span) -> bytes | None:
    """Read the bytes of a member; None for `NOTHING`."""
    offset, size = span
    if size < 0:
        return None
    file.seek(offset)
    return file.read(size)


def find(pattern: str) -> list[Shard]:
    """Return the files that a path, or the objects that a URL with `://`, names with `*` and `?`,
    in order."""
    wild = glob.has_magic(pattern)
    if "://" not in pattern:
        names = sorted(glob.glob(pattern)) if wild else [pattern]
        return [ShardFile(Path(name)) for name in names if wild or Path(name).is_file()]
    with _store(pattern) as (store, path):
        names = sorted(store.glob(path)) if wild else [path]
        return [
            ShardObject(store.unstrip_protocol(name))
            for name in names
            if wild or store.isfile(name)
        ]


@contextmanager
def _store(url: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
    """Give the client for `url` and its path there; what either raises becomes one line."""
    try:
        yield fsspec.url_to_fs(url)
    except Exception as error:  # each client raises errors of its own
        raise UserError(f"{url}: cannot be read ({type(error).__name__}: {error})") from error


def _version(status: os.stat_result) -> Version:
    return [status.st_size, status.st_mtime_ns]
