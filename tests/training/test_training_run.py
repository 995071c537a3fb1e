"""Starting, refusing, and going on with changed options."""

import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import Squares, latest, quick, tiny_tokenizer, train_generator, train_tokenizer

from vistok import ConvTokenizer, Generator, LlamaGen
from vistok.data import BrokenSampleError, TokenCacheHeader, TokenCacheWriter, Transform
from vistok.errors import UserError
from vistok.training import OptimizerConfig, run, stopping


def read_log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_directory_that_holds_a_run_is_refused(tmp_path):
    train_tokenizer(tmp_path, steps=1)
    with pytest.raises(UserError, match=r"holds a run at step 1: pass --resume true"):
        train_tokenizer(tmp_path, steps=2)


def test_a_directory_in_use_is_refused(tmp_path):
    class StartsAnother(Squares):
        def __getitem__(self, index):
            with pytest.raises(UserError, match="another run is writing here"):
                train_tokenizer(tmp_path, steps=1)
            return super().__getitem__(index)

    train_tokenizer(tmp_path, steps=1, data=StartsAnother())


def test_a_finished_run_is_left_alone(tmp_path, caplog):
    train_tokenizer(tmp_path, steps=2)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    data = Squares()
    with caplog.at_level("INFO"):
        train_tokenizer(tmp_path, steps=2, resume=True, data=data)
    assert "is finished at step 2" in caplog.text
    assert not data.read
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}


def test_changed_options_are_named(tmp_path, monkeypatch):
    options = {"images": 16, "batch_size": 8, "output": "a", "run": {"keep": 2}}
    monkeypatch.setattr("vistok.options.resolved_config", lambda: options)
    train_tokenizer(tmp_path, steps=2)
    options = {**options, "images": 24, "output": "b", "resume": True, "run": {"keep": 3}}
    with pytest.raises(
        UserError, match=r"images: 16 -> 24, run\.keep: 2 -> 3; pass --allow_changes"
    ):
        train_tokenizer(tmp_path, steps=3, resume=True)
    train_tokenizer(tmp_path, steps=3, resume=True, allow_changes=True)
    assert latest(tmp_path).name == "step-00000003"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == options
    options = {**options, "batch_size": 4}
    with pytest.raises(UserError, match="batch_size: 8 -> 4 cannot change"):
        train_tokenizer(tmp_path, steps=4, resume=True, allow_changes=True)


def test_differences_use_dotted_keys():
    old = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "gone": 0, "output": "x"}
    new = {"a": 1, "b": {"c": [1, 3], "d": {"e": 2}}, "added": True, "output": "y"}
    assert list(run.differences(old, new).values()) == [
        "b.c: [1, 2] -> [1, 3]",
        "b.d.e: None -> 2",
        "gone: 0 -> absent",
        "added: absent -> True",
    ]


def test_changed_learning_rate_takes_effect(tmp_path):
    train_tokenizer(tmp_path, steps=1)
    before = load_file(latest(tmp_path) / "tokenizer.safetensors")
    still = OptimizerConfig(lr=0.0)
    train_tokenizer(tmp_path, steps=2, resume=True, allow_changes=True, optimizer=still)
    after = load_file(latest(tmp_path) / "tokenizer.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith("quantizer.") for name in moved)  # the revival of codes


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_data_end_in_one_line(tmp_path, num_workers):
    class Broken(Squares):
        def __getitem__(self, index):
            raise BrokenSampleError(f"picture {index} cannot be decoded")

    with pytest.raises(UserError, match=r"^training data: 32 broken samples in a row, .*decoded$"):
        train_tokenizer(tmp_path, data=Broken(), run=quick(num_workers=num_workers))


def test_broken_samples_are_counted(tmp_path):
    class OneBroken(Squares):
        def __getitem__(self, index):
            if index == 3:
                raise BrokenSampleError("picture 3 cannot be decoded")
            return super().__getitem__(index)

    train_tokenizer(tmp_path, steps=5, data=OneBroken(), run=quick(log_every=5))
    assert read_log(tmp_path)[0]["broken_samples"] == pytest.approx(2 / 40)  # two epochs


class Faulty(ConvTokenizer):
    """Gives `value` in place of its reconstruction in one call."""

    def configure(self, call: int, value: float):
        self.calls, self.faulty_call, self.value = 0, call, value
        return self

    def forward(self, images, text=None):
        result = super().forward(images, text)
        self.calls += 1
        if self.calls == self.faulty_call:
            result.reconstruction = result.reconstruction * self.value
        return result


def faulty(call, value):
    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Faulty
    return tokenizer.configure(call, value)


def test_a_non_finite_step_stops_the_run(tmp_path):
    data = Squares()
    with pytest.raises(UserError, match=r"step 3: .* not finite, see .*step-00000003.json"):
        train_tokenizer(tmp_path, data=data, tokenizer=faulty(6, float("nan")))
    record = json.loads((tmp_path / "non-finite" / "step-00000003.json").read_text())
    assert record["samples"] == data.read[16:24]
    assert record["terms_by_process"][0]["loss"] == "nan"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_is_skipped_whole(tmp_path, value):
    config = quick(non_finite="skip", save_every=1, keep=10, log_every=1)
    train_tokenizer(tmp_path, steps=4, tokenizer=faulty(5, value), run=config)
    before, after = (tmp_path / "checkpoints" / f"step-0000000{step}" for step in (2, 3))
    for name in ("tokenizer.safetensors", "ema.safetensors", "optimizers.pt"):
        assert (before / name).read_bytes() == (after / name).read_bytes()
    log = read_log(tmp_path)
    assert [line["skipped_steps"] for line in log] == [0, 0, 1, 1]
    assert ["loss" in line for line in log] == [True, True, False, True]
    exported = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in exported.values())


def test_a_second_interrupt_ends_at_once(monkeypatch):
    accelerator = run.start_processes("unused", quick(), seed=0)
    handler = signal.getsignal(signal.SIGINT)
    with stopping.StopRequest(accelerator) as stop:
        assert not stop.agreed()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the launcher's copy of the first
        assert stop.agreed()
        monkeypatch.setattr(stopping, "GRACE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def test_bfloat16_keeps_weights_in_float32(tmp_path):
    train_tokenizer(tmp_path, steps=3, run=quick(precision="bf16"))
    assert all(
        p.dtype == torch.float32 for p in ConvTokenizer.from_pretrained(tmp_path).parameters()
    )
    assert read_log(tmp_path)[0]["loss"] > 0


def make_cache(directory, tokenizer):
    data, crop = Squares(), Transform("resize-center-crop", 16)
    header = TokenCacheHeader(
        tokenizer.fingerprint(), tokenizer.spec, crop, data.name, data.class_names, len(data)
    )
    writer = TokenCacheWriter(directory, header)
    writer.allocate()
    images = torch.stack([crop(data[i].image) for i in range(len(data))])
    with torch.no_grad():
        writer.write(0, tokenizer.eval().encode(images).unsqueeze(1), data.labels())
    writer.finish()


def test_generator_learns_the_same_from_images_and_from_their_tokens(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    make_cache(tmp_path / "tokens", tokenizer)
    crop = {"transform": "resize-center-crop"}
    train_generator(tmp_path / "a", tmp_path / "tokenizer", **crop)
    train_generator(tmp_path / "b", tmp_path / "tokenizer", tokens=str(tmp_path / "tokens"), **crop)
    fingerprints = {Generator.from_pretrained(tmp_path / run).fingerprint() for run in "ab"}
    assert len(fingerprints) == 1
    with pytest.raises(UserError, match="made with resize-center-crop at 16 px"):
        train_generator(tmp_path / "c", tmp_path / "tokenizer", tokens=str(tmp_path / "tokens"))


def test_generator_scores_and_draws(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    run = quick(validate_every=4, validation_images=7)
    train_generator(tmp_path / "run", tmp_path / "tokenizer", validation=Squares(), run=run)
    losses = [
        line["validation/loss"] for line in read_log(tmp_path / "run") if "validation/loss" in line
    ]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert (tmp_path / "run" / "validation" / "step-00000008.png").stat().st_size > 0


def test_tracks_in_wandb_without_an_account(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_tokenizer(
        tmp_path, steps=1, validation=Squares(), run=quick(wandb="tests", validate_every=1)
    )
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_compiled_training_agrees_with_eager(tmp_path):
    def without_dropout(spec, class_names):
        sizes = {"dim": 16, "depth": 1, "num_heads": 2}
        return LlamaGen(spec, class_names, dropout=0.0, condition_dropout=0.0, **sizes)

    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    losses = {}
    for compiled in (False, True):
        output, run = tmp_path / str(compiled), quick(compile=compiled, log_every=1)
        train_generator(output, tmp_path / "tokenizer", 3, generator=without_dropout, run=run)
        losses[compiled] = [line["loss"] for line in read_log(output)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
