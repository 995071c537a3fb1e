"""The wheel holds what the checkout does, and works where there is no checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PACKED = ("vistok", "train")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel, built from a copy, in which no earlier build has left anything."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKED, "tests", "benchmarks", "sample"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", built)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--no-deps", "--target", folder)
    return folder


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_holds_every_module_and_no_more(wheel):
    held = {name for name in ZipFile(wheel).namelist() if name.endswith(".py")}
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "vistok").rglob("*.py")}
    loops = {f"vistok/{path.relative_to(ROOT)}" for path in (ROOT / "train").glob("*.py")}
    assert held == own | loops


def test_it_holds_the_files_that_modules_read(wheel):
    held = {name for name in ZipFile(wheel).namelist() if name.startswith("vistok/")}
    listed = subprocess.run(
        ["git", "ls-files", "vistok"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name for name in listed if (ROOT / name).is_file()} <= held


def test_commands_run_from_it(installed, tmp_path):
    shutil.copytree(ROOT / "assets" / "emoji", tmp_path / "emoji")

    def python(*arguments: str) -> str:
        """Return what a command prints, run where the checkout is not seen."""
        environment = {**os.environ, "PYTHONPATH": str(installed), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = python("-c", "import vistok; print(vistok.__file__)").strip()
    assert Path(where).is_relative_to(installed)
    assert "rate-distortion" in python("-m", "vistok.cli", "--help")
    assert "LlamaGen" in python("-m", "vistok.cli", "info", "emoji")
    sampled = ("--checkpoint", "emoji", "--output", "samples", "--count", "2")
    assert "2 images" in python("-m", "vistok.cli", "generate", *sampled)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2
    assert "--ema_decay" in python("-m", "vistok.train.tokenizer", "--help")
