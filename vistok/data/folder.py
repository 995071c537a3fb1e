"""Pictures in directories: one directory per class, as ImageNet is laid out.

The list of files is read once and kept as a JSON index hidden beside the root. It stays valid as
long as no directory changes its modification time, which adding, removing or renaming a file does.
"""

import json
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from vistok.data.sources import (
    EXTENSIONS,
    ImageSource,
    Sample,
    index_path,
    keep_index,
    read_image,
)
from vistok.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1

# directory relative to the root -> [modification time in ns, names of its picture files]
Listing = dict[str, list]


class ImageFolder(ImageSource):
    """The pictures under `root`, at any depth; the directories right under it are the classes,
    numbered in sorted order. A root that holds pictures and no class is one class named after it.

    `index` is a directory for the index file (default: beside the root; where that is read-only,
    the root is listed anew each time). Captions are class names, keys are paths relative to the
    root. Names that begin with a dot are ignored; symbolic links are followed, but not in circles.
    Raises `UserError` for a root that is missing or has no picture.
    """

    def __init__(self, root: str | Path, index: str | Path | None = None):
        self.root = Path(root)
        if not self.root.is_dir():
            problem = "is not a directory" if self.root.exists() else "does not exist"
            raise UserError(f"image folder {self.root}: {problem}")
        self.name = self.root.resolve().name
        listing = self._list_files(index_path(self.root, index, ".json"))
        files = {path: names for path, (_, names) in listing.items() if names}
        if not files:
            raise UserError(f"image folder {self.root}: no picture ({' '.join(EXTENSIONS)}) inside")
        classes = sorted({path.split("/")[0] for path in listing} - {"."})
        if set(files) == {"."}:
            classes = [self.name]
        else:
            self._warn_of_strays(files.pop(".", []), classes, files)
        self.class_names = tuple(classes)
        number = {name: label for label, name in enumerate(classes)}
        self._directories = sorted(files, key=lambda path: path.split("/"))
        self._names = [files[path] for path in self._directories]
        self._labels = [number.get(path.split("/")[0], 0) for path in self._directories]
        self._ends = list(accumulate(map(len, self._names)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        position = range(len(self))[index]  # as sequences check and count indices
        directory = bisect_right(self._ends, position)
        name = self._names[directory][position - self._ends[directory]]
        path = self.root / self._directories[directory] / name
        label = self._labels[directory]
        image = read_image(path, str(path))
        key = path.relative_to(self.root).as_posix()
        return Sample(image, label, self.class_names[label], key)

    def labels(self) -> Int64[Tensor, "n"]:
        counts = torch.tensor([len(names) for names in self._names])
        return torch.tensor(self._labels).repeat_interleave(counts)

    def _warn_of_strays(self, strays: list[str], classes: list[str], files: Listing) -> None:
        filled = {path.split("/")[0] for path in files}
        empty = [name for name in classes if name not in filled]
        if strays:
            logger.warning("%s: %d pictures beside the classes left out", self.root, len(strays))
        if empty:
            logger.warning("%s: classes without pictures: %s", self.root, ", ".join(empty))

    def _list_files(self, index: Path) -> Listing:
        listing = self._read_index(index)
        if listing is None:
            try:
                listing = dict(self._walk(self.root, ()))
            except OSError as error:
                raise UserError(f"image folder {self.root}: cannot be listed ({error})") from error
            content = json.dumps({"format": FORMAT, "directories": listing})
            keep_index(index, lambda aside: aside.write_text(content))
        return listing

    def _read_index(self, path: Path) -> Listing | None:
        """Return the listing of an index file; None where it is missing, foreign or out of date."""
        try:
            content = json.loads(path.read_text())
            listing = content["directories"]
            if content["format"] == FORMAT and all(
                (self.root / directory).stat().st_mtime_ns == changed
                for directory, (changed, _) in listing.items()
            ):
                return listing or None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # also where a directory of the listing is gone
        return None

    def _walk(
        self, directory: Path, ancestors: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[str, list]]:
        """Yield (relative path, [modification time, picture names]), the directory itself first."""
        # The time is taken before the files: a change in between leaves the index stale, not wrong.
        status = directory.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            logger.warning("%s: leads back to its own parent, not followed", directory)
            return
        with os.scandir(directory) as found:
            entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
        inner = [entry.name for entry in entries if _is_directory(entry)]
        pictures = [
            entry.name
            for entry in entries
            if os.path.splitext(entry.name)[1].lower() in EXTENSIONS and not _is_directory(entry)
        ]
        yield directory.relative_to(self.root).as_posix(), [status.st_mtime_ns, pictures]
        for name in inner:
            yield from self._walk(directory / name, (*ancestors, identity))


def _is_directory(entry: os.DirEntry) -> bool:
    # DirEntry knows without a system call, but raises for a link to itself; Path answers False.
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()
