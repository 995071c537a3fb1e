"""Array files (.npy) that are mapped, not read, and that several processes fill."""

from pathlib import Path

import numpy as np

from vistok.errors import UserError


def create(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Make an array of full size, and map it to write."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def mapped(path: Path) -> np.memmap:
    """Map an array file to read; an array of Python objects raises ValueError."""
    return np.lib.format.open_memmap(path, mode="r")


def checked(path: Path, dtype: np.dtype, shape: tuple[int | None, ...]) -> np.memmap:
    """Map an array file to read; raises `UserError` unless it holds `dtype` in `shape`, in which
    None stands for any number."""
    try:
        array = mapped(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing, truncated or no array ({error})") from error
    free = tuple(None if n is None else size for n, size in zip(shape, array.shape, strict=False))
    if array.dtype != dtype or array.ndim != len(shape) or free != shape:
        raise UserError(
            f"{path}: holds {array.dtype} {array.shape}, the header says {dtype} {shape}"
        )
    return array


def write_rows(path: Path, start: int, rows: np.ndarray) -> None:
    """Write rows [start, start + len(rows)) of an array file."""
    # Not through a writable map: over a network two hosts would write back each other's pages.
    array = mapped(path)
    with path.open("r+b") as file:
        file.seek(array.offset + start * array.strides[0])
        file.write(rows.astype(array.dtype).tobytes())


def append_rows(path: Path, rows: np.ndarray) -> None:
    """Write rows behind the last one of an array file, which is whole again afterwards."""
    array = mapped(path)
    total = (len(array) + len(rows), *array.shape[1:])
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": total}
    with path.open("r+b") as file:
        file.seek(array.offset + array.nbytes)
        file.write(rows.astype(array.dtype).tobytes())
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)  # has room for the first axis to grow
