"""A run that was stopped and resumed is the run that was not, bit for bit."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import Squares, latest, quick, tiny_tokenizer, train_generator, train_tokenizer


def everything(output: Path) -> dict:
    """Return all that the newest checkpoint and the log hold, without timings."""
    checkpoint = latest(output)
    found = {path.name: load_file(path) for path in checkpoint.glob("*.safetensors")}
    found |= {path.name: torch.load(path, weights_only=True) for path in checkpoint.glob("*.pt")}
    found["progress"] = json.loads((checkpoint / "progress.json").read_text())
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    timings = {"images_per_second", "data_wait"}
    found["log"] = [{k: v for k, v in line.items() if k not in timings} for line in log]
    return found


def assert_identical(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_identical(*pair, f"{where}/{i}")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("uninterrupted")
    train_tokenizer(output)
    return everything(output)


@pytest.mark.parametrize(
    ("stops", "steps"),
    [
        ([9], [2]),  # in the first epoch, at the start of a step, before the adversary sets in
        ([14], [2]),  # within an accumulation window
        ([27], [4]),  # in the second epoch, in the middle of a log window
        ([24, 1, 15], [3, 4, 6]),  # again and again, once in the very next step
    ],
)
def test_tokenizer_resumes_exactly(tmp_path, uninterrupted, stops, steps):
    for stop, step in zip(stops, steps, strict=True):
        train_tokenizer(tmp_path, data=Squares(stop_after=stop), resume=True)
        assert latest(tmp_path).name == f"step-{step:08d}"
    train_tokenizer(tmp_path, resume=True)
    assert_identical(everything(tmp_path), uninterrupted)


def test_data_workers_change_nothing(tmp_path, uninterrupted):
    train_tokenizer(tmp_path, run=quick(num_workers=2))
    assert_identical(everything(tmp_path), uninterrupted)


def test_a_signal_to_all_processes_stops_cleanly(tmp_path, uninterrupted):
    class SignalsAll(Squares):
        def __getitem__(self, index):
            if len(self.read) == 24:
                for pid in (os.getpid(), os.getppid()):
                    os.kill(pid, signal.SIGTERM)
            return super().__getitem__(index)

    train_tokenizer(tmp_path, data=SignalsAll(), run=quick(num_workers=1))
    assert latest(tmp_path).name < "step-00000008"
    train_tokenizer(tmp_path, resume=True)
    assert_identical(everything(tmp_path), uninterrupted)


def test_validation_changes_nothing(tmp_path, uninterrupted):
    train_tokenizer(tmp_path, validation=Squares(), run=quick(validate_every=3))
    validated = everything(tmp_path)
    assert validated["progress"].pop("score") == pytest.approx(
        validated["log"][-1]["validation/psnr"]
    )
    for line in validated["log"]:
        del line["validation/mse"], line["validation/psnr"]
    expected = {**uninterrupted, "progress": dict(uninterrupted["progress"])}
    assert expected["progress"].pop("score") is None
    assert_identical(validated, expected)
    assert (tmp_path / "validation" / "step-00000006.png").stat().st_size > 0


def test_generator_resumes_exactly(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    train_generator(tmp_path / "whole", tmp_path / "tokenizer")
    for stop in (21, 13):
        train_generator(
            tmp_path / "parts",
            tmp_path / "tokenizer",
            data=Squares(stop_after=stop),
            resume=True,
        )
    assert latest(tmp_path / "parts").name == "step-00000005"
    train_generator(tmp_path / "parts", tmp_path / "tokenizer", resume=True)
    assert_identical(everything(tmp_path / "parts"), everything(tmp_path / "whole"))
