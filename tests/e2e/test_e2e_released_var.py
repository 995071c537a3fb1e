"""The benchmark beside the released structure of VAR, which itself checks that both sides agree."""

import pytest
from commands import ROOT, run

TINY = {"width": 32, "depth": 2, "num_heads": 2, "channels": 8}


def test_the_command_prints_a_row_for_each_batch_and_result(capfd, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as when it is run as a script
    sizes = [part for name, value in TINY.items() for part in (f"--sizes.{name}", value)]
    more = ("--scales", "[1, 2, 3]", "--batches", "[1, 3]", "--repeats", 1)
    code, out, err = run(capfd, "benchmarks/released_var.py", *sizes, *more)
    assert code == 0, err
    header, _, *rows = [line.strip("| ").split(" | ") for line in out.splitlines() if "|" in line]
    assert [row[:2] for row in rows] == [[b, r] for b in "13" for r in ("tokens", "images")]
    for row in rows:
        released, ours, times, difference = map(float, row[2:])
        assert len(row) == len(header)
        assert times == pytest.approx(released / ours, rel=0.3)
        assert 0 <= difference <= 1e-3
