"""The benchmark of decoding."""

import pytest
from commands import run


def test_the_command_prints_a_row_for_each_order(capfd):
    options = "--dim 32 --depth 1 --num_heads 2 --side 4 --vocab_size 16 --batch 2 --repeats 1"
    code, out, _ = run(
        capfd, "benchmarks/decode.py", *options.split(), "--orders", "[raster, zipar(2)]"
    )
    header, _, *rows = [line.split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert code == 0 and "GB/s read" in out
    assert [row[:2] for row in rows] == [["| raster", "16"], ["| zipar(2)", "12"]]
    for row in rows:
        ms, per_second, per_pass, times = (float(cell.strip(" |")) for cell in row[4:])
        assert len(row) == len(header)
        assert ms * per_second == pytest.approx(1000, rel=0.01)
        assert per_pass * int(row[1]) == pytest.approx(2 * ms, rel=0.02)
        assert times > 1


def test_an_order_that_does_not_fit_ends_in_one_line(capfd):
    code, _, err = run(capfd, "benchmarks/decode.py", "--orders", "[par(4)]", "--side", 5)
    assert code == 2 and "order 'par(4)': " in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_compiled_loop_has_columns_and_the_same_tokens(capfd):
    options = "--dim 32 --depth 1 --num_heads 2 --side 2 --vocab_size 16 --batch 2 --repeats 1"
    more = ("--orders", "[raster]", "--compile", "true")
    code, out, _ = run(capfd, "benchmarks/decode.py", *options.split(), *more)
    assert code == 0 and "compiled: ms per image" in out and "differ" not in out
