"""Results, and the protocols that give them a meaning: of different ones, they do not compare."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vistok
from vistok.errors import UserError, suggestion
from vistok.files import replaced


@dataclass(frozen=True)
class Protocol:
    """How scores were taken. Two results are comparable where all of it is equal.

    Args:
        task: `reconstruction`, `generation`, `pictures` or `probe`
        count: images scored
        pictures: their size and crop; for reconstruction also which
        labels: which classes were generated
        reference: the pictures compared with, their count and crop
        features: feature network and the hash of its weights
        estimators: free choices of the metrics (splits, subsets, neighbours)
        rounding: how images became bytes before they were scored
        precision: of the feature network
    """

    task: str
    count: int
    pictures: str
    labels: str
    reference: str
    features: str
    estimators: str
    rounding: str = "nearest of 256 levels"
    precision: str = "float32"


def _versions() -> dict[str, str]:
    others = {name: version(name) for name in ("torch", "torch-fidelity", "pillow")}
    return {"vistok": vistok.__version__, **others}


@dataclass(frozen=True)
class Result:
    """Scores, the protocol that gives them their meaning, and what was scored: `subject` holds
    paths, fingerprints, seed and settings; `notes` what a reader must know of the numbers."""

    scores: dict[str, float]
    protocol: Protocol
    subject: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=_versions)

    def table(self, changes: Mapping[str, float] | None = None) -> str:
        """Return the scores, with their `changes` to another result, above protocol and notes.
        Scores named `row/column` are laid out as such."""
        lines, cells = [], {}
        for name, value in self.scores.items():
            change = f" ({changes[name]:+.4g})" if changes and name in changes else ""
            row, _, column = name.partition("/")
            if column:
                cells[row, column] = f"{value:.4g}{change}"
            else:
                lines.append(f"{name:20} {value:10.4g} {change}".rstrip())
        lines += _grid(cells) if cells else []
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"{name:20} {value}" for name, value in asdict(self.protocol).items()]
        return "\n".join(lines)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Result":
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**record, "protocol": Protocol(**record["protocol"])})


def _grid(cells: Mapping[tuple[str, str], str]) -> list[str]:
    """Return the lines of a table of cells by (row, column), either in the order they come in."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    table = [["", *columns], *([row, *(cells.get((row, c), "") for c in columns)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([row[0].ljust(20), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    return [line.rstrip() for line in lines]


def require_same_protocol(a: Protocol, b: Protocol) -> None:
    """Raise `UserError`, naming the fields that differ, unless two protocols are equal."""
    pairs = [(f.name, getattr(a, f.name), getattr(b, f.name)) for f in fields(Protocol)]
    differing = [
        f"{name} ({left!r} against {right!r})" for name, left, right in pairs if left != right
    ]
    if differing:
        raise UserError(f"results of different protocols do not compare: {'; '.join(differing)}")


def compare(a: Result, b: Result) -> dict[str, float]:
    """Return by how much each shared score of `b` exceeds that of `a`; raises `UserError` unless
    both were taken by the same protocol."""
    require_same_protocol(a.protocol, b.protocol)
    return {name: b.scores[name] - a.scores[name] for name in a.scores if name in b.scores}


def read_results(path: str | Path) -> dict[str, Result]:
    """Return the results of a file by name; none where there is no file."""
    if not Path(path).exists():
        return {}
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: Result.from_dict(record) for name, record in records.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a file of scores ({error}); choose another") from error


def find_result(results: Mapping[str, Result], name: str, where: str | Path) -> Result:
    """Return one of the results of the file `where`."""
    if name not in results:
        known = ", ".join(results) or "no results"
        raise UserError(f"{where}: no result '{name}' among {known}{suggestion(name, results)}")
    return results[name]


def write_result(path: str | Path, name: str, result: Result) -> None:
    """Put a result under its name among those that a file already holds."""
    records = {key: asdict(value) for key, value in read_results(path).items()}
    records[name] = asdict(result)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replaced(Path(path)) as aside:
        aside.write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
