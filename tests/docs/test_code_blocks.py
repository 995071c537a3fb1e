"""Every code block of README.md and docs/: bash and python blocks run as printed, in the order of
their page, in a fresh copy of the checkout; command lines of blocks that need published files or
several machines are read by their command's parser."""

import ast
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import check, command_of
from pages import NAMES, RUN, Block, blocks, copy_checkout, run, save, sessions

TAIL = 4000  # characters of output that a failure shows
EXECUTED = "docs/add-your-own.md"  # its examples run in the default suite


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of the checkout that is gone afterwards, with all that blocks wrote."""
    folder = Path(tempfile.mkdtemp())
    copy_checkout(folder / "checkout")
    yield folder / "checkout"
    shutil.rmtree(folder)


def cpu_seconds() -> float:
    """Return what commands have used, which other load on the machine does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_all(found: list[Block], checkout: Path, record_property) -> None:
    for session in sessions(save(found, checkout)):
        began, cpu = time.perf_counter(), cpu_seconds()
        code, output = run(session, checkout, checkout.parent)
        spent = f"{time.perf_counter() - began:.0f} s, {cpu_seconds() - cpu:.0f} s of a CPU"
        record_property(str(session[0]), spent)
        print(f"{session[0]}: {spent}")
        if code:
            pytest.fail(f"{session[0]}: exit code {code}\n{output[-TAIL:]}", pytrace=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", NAMES)
def test_blocks_run_as_printed(page, checkout, record_property):
    found = blocks(page)
    if not any(block.language in RUN for block in found):
        pytest.skip("no blocks to run")
    run_all(found, checkout, record_property)


@pytest.mark.skipif(EXECUTED not in NAMES, reason=f"there is no {EXECUTED}")
def test_examples_of_own_classes_run(checkout, record_property):
    found = [block for block in blocks(EXECUTED) if block.language == "python"]
    run_all(found, checkout, record_property)


@pytest.mark.parametrize("page", NAMES)
def test_command_lines_are_read(page, monkeypatch, capsys):
    monkeypatch.chdir(NAMES["README.md"].parent)
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text, str(block))
        if block.language not in ("", "bash"):
            continue
        for line, words in block.command_lines():
            command = command_of(words)
            try:
                if command:
                    check(command)
            except (SystemExit, ValueError) as error:
                why = capsys.readouterr().err or error
                pytest.fail(f"{page}:{line}: {' '.join(words)}\n{why}", pytrace=False)
