"""Files that are whole or absent: written aside, forced to the disk, then renamed.

A rename within one file system is atomic, so that a kill at any byte leaves what was there before.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Force the content of a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; what was written takes the name on success.

    Several processes may replace one file at a time: each writes under a name of its own.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def publish_directory(aside: Path, directory: Path) -> None:
    """Give a directory of synced files, written aside, its name."""
    sync(aside)
    aside.rename(directory)
    sync(directory.parent)


def publish_files(aside: Path, directory: Path) -> None:
    """Move every file of `aside` into `directory`, each replacing its former version whole."""
    for file in sorted(aside.iterdir()):
        sync(file)
        file.replace(directory / file.name)
    sync(directory)
    shutil.rmtree(aside)
