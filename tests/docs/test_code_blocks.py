"""Every code block of README.md and docs/: bash and python blocks run as printed, in the order of
their page, in a fresh copy of the checkout; command lines of blocks that need published files or
several machines are read by their command's parser."""

import ast
import fcntl
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_lines import check, command_of
from pages import NAMES, ROOT, RUN, Block, blocks, copy_checkout, run, save, sessions

from vistok.decoding import orders
from vistok.options import IMPORTS, import_own

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


@contextmanager
def default_port(session: list[Block]) -> Iterator[None]:
    """Let blocks that start several processes, which meet on the port that Accelerate takes by
    default, do so one after another, whichever process tests them."""
    if not any("--num_processes" in block.text for block in session):
        yield
        return
    with Path(tempfile.gettempdir(), "vistok-default-port.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_all(found: list[Block], checkout: Path, record_property) -> None:
    for session in sessions(save(found, checkout)):
        began, cpu = time.perf_counter(), cpu_seconds()
        with default_port(session):
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


@pytest.fixture
def own(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder of modules that can be imported, and are forgotten afterwards."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(orders, "ORDERS", dict(orders.ORDERS))
    yield tmp_path
    for module in tmp_path.glob("*.py"):
        sys.modules.pop(module.stem, None)


@pytest.mark.parametrize("page", NAMES)
def test_command_lines_are_read(page, own, monkeypatch, capsys):
    found = blocks(page)
    save(found, own)
    for block in found:
        if block.language == "python":
            ast.parse(block.text, str(block))
        if block.language not in ("", "bash"):
            continue
        for line, words in block.command_lines():
            for name, _, value in (word.partition("=") for word in words if words[0] == "export"):
                if name == IMPORTS:
                    monkeypatch.setenv(name, value)
                    import_own()
            words = [str(own / word) if (own / word).is_file() else word for word in words]
            try:
                if command := command_of(words):
                    check(command)
            except (SystemExit, ValueError) as error:
                why = capsys.readouterr().err or error
                pytest.fail(f"{page}:{line}: {' '.join(words)}\n{why}", pytrace=False)
