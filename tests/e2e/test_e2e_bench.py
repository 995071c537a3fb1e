"""The speed of a checkpoint by the command."""

import csv
import json

import pytest
from commands import ROOT, run

EMOJI = ROOT / "assets" / "emoji"
FAST = ("--repeats", 1, "--threads", 1)


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    """Rates stand for those of the device, which take their time to measure."""
    from vistok.roofline import Rates

    monkeypatch.setattr("vistok.speed.measured_rates", lambda device, dtype: Rates(2e10, 2e12))


def bench(capfd, *options: object) -> tuple[int, str, str]:
    return run(capfd, "vistok/cli.py", "bench", *options)


def table_of(out: str) -> list[list[str]]:
    lines = (line for line in out.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_row_for_each_plan_and_batch_size(capfd, tmp_path):
    plans = ("--plans", '["zipar(2)", "zipar(1)"]', "--batch_sizes", "1,2")
    code, out, err = bench(capfd, EMOJI, *plans, *FAST, "-o", tmp_path / "speed.json")
    assert code == 0, err
    header, _, *rows = table_of(out)
    expected = [("zipar(2)", "28"), ("zipar(2)", "28"), ("zipar(1)", "22"), ("zipar(1)", "22")]
    assert [(row[0], row[2]) for row in rows] == expected
    assert [row[1] for row in rows] == ["1", "2", "1", "2"]
    assert "20.0 GB/s read, 2000 GFLOP/s" in out and "medians of 1 rounds" in out
    kept = json.loads((tmp_path / "speed.json").read_text())
    assert kept["threads"] == 1 and kept["decoding"]["guidance"] == "constant(1.5)"
    for cells, row in zip(rows, kept["rows"], strict=True):
        assert list(row) == header and cells[9] == row["set by"] == "reads"
        assert row["network calls"] == row["passes"] and row["tokens x calls"] == 64
        assert row["ms per pass"] * row["passes"] == pytest.approx(
            row["ms per image"] * row["batch"]
        )
        assert row["images/s"] * row["ms per image"] == pytest.approx(1000)
        together = row["ms per image"] + row["decoder, ms per image"]
        assert row["images/s with decoder"] * together == pytest.approx(1000)
        assert row["times the floor"] * row["floor, ms per image"] == pytest.approx(
            row["ms per image"]
        )
    floors = [row["floor, ms per image"] for row in kept["rows"]]
    assert floors[0] > floors[2] and floors[1] > floors[3]


def test_a_tokenizer_alone_as_a_table_of_numbers(capfd, tmp_path):
    code, out, err = bench(
        capfd, EMOJI / "tokenizer", "--batch_sizes", "[1, 2]", *FAST, "-o", tmp_path / "speed.csv"
    )
    assert code == 0, err
    header, _, *rows = table_of(out)
    assert header[:2] == ["batch", "encoder, ms per image"] and len(rows) == 2
    with (tmp_path / "speed.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert [row["batch"] for row in kept] == ["1", "2"] and list(kept[0]) == header


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--plans", '["nar"]'), "LlamaGen"),
        (("--batch_sizes", "4,0"), "batch sizes 4, 0: each must be at least 1"),
        (("--batch_sizes", "many"), "--batch_sizes many: expected numbers, as 1,16"),
        (("--repeats", 0), "repeats 0 must be at least 1"),
        (("--threads", 0), "--threads 0 must be at least 1"),
        (("--output", "speed.txt"), "--output speed.txt: must end in .json or .csv"),
        (("--plan", "raster", "--plans", '["raster"]'), "give either --plan or --plans"),
    ],
)
def test_a_mistake_ends_in_one_line(capfd, options, reason):
    code, out, err = bench(capfd, EMOJI, *options)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {reason}")
