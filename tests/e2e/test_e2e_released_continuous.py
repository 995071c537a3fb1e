"""The benchmark beside the released structures of MAR and xAR, which itself checks that both sides
give the same tokens, and that of annealed steps."""

import pytest
from commands import run

TINY = "width: 32, depth: 2, num_heads: 2"
SIZES = {
    "mar": f"{TINY}, side: 4, head_width: 32, head_depth: 2, passes: 4",
    "xar": f"{TINY}, side: 8, cell: 4",
}
NAMES = {"mar": "MAR 4 x 32, head 2 x 32, 4 passes", "xar": "xAR 4 x 32, 4 cells of 4x4"}
OTHER = {"mar": "xar", "xar": "mar"}
ROWS = ((3, "constant(5)"), (1, "linear(6,3)"))  # images at once, and the steps of each pass


def table(out: str) -> list[list[str]]:
    """Return the cells of the printed rows, which are as many as those of the header."""
    header, _, *rows = [line.strip("| ").split(" | ") for line in out.splitlines() if "|" in line]
    assert {len(row) for row in rows} == {len(header)}
    return rows


@pytest.mark.parametrize("system", SIZES)
def test_both_sides_give_the_same_tokens(capfd, system):
    sizes = [f"{{{SIZES[system]}, batch: {batch}, steps: '{steps}'}}" for batch, steps in ROWS]
    options = (f"--{system}", f"[{', '.join(sizes)}]", f"--{OTHER[system]}", "[]", "--repeats", 1)
    code, out, err = run(capfd, "benchmarks/released_continuous.py", *options)
    assert code == 0, err
    rows = table(out)
    assert [row[:3] for row in rows] == [[NAMES[system], str(n), steps] for n, steps in ROWS]
    for row in rows:
        released, ours, times, difference = map(float, row[3:])
        assert times == pytest.approx(released / ours, rel=0.1)
        assert 0 <= difference <= 1e-3


def test_sizes_that_do_not_fit_end_in_one_line(capfd):
    wrong = ("--mar", "[]", "--xar", "[{side: 8, cell: 3}]")
    code, _, err = run(capfd, "benchmarks/released_continuous.py", *wrong)
    assert code == 2 and err.startswith("error: order 'cells(3)'") and err.count("\n") == 1


def test_annealed_steps_take_their_share_of_calls(capfd):
    sizes = ("--sizes", f"{{{TINY}, side: 8, batches: [2]}}", "--heads", "[{width: 32, depth: 1}]")
    steps = ("--passes", 3, "--mar", "linear(8,4)", "--cell", 4, "--xar", "linear(9,3)")
    code, out, err = run(capfd, "benchmarks/annealing.py", *sizes, *steps, "--repeats", 1)
    assert code == 0, err
    mar, xar = table(out)
    assert mar[:3] == ["MAR, head 1 x 32", "2", "linear(8,4)"]
    assert xar[:3] == ["xAR", "2", "linear(9,3)"]
    # Of 64 tokens the passes of MAR decode 9, 23 and 32, in 8, 6 and 4 steps instead of 8.
    assert [float(share) for share in mar[3:5]] == [0.75, round((72 + 138 + 128) / 512, 3)]
    # The cells of xAR take 9, 7, 5 and 3 steps instead of 9, the first without a null half.
    shares = [round(24 / 36, 3), round((9 + 2 * 15) / (9 + 2 * 27), 3)]
    assert [float(share) for share in xar[3:5]] == shares
    for row in (mar, xar):
        assert all(float(time) > 0 for time in row[5:])
