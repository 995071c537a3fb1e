"""Recorded runs of official implementations, and the book-keeping of what was compared."""

import fnmatch
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = os.environ.get("VISTOK_PARITY")


class Case:
    """One folder of numbers: `config`, `inputs`, `weights`, and outputs to be compared."""

    def __init__(self, folder: Path):
        self.description = json.loads((folder / "case.json").read_text())
        self.config = self.description["config"]
        tensors = load_file(folder / "tensors.safetensors")
        self.inputs = {k.removeprefix("in."): t for k, t in tensors.items() if k.startswith("in.")}
        self.expected = {
            k.removeprefix("out."): t for k, t in tensors.items() if k.startswith("out.")
        }
        self.weights = load_file(folder / "weights.safetensors")
        self.left = set(self.expected)

    def compare(self, name: str, ours: Tensor, part=None, kind: str | None = None) -> None:
        """Hold `ours` against the output `name`, if the case has it: integers exactly. `part` picks
        what we compute of an output that holds more; `kind` names a tolerance of its own, which
        counts where the case has it."""
        if name not in self.expected:
            return
        self.left.discard(name)
        theirs = self.expected[name]
        theirs = part(theirs) if part else theirs
        tolerance = self.description["tolerance"]
        tolerance = tolerance.get(kind, tolerance)
        if not theirs.is_floating_point():
            tolerance = {"atol": 0, "rtol": 0}
        torch.testing.assert_close(
            ours.detach().to(theirs.dtype).reshape(theirs.shape),
            theirs,
            atol=tolerance["atol"],
            rtol=tolerance["rtol"],
            msg=lambda m: f"{name}: {m}",
        )

    def finish(self, uncompared: dict[str, str]) -> None:
        """Fail over an output that was neither compared nor matches a pattern of `uncompared`."""
        left = {n for n in self.left if not any(fnmatch.fnmatch(n, p) for p in uncompared)}
        assert not left, f"outputs without comparison: {sorted(left)}"


def cases(system: str, wanted=lambda description: True):
    """Parametrize a test by the folders of a system."""
    if not FOLDER:
        skip = pytest.mark.skip(reason="VISTOK_PARITY names no folder of numbers")
        return [pytest.param(None, marks=skip, id="none")]
    paths = sorted(Path(FOLDER).glob(f"{system}/*/case.json"))
    return [
        pytest.param(p.parent, id=p.parent.name) for p in paths if wanted(json.loads(p.read_text()))
    ]
