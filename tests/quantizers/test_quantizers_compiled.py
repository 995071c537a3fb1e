"""Compiled quantizers do what eager ones do, whole graphs and all; see `compiled_worker`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from family import QUANTIZERS

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def differences() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(HERE / "compiled_worker.py")],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_compiled_equals_eager(differences, name):
    assert differences[name] == ""
