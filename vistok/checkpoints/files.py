"""Weight files of other projects, read without running what they contain.

Pickles go through PyTorch's weights-only reader: tensors, numbers, strings and containers of them.
Beside these only `argparse.Namespace` passes, in which training scripts keep their options.
"""

import argparse
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vistok.errors import CheckpointError

Weights = dict[str, Tensor]

ENTRIES = ("model", "module", "state_dict", "ema")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
UNSAFE = re.compile(r"GLOBAL (\S+)")  # how PyTorch names what it refuses to import


def read_weights(path: str | Path, entries: Sequence[str] = ENTRIES) -> Weights:
    """Return the tensors of a file by name, on the CPU, memory-mapped where the format allows.

    A file holds its tensors either directly or, among other things, under one of `entries`, of
    which the first present counts: `("ema", "model")` prefers averaged weights, `("ema",)` takes no
    others; `trainer/ema` is an entry inside another. Raises `CheckpointError` for a file that is
    missing, broken, of another kind, or that asks for more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected published weights")
    content = _read(path)
    found = (_inside(content, entry) for entry in entries)
    content = next((entry for entry in found if entry is not None), content)
    if not (isinstance(content, dict) and content and _are_tensors(content)):
        found = list(map(str, content)) if isinstance(content, dict) else [type(content).__name__]
        raise CheckpointError(
            f"{path}: holds {', '.join(found[:5]) or 'nothing'}; expected tensors by name, alone "
            f"or under {', '.join(entries)}"
        )
    return {name: tensor.detach() for name, tensor in content.items()}


def rename(weights: Weights, rules: Iterable[tuple[str, str | None]], where: str) -> Weights:
    """Return the tensors under other names. Each rule is a regular expression and what takes the
    place of its matches, or None to leave the tensor out; all apply in turn. Raises
    `CheckpointError`, about `where`, if two tensors come to one name."""
    rules = list(rules)
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in rules:
            if replacement is not None:
                name = re.sub(pattern, replacement, name)
            elif re.search(pattern, name):
                break
        else:
            if name in renamed:
                raise CheckpointError(f"{where}: two tensors for {name}; expected one")
            renamed[name] = tensor
    return renamed


def load(model: nn.Module, weights: Weights, where: str) -> None:
    """Copy `weights` into `model`, whose dtype stays. Raises `CheckpointError`, about `where`,
    unless names and shapes are exactly the model's."""
    expected = model.state_dict()
    common = expected.keys() & weights.keys()
    problems = {
        "missing": expected.keys() - common,
        "unexpected": weights.keys() - common,
        "mismatched": {name for name in common if expected[name].shape != weights[name].shape},
    }
    for problem, names in problems.items():
        if names:
            raise CheckpointError(
                f"{where}: {len(names)} {problem} tensor(s) for {type(model).__name__}: "
                f"{', '.join(sorted(names)[:3])}"
            )
    model.load_state_dict(weights)


def _read(path: Path) -> Any:
    if path.suffix not in (*PICKLES, ".safetensors"):
        raise CheckpointError(
            f"{path}: unknown kind of file; expected one of {', '.join(PICKLES)}, .safetensors"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
            mmap = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # unpickling raises whatever a broken stream leads to
        unsafe = UNSAFE.search(str(error))
        raise CheckpointError(
            f"{path}: asks for {unsafe.group(1)}; only tensors and options are read, since "
            "anything else could run code"
            if unsafe
            else f"{path}: not a readable weight file (truncated or of another kind)"
        ) from error


def _inside(content: Any, entry: str) -> dict | None:
    for name in entry.split("/"):
        content = content.get(name) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else None


def _are_tensors(content: dict[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
