"""A checkpoint is whole or absent, whatever happens while it is written."""

import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from tiny_runs import Squares, latest, quick, tiny_tokenizer, train_tokenizer

from vistok import Tokenizer
from vistok.errors import UserError
from vistok.training import EMA, Checkpoints, OptimizerConfig, TrainingState, Window, adamw


def new_state(output, keep=2):
    accelerator = Accelerator(cpu=True)
    model = tiny_tokenizer()
    ema = EMA(model, 0.9)
    model, optimizer = accelerator.prepare(model, adamw(model, OptimizerConfig()))
    window = Window(accelerator, 16)
    state = TrainingState({"tokenizer": model}, {"tokenizer": optimizer}, ema, window)
    return Checkpoints(accelerator, output, {}, keep), state


def fill(state, value):
    """Set every weight, of model and average, to `value`."""
    with torch.no_grad():
        for module in (*state.models.values(), state.ema.module):
            for parameter in module.parameters():
                parameter.fill_(value)
    state.step = value


def names(checkpoints):
    return sorted(path.name for path in checkpoints.directory.iterdir())


def kill_while_saving(output, delay):
    """Save steps 1, 2, ... in a process that is killed `delay` seconds after it began to."""

    def save_forever(pipe):
        checkpoints, state = new_state(output)
        first = int(latest(output).name[5:]) if checkpoints.latest() else 0
        pipe.send("saving")
        for step in range(first + 1, first + 1000):
            fill(state, step)
            checkpoints.save(state)

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=save_forever, args=(theirs,))
    child.start()
    ours.recv()
    time.sleep(delay)
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def check_kills(output, kills):
    draw = random.Random(0)
    kill_while_saving(output, 0.5)
    for _ in range(kills):
        kill_while_saving(output, draw.uniform(0, 0.1))
        checkpoints, state = new_state(output)
        checkpoints.load(state, checkpoints.latest())
        for module in (*state.models.values(), state.ema.module):
            assert all((p == state.step).all() for p in module.parameters())
        exported = torch.cat([p.flatten() for p in Tokenizer.from_pretrained(output).parameters()])
        assert len(exported.unique()) == 1 and exported[0] - state.step in (0, 1)


def test_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    check_kills(tmp_path, 5)


@pytest.mark.slow
def test_a_hundred_kills_while_saving(tmp_path):
    check_kills(tmp_path, 100)


def test_full_disk_leaves_the_former_checkpoint(tmp_path):
    """Files cannot grow over 100 kB from the 20th sample on, in the third step."""

    class FillsTheDisk(Squares):
        def __getitem__(self, index):
            if len(self.read) == 20:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            return super().__getitem__(index)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = quick(save_every=2)
    try:
        with pytest.raises(UserError, match=r"saving .*step-00000004: .*too large"):
            train_tokenizer(tmp_path, data=FillsTheDisk(), run=run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    Tokenizer.from_pretrained(tmp_path)
    train_tokenizer(tmp_path, resume=True, run=run)
    assert latest(tmp_path).name == "step-00000008"


def test_prunes_all_but_newest_best_and_marked(tmp_path):
    checkpoints, state = new_state(tmp_path, keep=2)
    for step, score in enumerate([1.0, 5.0, None, 2.0, 3.0, None], start=1):
        state.step, state.score = step, score
        checkpoints.save(state)
        if step == 3:
            (checkpoints.directory / "step-00000003" / "keep").touch()
    kept = {2: "best", 3: "marked", 5: "newest", 6: "newest"}
    assert names(checkpoints) == [f"step-{step:08d}" for step in kept]


def test_export_is_the_average(tmp_path):
    train_tokenizer(tmp_path, steps=3)
    checkpoints, state = new_state(tmp_path)
    checkpoints.load(state, checkpoints.latest())
    exported = Tokenizer.from_pretrained(tmp_path)
    assert exported.fingerprint() == state.ema.module.fingerprint()
    assert exported.fingerprint() != state.models["tokenizer"].fingerprint()
