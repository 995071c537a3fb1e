"""vistok compare: from nothing to the report, and on from there."""

import csv
import subprocess

import pytest
import yaml
from commands import run
from PIL import Image

EMOJI = {"class_path": "Emoji", "init_args": {"split": "held-out"}}


@pytest.fixture
def spec(configs, tmp_path):
    """A comparison of a trained pair, decoded in two ways, and the file that it is written to."""
    comparison = {
        "title": "Tiny",
        "data": EMOJI,
        "held_out": EMOJI,
        "budget": {"tokenizer_images": 32, "generator_images": 32},
        "tokenizers": {"grid": {"config": str(configs / "tokenizer.yaml")}},
        "generators": {
            "raster": {
                "tokenizer": "grid",
                "config": str(configs / "generator.yaml"),
                "options": {"batch_size": 16},
            }
        },
        "rows": {
            "LlamaGen": {"generator": "raster"},
            "ZipAR": {"generator": "raster", "decoding": {"plan": "zipar(2)"}, "note": "a window"},
        },
        "count": 18,
        "timed_batch": 3,
        "timed_rounds": 1,
        "features": "random",
    }
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(comparison))
    return comparison, file


@pytest.mark.slow
def test_a_comparison_is_made_kept_and_grown(capfd, spec, tmp_path, monkeypatch):
    comparison, file = spec
    folder = tmp_path / "out"
    code, out, err = run(capfd, "vistok/cli.py", "compare", file, "-o", folder)
    assert code == 0, err
    assert f"written to {folder / 'report.html'}" in out
    with (folder / "report.csv").open(newline="") as table:
        lines = {line["system"]: line for line in csv.DictReader(table)}
    assert set(lines) == {"LlamaGen", "ZipAR"}
    assert int(lines["LlamaGen"]["passes"]) == 16 > int(lines["ZipAR"]["passes"])
    assert lines["LlamaGen"]["rfid"] == lines["ZipAR"]["rfid"]  # of one tokenizer
    assert all(float(line[key]) > 0 for line in lines.values() for key in ("fid", "psnr"))
    samples = Image.open(folder / "pictures" / "samples.png")
    assert samples.height > 2 * 48 and len(samples.getcolors(1 << 24)) > 10

    comparison["rows"]["another"] = {"generator": "raster", "decoding": {"guidance": "3"}}
    file.write_text(yaml.safe_dump(comparison))
    started, really = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **k: started.append(command) or really(command, **k)
    )
    code, _, err = run(capfd, "vistok/cli.py", "compare", file, "-o", folder)
    assert code == 0, err
    assert len(started) == 1 and "evaluate" in started[0], "all else was there"
    assert "another" in (folder / "report.csv").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"a": {"generator": "none"}}}, "row a: no 'none' among raster"),
        ({"rowz": 5}, "rowz"),
        (
            {"generators": {"raster": {"tokenizer": "grid", "config": "nowhere.yaml"}}},
            "nowhere.yaml",
        ),
        (
            {"rows": {"a": {"generator": "raster", "decoding": {"plan": "zopar(2)"}}}},
            "did you mean 'zipar'",
        ),
    ],
)
def test_a_mistake_in_a_spec_is_one_line_before_any_work(capfd, spec, tmp_path, change, message):
    comparison, file = spec
    file.write_text(yaml.safe_dump(comparison | change))
    code, _, err = run(capfd, "vistok/cli.py", "compare", file, "-o", tmp_path / "out")
    assert code == 2 and message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
