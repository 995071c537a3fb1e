"""Every code block of README.md and docs/: bash and python blocks run as printed, in the order of
their page, in a fresh copy of the checkout; command lines of blocks that need published files or
several machines are read by their command's parser."""

import ast
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import check, command_of
from pages import NAMES, RUN, Block, blocks, copy_checkout, run

TAIL = 4000  # characters of output that a failure shows
EXECUTED = "docs/add-your-own.md"  # its examples run in the default suite


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy of the checkout that is gone afterwards, with all that blocks wrote."""
    folder = Path(tempfile.mkdtemp())
    copy_checkout(folder / "checkout")
    yield folder / "checkout"
    shutil.rmtree(folder)


def run_all(wanted: list[Block], checkout: Path, record_property) -> None:
    for block in wanted:
        begin = time.perf_counter()
        code, output = run(block, checkout, checkout.parent)
        record_property(str(block), f"{time.perf_counter() - begin:.1f} s")
        print(f"{block}: {time.perf_counter() - begin:.1f} s")
        if code:
            pytest.fail(f"{block}: exit code {code}\n{output[-TAIL:]}", pytrace=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", NAMES)
def test_blocks_run_as_printed(page, checkout, record_property):
    wanted = [block for block in blocks(page) if block.language in RUN]
    if not wanted:
        pytest.skip("no blocks to run")
    run_all(wanted, checkout, record_property)


@pytest.mark.skipif(EXECUTED not in NAMES, reason=f"there is no {EXECUTED}")
def test_examples_of_own_classes_run(checkout, record_property):
    wanted = [block for block in blocks(EXECUTED) if block.language == "python"]
    run_all(wanted, checkout, record_property)


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
