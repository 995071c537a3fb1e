"""Two processes train as one. They are started once, for all tests of this file."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from vistok import Generator

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "training"))

from tiny_runs import Squares, train_plain  # noqa: E402 - found through the line above


def launch(*arguments: str) -> subprocess.Popen:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    worker = str(HERE / "training_worker.py")
    return subprocess.Popen(
        [*command, "--main_process_port", port, worker, *arguments],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_alone(output: Path, data: Squares) -> None:
    """Run in this process, as if in one of its own."""
    train_plain(output, data)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two-processes")
    patch = pytest.MonkeyPatch()
    patch.setattr("vistok.options.resolved_config", dict)
    reads = {"whole": Squares(), "first part": Squares(stop_after=10), "third part": Squares()}
    train_alone(out / "whole", reads["whole"])
    train_alone(out / "parts", reads["first part"])
    launcher = launch(str(out))
    _, messages = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, messages
    train_alone(out / "parts", reads["third part"])
    patch.undo()
    for name, data in reads.items():
        (out / f"{name}-0.json").write_text(json.dumps({"read": data.read}))
    return out


def result(out: Path, name: str, rank: int) -> dict:
    return json.loads((out / f"{name}-{rank}.json").read_text())


def test_processes_hold_the_same_models(out):
    one, other = (result(out, "replicas", rank) for rank in (0, 1))
    assert one["held"] == other["held"]
    assert one["random"] != other["random"]


def test_another_number_of_processes_keeps_the_samples_of_each_step(out):
    whole = result(out, "whole", 0)["read"]
    assert result(out, "first part", 0)["read"] == whole[:16]
    assert result(out, "third part", 0)["read"] == whole[32:]
    halves = [result(out, "second part", rank)["read"] for rank in (0, 1)]
    for step in (0, 1):
        seen = [index for half in halves for index in half[4 * step : 4 * step + 4]]
        assert sorted(seen) == sorted(whole[16 + 8 * step : 24 + 8 * step])


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_another_number_of_processes_keeps_the_losses(out):
    whole, parts = read_log(out / "whole"), read_log(out / "parts")
    assert [line["step"] for line in parts] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(whole, parts, strict=True):
        for name in ("loss", "grad_norm", "codebook_perplexity"):
            assert other[name] == pytest.approx(one[name], rel=1e-5)


def test_a_non_finite_loss_on_one_is_skipped_on_both(out):
    one, other = (result(out, "skip", rank) for rank in (0, 1))
    assert one["error"] is None and other["error"] is None
    assert one["weights"] == other["weights"]
    record = json.loads((out / "skip" / "non-finite" / "step-00000003.json").read_text())
    assert [terms["loss"] == "nan" for terms in record["terms_by_process"]] == [False, True]
    assert len(record["samples"]) == 8


def test_a_non_finite_loss_on_one_stops_both(out):
    one, other = (result(out, "stop", rank) for rank in (0, 1))
    assert "step 3: the loss or its gradient is not finite" in one["error"]
    assert other["error"] == "SystemExit(2)"
    assert max(one["seconds"], other["seconds"]) < 30


def test_a_failed_save_on_one_ends_both(out):
    one, other = (result(out, "failed save", rank) for rank in (0, 1))
    assert one["error"] == "SystemExit(2)"
    assert "No space left" in other["error"]
    assert [p.name for p in (out / "failed" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_sharded_model_learns_what_a_replicated_one_does(out):
    replicated, sharded = (read_log(out / "sharded" / name) for name in ("replicated", "sharded"))
    for one, other in zip(replicated, sharded, strict=True):
        for name in {"loss", "grad_norm", "validation/loss"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-5)


def test_a_sharded_run_resumes_exactly(out):
    whole, parts = (out / "sharded" / name for name in ("sharded", "parts"))
    losses = [[line["loss"] for line in read_log(run)] for run in (whole, parts)]
    assert losses[0] == losses[1]
    models = [Generator.from_pretrained(run) for run in (whole, parts)]
    assert models[0].fingerprint() == models[1].fingerprint()


@pytest.mark.slow
def test_a_killed_process_ends_the_other(tmp_path):
    launcher = launch(str(tmp_path), "killed")
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert not (tmp_path / "killed-0.json").exists()


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_ends_the_run(tmp_path):
    launcher = launch(str(tmp_path), "long")
    wait_for((tmp_path / "long" / "log.jsonl").exists)
    launcher.terminate()
    launcher.communicate(timeout=60)  # until all that write to its pipe have ended
    step = read_log(tmp_path / "long")[-1]["step"]
    assert (tmp_path / "long" / "checkpoints" / f"step-{step:08d}").is_dir()


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
