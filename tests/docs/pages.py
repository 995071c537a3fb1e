"""The code blocks of README.md and docs/, and a fresh copy of the checkout to run them in."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = {page.relative_to(ROOT).as_posix(): page for page in PAGES}

# What a reader types and the run leaves out, each with its reason.
EXCLUDED = {
    "make demo": "makes an environment by pip; .ci/run runs it",
    "make test": "is what runs this",
    "make test-slow": "is what runs this",
    "python3 -m venv": "makes an environment",
    "source .venv/bin/activate": "the environment of the tests is active",
    "pip install": "the environment of the tests has all extras that blocks need",
}
EACH = "import runpy, sys; [runpy.run_path(path, run_name='__main__') for path in sys.argv[1:]]"
RUN = {"bash": ["bash", "-euo", "pipefail"], "python": [sys.executable, "-c", EACH]}


@dataclass(frozen=True)
class Block:
    """A fenced block: what it is tagged as, its text, and the line of the page it begins in."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """Where the page has its reader save the block: its first line is `# name.py`."""
        named = re.match(r"# ([\w/]+\.(?:py|yaml))\n", self.text)
        return named and named.group(1)

    @property
    def script(self) -> str:
        """The text without what is excluded; lines have the numbers that they have in the page."""
        kept = [
            "" if line.strip().startswith(tuple(EXCLUDED)) else line
            for line in self.text.split("\n")
        ]
        return "\n" * (self.line - 1) + "\n".join(kept)

    def command_lines(self) -> Iterator[tuple[int, list[str]]]:
        """Yield (line of the page, words) of each command, lines continued by a backslash or inside
        quotes joined."""
        pending, begin = "", 0
        for number, line in enumerate(self.text.split("\n"), self.line):
            begin = begin if pending else number
            pending += line
            if pending.endswith("\\"):
                pending = pending[:-1]
                continue
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # a quote is open
                pending += "\n"
                continue
            if words:
                yield begin, words
            pending = ""
        if pending:
            raise ValueError(f"{self.page}:{begin}: a quote is not closed")


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page in their order."""
    found, opened = [], None
    for number, line in enumerate(NAMES[page].read_text().split("\n"), 1):
        fence = re.match(r"\s*```(\w*)", line)
        if opened is None and fence:
            opened, language, lines = number + 1, fence.group(1), []
        elif opened is not None and fence:
            found.append(Block(page, opened, language, "\n".join(lines) + "\n"))
            opened = None
        elif opened is not None:
            lines.append(line)
    if opened is not None:
        raise ValueError(f"{page}:{opened - 1}: a code block is not closed")
    return found


def copy_checkout(to: Path) -> None:
    """Copy what git holds or would hold, as it lies in the working tree."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)


def sessions(found: list[Block]) -> list[list[Block]]:
    """Group python blocks that follow each other, which one interpreter runs; modules and configs
    that are but saved stand between them."""
    groups = []
    for block in found:
        shared = groups and block.language == "python" == groups[-1][0].language
        groups[-1].append(block) if shared else groups.append([block])
    return groups


def save(found: list[Block], checkout: Path) -> list[Block]:
    """Save what a page has its reader save, and return the blocks to be run."""
    for block in found:
        if block.file:
            (checkout / block.file).write_text(block.text)
    return [block for block in found if block.language in RUN and not block.file]


def run(session: list[Block], checkout: Path, scratch: Path) -> tuple[int, str]:
    """Run a bash block or python blocks as printed in a copy of the checkout; return exit code and
    output, whose line numbers are those of the page."""
    scripts = []
    for block in session:
        scripts.append(scratch / f"{block.line}-{Path(block.page).name}")
        scripts[-1].write_text(block.script)
    trap = scratch / "trap"
    trap.write_text("""trap 'echo "line $LINENO: $BASH_COMMAND" >&2' ERR\n""")
    environment = {k: v for k, v in os.environ.items() if k != "VISTOK_PARITY"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "BASH_ENV": str(trap),
        "HOME": str(scratch),
        "HF_HOME": str(scratch / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    process = subprocess.Popen(
        [*RUN[session[0].language], *map(str, scripts)],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output
