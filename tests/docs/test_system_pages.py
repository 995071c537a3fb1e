"""The pages of the systems have the same headings, leave nothing out that is exported or imported,
and name files that exist; every link of the documentation leads somewhere."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import NAMES, ROOT

import vistok
from vistok.generators import Generator
from vistok.heads.base import Head
from vistok.quantizers import Quantizer
from vistok.tokenizers import Tokenizer

SYSTEMS = {name: page for name, page in NAMES.items() if name.startswith("docs/systems/")}
HEADINGS = [
    "What it is",
    "Configs",
    "Commands",
    "Parity",
    "Numbers",
    "Pitfalls",
    "Differences from the official code",
]
BASES = (Generator, Head, Quantizer, Tokenizer)
FILE = re.compile(
    r"\b(?:configs|vistok|tests|train|benchmarks|assets)/[\w./{},-]+\.(?:yaml|py|png)"
)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")


def spelt_out(path: str) -> Iterator[str]:
    """Yield the paths that braces stand for, as a shell does."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        yield path
        return
    for choice in braces.group(1).split(","):
        yield from spelt_out(path[: braces.start()] + choice + path[braces.end() :])


def headings(text: str) -> list[str]:
    """Return the headings outside of code blocks, without their marks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", SYSTEMS)
def test_headings(page):
    assert headings(SYSTEMS[page].read_text())[1:] == HEADINGS


@pytest.mark.parametrize("page", SYSTEMS)
def test_files_exist(page):
    named = {path for match in FILE.findall(SYSTEMS[page].read_text()) for path in spelt_out(match)}
    assert named
    assert not [path for path in sorted(named) if not (ROOT / path).is_file()]


def test_every_exported_class_is_named():
    text = "\n".join(page.read_text() for page in SYSTEMS.values())
    exported = {name: getattr(vistok, name) for name in vistok.__all__}
    parts = [
        name
        for name, part in exported.items()
        if inspect.isclass(part) and issubclass(part, BASES) and part not in BASES
    ]
    assert len(parts) > 30
    assert not [name for name in parts if f"`{name}`" not in text]


def test_every_importer_is_shown():
    text = "\n".join(page.read_text() for page in SYSTEMS.values())
    commands = importlib.import_module("vistok.commands.import")
    importers = commands.IMPORTERS | commands.DIRECTORY_IMPORTERS
    assert not [name for name in importers if f"vistok import {name} " not in text]


def test_every_config_of_a_model_is_named():
    text = "\n".join(page.read_text() for page in SYSTEMS.values())
    named = {path for match in FILE.findall(text) for path in spelt_out(match)}
    configs = (ROOT / "configs").glob("[gt]*/*.yaml")
    assert not sorted({config.relative_to(ROOT).as_posix() for config in configs} - named)


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    for target, place in LINK.findall(NAMES[page].read_text()):
        file = (NAMES[page].parent / target).resolve() if target else NAMES[page]
        assert file.exists(), f"{page}: no {target}"
        if place:
            places = [anchor(heading) for heading in headings(Path(file).read_text())]
            assert place in places, f"{page}: {target} has no {place}"
