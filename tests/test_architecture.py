"""The floors of the house: nothing imports upwards, and importing vistok is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import vistok

ROOT = Path(vistok.__file__).parent

# From the ground up; a module may import its own floor's packages where `beside` says so.
FLOORS = [
    {"errors", "files", "launch", "roofline", "tokens", "layers", "models"},
    {"quantizers", "heads", "decoding", "losses", "data", "metrics"},
    {"tokenizers", "generators"},
    {"checkpoints", "codec", "images", "pipelines", "text"},
    {"curves", "evaluation", "speed", "training"},
    {"compare", "demo"},
    {"cli", "commands", "options", "train"},
]
FORBIDDEN = {("tokenizers", "generators"), ("generators", "tokenizers")}
MODEL_FREE = {"decoding", "data", "metrics"}  # these know no model, not even the base


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """vistok's packages that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "vistok":
                names = [vistok._HOME.get(a.name, f"vistok.{a.name}") for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("vistok.")}
    return found


def test_nothing_imports_upwards():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "__init__.py":
            continue
        here = package(path)
        for there in imports(path) - {here}:
            if (
                floor[there] > floor[here]
                or (here, there) in FORBIDDEN
                or (here in MODEL_FREE and there == "models")
            ):
                wrong.append(f"{path.relative_to(ROOT)} imports vistok.{there}")
    assert wrong == []


def test_every_exported_name_exists():
    for name in vistok.__all__:
        assert getattr(vistok, name).__name__ in (name, name.lower())


def test_importing_vistok_imports_nothing_heavy():
    code = (
        "import sys, torch, time; t = time.perf_counter(); import vistok;"
        "assert time.perf_counter() - t < 0.5;"
        "assert not {'diffusers', 'transformers', 'accelerate', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
