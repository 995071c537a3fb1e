"""The benchmark beside the released structures, which itself checks that both sides agree."""

import pytest
from commands import run

TINY = {"width": 32, "depth": 2, "num_heads": 2, "num_tokens": 9, "batches": "[1, 3]"}
ROWS = {
    "titok": (("TwoStageTiTok", "encode"), ("TwoStageTiTok", "decode"), ("TiTok", "decode")),
    "rar": (("RAR", ""),),
    "maskgit": (("MaskGIT", ""),),
}


@pytest.mark.parametrize("system", ROWS)
def test_the_command_prints_a_row_for_each_batch(capfd, system):
    sizes = [part for name, value in TINY.items() for part in (f"--{system}.{name}", value)]
    more = ("--systems", f"[{system}]", "--image_size", 32, "--repeats", 1)
    code, out, err = run(capfd, "benchmarks/released.py", *sizes, *more)
    assert code == 0, err
    header, _, *rows = [line.strip("| ").split(" | ") for line in out.splitlines() if "|" in line]
    names = [
        f"{name}, 2 x 32, 9 tokens, batch {batch}" + (f": {method}" if method else "")
        for batch in (1, 3)
        for name, method in ROWS[system]
    ]
    assert [row[0] for row in rows] == names
    for row in rows:
        released, ours, times, difference = map(float, row[1:])
        assert len(row) == len(header)
        assert times == pytest.approx(released / ours, rel=0.1)
        assert 0 <= difference <= 1e-3


def test_sizes_that_do_not_fit_end_in_one_line(capfd):
    wrong = ("--systems", "[rar]", "--rar.num_heads", 7)
    code, _, err = run(capfd, "benchmarks/released.py", *wrong)
    assert code == 2 and err.startswith("error: RAR: ") and err.count("\n") == 1
