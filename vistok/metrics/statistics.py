"""Statistics of features over sets of images, equal on any number of processes.

Moments are float64 sums; what must stay per image lies in tables by image index. Each process adds
its own images, the sums of all processes are the whole, and every index must have come once.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from vistok.errors import UserError
from vistok.files import replaced
from vistok.metrics.features import FeatureNetwork

MAX_VECTORS = 10_000  # bounds the memory and time of KID, precision and recall


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes, in place; nothing happens where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Moments:
    """Count, mean and unbiased covariance of vectors (as np.cov), streaming in float64."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, vectors: Float[Tensor, "b d"]) -> None:
        vectors = vectors.to(self.sum)
        self.count += len(vectors)
        self.sum += vectors.sum(0)
        self.outer.addmm_(vectors.T, vectors)

    def merge(self, other: "Moments") -> None:
        self.count += other.count
        self.sum += other.sum
        self.outer += other.outer

    def all_reduce(self) -> None:
        """Add the moments of all processes, on each of them."""
        count = torch.tensor(self.count, device=self.sum.device)
        self.count = int(all_reduce(count))
        all_reduce(self.sum)
        all_reduce(self.outer)

    @property
    def mean(self) -> Float64[Tensor, "d"]:
        return self.sum / self.count

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        if self.count < 2:
            raise UserError(f"{self.count} image(s): a covariance needs at least 2")
        return (self.outer - self.count * self.mean.outer(self.mean)) / (self.count - 1)


class IndexedTable:
    """One row for each of `count` images, or for the `chosen` of them in that order, whichever
    process brought it."""

    def __init__(
        self,
        count: int,
        width: int,
        chosen: Int64[Tensor, "n"] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        chosen = torch.arange(count) if chosen is None else chosen
        self.row_of = torch.full((count,), -1)
        self.row_of[chosen] = torch.arange(len(chosen))
        self.row_of = self.row_of.to(device)
        self.rows = torch.zeros(len(chosen), width, dtype=dtype, device=device)
        self.times = torch.zeros(len(chosen), dtype=torch.int64, device=device)

    def update(self, indices: Int64[Tensor, "b"], rows: Float[Tensor, "b width"]) -> None:
        """Enter the rows of some images; images that were not chosen are passed over."""
        places = self.row_of[indices.to(self.row_of.device)]
        held = places >= 0
        self.rows[places[held]] = rows.to(self.rows)[held]
        self.times.index_add_(0, places[held], torch.ones_like(places[held]))

    def all_reduce(self) -> Float[Tensor, "n width"]:
        """Return the rows of all processes, on each of them; raises `RuntimeError` unless every
        image came exactly once."""
        wrong = (all_reduce(self.times) != 1).nonzero().flatten()
        if len(wrong):
            raise RuntimeError(
                f"{len(wrong)} of {len(self.times)} images were not counted once: row "
                f"{int(wrong[0])} came {int(self.times[wrong[0]])} times"
            )
        return all_reduce(self.rows)


@dataclass(frozen=True)
class Statistics:
    """What is kept of a set of images in the features of one network.

    `pictures` says which images, `size` their height and width, `features` which network; None
    where a file does not say. `vectors` are those of a fixed random choice of images, `logits`
    those of all; None where not collected.
    """

    mean: Float64[Tensor, "d"]
    covariance: Float64[Tensor, "d d"]
    pictures: str
    features: str | None = None
    count: int | None = None
    size: tuple[int, int] | None = None
    vectors: Float[Tensor, "k d"] | None = None
    logits: Float[Tensor, "n c"] | None = None

    def save(self, path: str | Path) -> None:
        """Write an npz as ADM's evaluator reads it (`mu`, `sigma`), with what else is known."""
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.vectors is not None:
            arrays["vectors"] = self.vectors.numpy()
        about = {key: getattr(self, key) for key in ("pictures", "features", "count", "size")}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replaced(Path(path)) as aside, aside.open("wb") as file:
            np.savez(file, protocol=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what `save` or ADM wrote; raises `UserError` for anything else."""
        arrays = read_npz(path, {"mu", "sigma", "vectors", "protocol"})
        missing = {"mu", "sigma"} - set(arrays)
        if missing:
            raise UserError(
                f"{path}: no statistics of images: {', '.join(sorted(missing))} missing"
            )
        mean, covariance = (_to_float64(arrays[name], name, path) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit; "
                "expected (d,) and (d, d)"
            )
        vectors = None
        if "vectors" in arrays:
            vectors = _to_float64(arrays["vectors"], "vectors", path).float()
            if vectors.ndim != 2 or vectors.shape[1] != len(mean):
                raise UserError(
                    f"{path}: vectors {tuple(vectors.shape)}, expected (n, {len(mean)})"
                )
        if "protocol" in arrays:
            return cls(mean, covariance, vectors=vectors, **_read_about(arrays["protocol"], path))
        digest = hashlib.sha256(mean.numpy().tobytes() + covariance.numpy().tobytes())
        pictures = f"{Path(path).name} (statistics {digest.hexdigest()[:16]})"
        return cls(mean, covariance, pictures, vectors=vectors)


class Collector:
    """Gathers the statistics of images 0 to `count` - 1 of the set `pictures`, batch by batch, all
    of height and width `size`.

    Vectors of at most `num_vectors` images are kept, chosen by `count` alone.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        count: int,
        pictures: str,
        size: tuple[int, int],
        num_vectors: int = MAX_VECTORS,
    ):
        self.network, self.pictures, self.size = network, pictures, size
        self.device = next(network.parameters()).device
        home = torch.device("cpu") if self.device.type == "mps" else self.device  # has no float64
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:num_vectors]
        self.moments = Moments(network.dim, home)
        self.vectors = IndexedTable(count, network.dim, chosen.sort().values, device=home)
        # Of width 0 where there are none, it still sees that every image comes once.
        self.logits = IndexedTable(count, network.num_logits, device=home)

    @torch.inference_mode()
    def update(self, indices: Int64[Tensor, "b"], images: UInt8[Tensor, "b 3 h w"]) -> None:
        """Add some images; raises `UserError` for features that are not finite."""
        features = self.network(images.to(self.device))
        if not torch.isfinite(features.vectors).all():
            raise UserError(
                f"{self.pictures}: features of images {indices.tolist()} are not finite"
            )
        self.moments.update(features.vectors)
        self.vectors.update(indices, features.vectors)
        self.logits.update(indices, features.logits)

    def reduce(self) -> Statistics:
        """Return the statistics of what all processes added, on each of them, on the CPU."""
        logits = self.logits.all_reduce().cpu()
        self.moments.all_reduce()
        return Statistics(
            self.moments.mean.cpu(),
            self.moments.covariance.cpu(),
            self.pictures,
            self.network.label,
            self.moments.count,
            self.size,
            self.vectors.all_reduce().cpu(),
            logits if self.network.num_logits else None,
        )


def npz_names(path: str | Path) -> set[str]:
    """Return the names of the arrays in an npz file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return {member.removesuffix(".npy") for member in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an npz file ({error})") from error


def read_npz(path: str | Path, names: set[str]) -> dict[str, np.ndarray]:
    """Return those of the arrays `names` that an npz file holds; object arrays, which are pickles,
    are refused."""
    present = names & npz_names(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in present}
    except Exception as error:  # on damaged bytes numpy and zipfile raise almost any type
        raise UserError(f"{path}: not a readable npz file ({error})") from error


def _to_float64(array: np.ndarray, name: str, path: str | Path) -> Tensor:
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UserError(f"{path}: {name} ({array.dtype}) must hold finite floating-point numbers")
    return torch.from_numpy(array.astype(np.float64))


def _read_about(array: np.ndarray, path: str | Path) -> dict[str, Any]:
    try:
        about = json.loads(str(array))
        height, width = map(int, about["size"])
        return {
            "pictures": str(about["pictures"]),
            "features": str(about["features"]),
            "count": int(about["count"]),
            "size": (height, width),
        }
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: the protocol inside is not readable ({error})") from error
