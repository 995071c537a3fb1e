"""Optimiser, averages and the log, as arithmetic."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from vistok.errors import UserError
from vistok.training import EMA, OptimizerConfig, Window, accumulate, adamw, guarded_step
from vistok.training.log import Clock, JsonLines, rewind


def test_learning_rate_rises_linearly_and_falls_by_a_cosine():
    config = OptimizerConfig(lr=2.0, warmup_steps=4, final_fraction=0.1)
    rates = [config.learning_rate(step, 104) for step in range(105)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[54] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[104] == pytest.approx(0.2)
    assert OptimizerConfig(lr=3.0, final_fraction=1.0).learning_rate(77, 100) == 3.0


def test_vectors_have_no_weight_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    model[2].weight.requires_grad_(False)
    optimizer = adamw(model, OptimizerConfig(weight_decay=0.3))
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0.0
    assert [p.ndim for p in decayed["params"]] == [4]
    assert sorted(p.numel() for p in plain["params"]) == [4, 4, 4, 4]
    with pytest.raises(UserError, match="all parameters are frozen"):
        adamw(model.requires_grad_(False), OptimizerConfig())


def test_named_matrices_have_no_weight_decay():
    model = nn.ModuleDict({"embed": nn.Linear(3, 2), "out": nn.Linear(2, 3)})
    decayed, plain = adamw(model, OptimizerConfig(no_decay=("embed",))).param_groups
    assert decayed["params"] == [model["out"].weight]
    assert len(plain["params"]) == 3


def test_average_follows_its_formula_and_copies_buffers():
    model = nn.BatchNorm1d(3)
    ema = EMA(model, decay=0.5)
    weights, expected = torch.randn(6, 3), None
    for n, weight in enumerate(weights):
        model.weight.data.copy_(weight)
        model.running_mean.fill_(n)
        ema.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = weight if n == 0 else decay * expected + (1 - decay) * weight
    torch.testing.assert_close(ema.module.weight.data, expected)
    assert torch.equal(ema.module.running_mean, model.running_mean)
    assert not ema.module.weight.requires_grad and not ema.module.training


def test_micro_batches_add_up_to_the_batch():
    accelerator = Accelerator(cpu=True)
    data, norms, models = torch.randn(8, 5), [], []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(5, 1)
        model, optimizer = accelerator.prepare(model, adamw(model, OptimizerConfig(lr=0.1)))
        seen = []
        for batch in accumulate(accelerator, model, data.chunk(parts)):
            loss = model(batch).square().mean()
            accelerator.backward(loss / parts)
            seen.append({"loss": loss.detach()})
        taken, norm = guarded_step(accelerator, model, optimizer, seen, max_grad_norm=0.1)
        assert taken
        assert model.weight.grad is None
        norms.append(norm)
        models.append(model.weight)
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(models[0], models[1])


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(fault):
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, adamw(model, OptimizerConfig(lr=0.1)))
    before = [p.clone() for p in model.parameters()]
    model(torch.ones(1, 2)).sum().backward()
    loss = torch.tensor(1.0)
    if fault == "loss":
        loss = loss * math.inf
    else:
        model.bias.grad.fill_(math.nan)
    taken, _ = guarded_step(accelerator, model, optimizer, [{"loss": loss}], 1.0)
    assert not taken and not optimizer.state and model.bias.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_window_means_and_codebook_use():
    window = Window(Accelerator(cpu=True), vocab_size=8)
    for value in (1.0, 2.0, 6.0):
        window.add([{"loss": torch.tensor(value)}, {"loss": torch.tensor(value)}])
    window.add([], late=torch.tensor(5.0))
    window.add_codes([torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [2, 3]])])
    values = window.close()
    assert values["loss"] == 3.0 and values["late"] == 5.0
    assert values["codebook_usage"] == 0.5 and values["dead_codes"] == 4
    assert values["codebook_perplexity"] == pytest.approx(4.0)
    assert window.close()["dead_codes"] == 8


@pytest.mark.parametrize("world", [1, 2, 3])
def test_windows_are_shared_out_over_another_number_of_processes(world):
    accelerator = Accelerator(cpu=True)
    states = []
    for value in (1.0, 5.0):
        window = Window(accelerator, vocab_size=4)
        window.add([{"loss": torch.tensor(value)}])
        window.add_codes([torch.tensor([int(value) % 4, 2])])
        states.append(window.state_dict())
    loaded = [Window(accelerator, vocab_size=4) for _ in range(world)]
    for rank, window in enumerate(loaded):
        window.load_state_dicts(states, rank, world)
    assert sum(float(w.sums["loss"]) for w in loaded) == 6.0
    assert sum(w.counts["loss"] for w in loaded) == 2
    assert sum(w.codes for w in loaded).tolist() == [0, 2, 2, 0]


def test_log_survives_a_torn_line_and_does_not_repeat_steps(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    for step in (2, 4, 6):
        log.log({"loss": float("nan") if step == 4 else 0.5}, step=step)
    with open(log.path, "a") as file:
        file.write('{"step": 8, "lo')
    rewind(log.path, 4)
    log.log({"loss": 0.25}, step=6)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [line["loss"] for line in lines] == [0.5, None, 0.25]


def test_clock_warns_once_when_data_are_slow(monkeypatch, caplog):
    now = iter(range(1000))
    monkeypatch.setattr("vistok.training.log.time.perf_counter", lambda: next(now))
    clock = Clock()
    for _ in clock.timed("abc"):
        clock.images += 4
    record = clock.read()
    assert 0 < record["data_wait"] < 1
    clock.read()
    assert caplog.text.count("waiting for data") == 1


def test_milestones_step_the_learning_rate_down():
    config = OptimizerConfig(lr=1.0, final_fraction=1.0, milestones=(0.5, 0.75))
    rates = [config.learning_rate(step, 100) for step in (0, 49, 50, 74, 75, 99)]
    assert rates == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])
