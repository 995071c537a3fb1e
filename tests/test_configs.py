"""Every config is read by the script that it is for, as its user's command line reads it."""

import runpy
from pathlib import Path

import pytest
import torch
import yaml

from vistok.options import parser_of
from vistok.tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "train/tokenizer.py": ["tokenizers/*.yaml", "quickstart/tokenizer.yaml"],
    "train/generator.py": ["generators/*.yaml", "quickstart/generator.yaml"],
    "sample/evaluate.py": ["quickstart/fid.yaml", "quickstart/rfid.yaml", "quickstart/probe.yaml"],
}
FILES = {
    file: script
    for script, patterns in SCRIPTS.items()
    for pattern in patterns
    for file in sorted((ROOT / "configs").glob(pattern))
}


@pytest.fixture(scope="module")
def parsers():
    return {
        script: parser_of(runpy.run_path(str(ROOT / script))["main"], script) for script in SCRIPTS
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_config_is_read(parsers, file):
    options = parsers[FILES[file]].parse_args(["--config", str(file)])
    assert options.output.startswith("runs/")
    if "images" in options:
        assert options.images >= options.batch_size


def test_every_config_has_a_script():
    assert set(FILES) == set((ROOT / "configs").glob("*/*.yaml"))


def make(tokenizer: Tokenizer) -> None:
    """Take the part of a config that makes a model."""


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name == "tokenizers"], ids=lambda file: file.stem
)
def test_tokenizer_is_made_as_its_script_makes_it(file):
    parser = parser_of(make, "make")
    part = yaml.safe_load(file.read_text())["tokenizer"]
    with torch.device("meta"):
        made = parser.instantiate(parser.parse_object({"tokenizer": part})).tokenizer
    assert type(made).__name__ == part["class_path"]
