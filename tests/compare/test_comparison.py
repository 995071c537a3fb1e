"""What a comparison does, in which order, and what it does not do again."""

import json
import subprocess
from dataclasses import replace

import pytest

from vistok.compare import Comparison, GeneratorEntry, Row, TokenizerEntry
from vistok.compare.spec import Budget
from vistok.compare.steps import Kept, Steps, as_arguments
from vistok.errors import UserError

EMOJI = {"class_path": "Emoji", "init_args": {"split": "train"}}
SPEC = Comparison(
    title="two",
    data=EMOJI,
    held_out={"class_path": "Emoji", "init_args": {"split": "held-out"}},
    budget=Budget(64, 32),
    tokenizers={
        "digits": TokenizerEntry(quantize="kl", levels=16),
        "kl": TokenizerEntry(latents="vae"),
        "vae": TokenizerEntry(config="vae.yaml", options={"optimizer.lr": 1e-3}),
        "grid": TokenizerEntry(checkpoint="assets/emoji/tokenizer"),
    },
    generators={
        "raster": GeneratorEntry(tokenizer="grid", config="raster.yaml"),
        "bridge": GeneratorEntry(tokenizer="digits", config="bridge.yaml"),
    },
    rows={"LlamaGen": Row("raster"), "TokenBridge": Row("bridge")},
    features="random",
)


@pytest.fixture
def steps(tmp_path):
    return Steps(SPEC, tmp_path)


def test_each_step_comes_after_those_it_reads_from(steps):
    done = set()
    for step in steps:
        # What is loaded has no step of its own.
        assert set(step.after) - done <= {"tokenizers/grid"}
        done.add(step.key)
    assert {"tokenizers/digits", "tokens/digits", "generators/bridge", "tokens/grid"} <= done
    assert "tokenizers/grid" not in done and "tokens/kl" not in done


def test_trainings_are_of_the_budget_and_of_the_data(steps):
    trainings = {
        step.key: step.arguments for step in steps if step.module.startswith("vistok.train")
    }
    for key, arguments in trainings.items():
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        assert options["--images"] == ("64" if key.startswith("tokenizers") else "32")
        assert options["--validation.split"] == "held-out"
        assert options["--resume"] == "true"
    assert "--optimizer.lr" in trainings["tokenizers/vae"]
    assert "--data.split" in trainings["tokenizers/vae"]
    assert "--data.split" not in trainings["generators/raster"]


def test_a_row_is_scored_as_it_decodes(steps, tmp_path):
    rows = {**SPEC.rows, "ZipAR": Row("raster", {"plan": "zipar(2)", "guidance": "linear(1,3)"})}
    changed = Steps(replace(SPEC, rows=rows), tmp_path)
    step = next(step for step in changed if step.key == "scores/rows/ZipAR")
    options = dict(zip(step.arguments[1::2], step.arguments[2::2], strict=True))
    assert options["--plan"] == "zipar(2)" and options["--guidance"] == "linear(1,3)"
    assert options["--checkpoint"] == str(tmp_path / "pairs" / "raster")


@pytest.fixture
def commands(monkeypatch):
    """What is started in place of the commands, all of which end well but those in `failing`."""
    started, failing = [], set()

    def run(command):
        started.append(command)
        code = 1 if failing & set(command) else 0
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    return started, failing


def test_what_is_done_is_not_done_again(steps, commands):
    started, failing = commands
    failing.add("bridge.yaml")
    with pytest.raises(UserError, match="generators/bridge ended with exit code 1"):
        Kept(steps).run(lambda _: None)
    before = len(started)
    failing.clear()
    Kept(steps).run(lambda _: None)
    assert len(started) == len(list(steps)) + 1  # the one that failed was begun twice
    assert started[before - 1] == started[before]
    Kept(steps).run(lambda _: None)
    assert len(started) == len(list(steps)) + 1


def test_what_reads_from_a_changed_step_is_done_again(steps, commands):
    started, _ = commands
    Kept(steps).run(lambda _: None)
    started.clear()
    vae = replace(SPEC.tokenizers["vae"], options={"optimizer.lr": 2e-3})
    changed = replace(SPEC, tokenizers={**SPEC.tokenizers, "vae": vae})
    Kept(Steps(changed, steps.output)).run(lambda _: None)
    again = {step.key for step in steps if any(step.arguments[-1] in c for c in started)}
    assert again >= {"tokenizers/vae", "tokenizers/kl", "tokenizers/digits", "generators/bridge"}
    assert not any("raster.yaml" in command for command in started)


def test_a_mark_that_was_cut_off_is_no_mark(steps, commands):
    started, _ = commands
    Kept(steps).run(lambda _: None)
    started.clear()
    mark = next((steps.output / "done").glob("generators raster*"))
    assert json.loads(mark.read_text())["told"]
    mark.unlink()
    Kept(steps).run(lambda _: None)
    assert len(started) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"a": Row("rister")}}, "row a: no 'rister' .*did you mean 'raster'"),
        ({"rows": {}}, "without rows"),
        ({"count": 0}, "count 0 must be at least 1"),
        (
            {"tokenizers": {"a": TokenizerEntry(latents="b"), "b": TokenizerEntry(latents="a")},
             "generators": {"g": GeneratorEntry("a", checkpoint="x")}, "rows": {"r": Row("g")}},
            "a, b are made from one another",
        ),
    ],
)  # fmt: skip
def test_a_spec_that_does_not_hold_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SPEC, **changes)


def test_an_entry_says_once_where_it_comes_from():
    with pytest.raises(
        UserError, match=r"give one of config, checkpoint, .*not config and latents"
    ):
        TokenizerEntry(config="a.yaml", latents="b")
    with pytest.raises(UserError, match="give one of config, checkpoint, not none"):
        GeneratorEntry("grid")


def test_options_are_written_as_a_command_line():
    line = as_arguments({"a": 1, "b": None, "c": [1, 2]}, {"a": "x", "d": True, "e": 1.0e-3})
    assert line == ("--a", "x", "--c", "[1, 2]", "--d", "true", "--e", "0.001")
