import argparse
import os

import pytest
import torch
from safetensors.torch import save_file

from vistok.checkpoints.files import load, read_weights, rename
from vistok.errors import CheckpointError

PLAIN = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2, dtype=torch.float16)}
AVERAGED = {name: tensor + 1 for name, tensor in PLAIN.items()}


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize(
    ("content", "entries", "expected"),
    [
        (PLAIN, ("model",), PLAIN),
        ({"model": PLAIN, "ema": AVERAGED, "steps": 3}, ("model", "ema"), PLAIN),
        ({"model": PLAIN, "ema": AVERAGED, "steps": 3}, ("ema", "model"), AVERAGED),
        ({"model": PLAIN, "optimizer": {"state": {}}}, ("ema", "model"), PLAIN),
        ({"module": PLAIN, "args": argparse.Namespace(lr=1e-4)}, ("model", "module"), PLAIN),
        ({"state_dict": PLAIN, "epoch": 1, "lr": 0.1}, ("state_dict",), PLAIN),
        ({name: torch.nn.Parameter(t) for name, t in PLAIN.items()}, ("model",), PLAIN),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_published_layouts(tmp_path, content, entries, expected, is_zip):
    for suffix in (".pt", ".pth", ".bin", ".ckpt"):
        path = tmp_path / f"weights{suffix}"
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        weights = read_weights(path, entries)
        assert same(weights, expected)
        assert not any(tensor.requires_grad for tensor in weights.values())


def test_safetensors(tmp_path):
    save_file(PLAIN, tmp_path / "weights.safetensors")
    assert same(read_weights(tmp_path / "weights.safetensors"), PLAIN)


@pytest.mark.parametrize("is_zip", [True, False])
def test_no_file_runs_code(tmp_path, monkeypatch, is_zip):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "made"))
    path = tmp_path / "weights.pt"
    torch.save({"model": PLAIN, "x": Hostile()}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"weights\.pt: asks for posix\.mkdir"):
        read_weights(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {}, "steps": 3}, "holds optimizer, steps; expected tensors by name, alone"),
        ({"model": PLAIN, "ema": AVERAGED}, "holds model, ema; .* under average"),
        ({"average": {"weight": 3}}, "holds weight; expected tensors"),
        ({"average": {}}, "holds nothing"),
        ({}, "holds nothing"),
        (torch.zeros(2), "holds Tensor"),
        ({0: torch.zeros(2)}, "holds 0"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=rf"weights\.pt: {message}") as error:
        read_weights(tmp_path / "weights.pt", ("average",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_broken_files_are_refused(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(path)
    save_file(PLAIN, path) if name.endswith("safetensors") else torch.save(PLAIN, path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:-50], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}: not a readable weight file"):
            read_weights(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights\.npz: unknown kind of file; .* \.pth"):
        read_weights(tmp_path / "weights.npz")
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(tmp_path)


def test_rename_applies_rules_in_turn():
    weights = {"net.w": torch.zeros(1), "net.log": torch.ones(1), "head.w": torch.ones(2)}
    rules = [(r"\.log$", None), ("^net", "body"), (r"^body\.", "trunk.")]
    assert list(rename(weights, rules, "file")) == ["trunk.w", "head.w"]
    with pytest.raises(CheckpointError, match=r"file: two tensors for same\.w"):
        rename(weights, [("^(net|head)", "same")], "file")


def test_load_is_strict():
    layer = torch.nn.Linear(3, 2)
    right = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.ones(2)}
    load(layer, right, "file")
    assert layer.weight.dtype == torch.float32 and bool((layer.weight == 1).all())
    for wrong, message in [
        ({"weight": right["weight"]}, r"1 missing tensor\(s\) for Linear: bias"),
        (right | {"b": torch.ones(1), "c": torch.ones(1)}, r"2 unexpected .*: b, c"),
        (right | {"bias": torch.zeros(3)}, r"1 mismatched .*: bias"),
    ]:
        with pytest.raises(CheckpointError, match=f"file: {message}"):
            load(layer, wrong, "file")
    assert bool((layer.bias == 1).all()), "nothing is copied from what does not fit"
