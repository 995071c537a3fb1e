"""Runs the real command files in this process, which spares each test seconds of imports."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(capfd, script: str, *args: object) -> tuple[int, str, str]:
    """Return (exit code, standard output, standard error) of `python SCRIPT ARGS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, args)])
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, *capfd.readouterr()
