"""Strict loading: whatever does not fit in every key and tensor is refused in one line."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from vistok.errors import CheckpointError
from vistok.models import WEIGHTS, register_to_config
from vistok.quantizers import FSQ
from vistok.tokenizers import ConvTokenizer, Tokenizer


@pytest.fixture
def saved(tmp_path) -> Path:
    model = ConvTokenizer(
        FSQ([3, 3]), image_size=8, channels=4, channel_multipliers=[1, 1], num_res_blocks=1,
        z_channels=4, attention=False,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_config(saved: Path, **changes):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(saved: Path, edit):
    tensors = load_file(saved / WEIGHTS)
    edit(tensors)
    save_file(tensors, saved / WEIGHTS)


def name(tensors):
    return "quant_conv.weight" if "quant_conv.weight" in tensors else next(iter(tensors))


FAULTS = {
    "a tensor is missing": (lambda s: edit_tensors(s, lambda t: t.pop(name(t))), "missing"),
    "a tensor is too many": (
        lambda s: edit_tensors(s, lambda t: t.update(more=torch.zeros(2))),
        "unexpected",
    ),
    "a tensor has another shape": (
        lambda s: edit_tensors(s, lambda t: t.update({name(t): torch.zeros(7)})),
        "shape|size",
    ),
    "an unknown argument": (lambda s: edit_config(s, chanels=8), "did you mean 'channels'"),
    "an unknown class": (lambda s: edit_config(s, _class_name="ConvTokeniser"), "ConvTokenizer"),
    "a class of another kind": (
        lambda s: edit_config(s, _class_name="FSQ"),
        "expected a Tokenizer",
    ),
    "a class outside vistok": (lambda s: edit_config(s, _class_name="os.system"), "not part of"),
    "a part outside vistok": (
        lambda s: edit_config(s, quantizer={"_class_name": "subprocess.Popen", "args": "true"}),
        "not part of",
    ),
    "a part of another kind": (
        lambda s: edit_config(s, quantizer={"_class_name": "ConvTokenizer"}),
        "expected a Component",
    ),
    "a future format": (lambda s: edit_config(s, _format=99), "upgrade vistok"),
    "no config": (lambda s: (s / "config.json").unlink(), "no readable vistok model"),
    "a config that is not JSON": (lambda s: (s / "config.json").write_text("{"), "no readable"),
    "a config of 10,000 nested lists": (
        lambda s: (s / "config.json").write_text("[" * 10000),
        "no readable",
    ),
    "no weights": (lambda s: (s / WEIGHTS).unlink(), "no readable vistok model"),
    "truncated weights": (
        lambda s: (s / WEIGHTS).write_bytes((s / WEIGHTS).read_bytes()[:-100]),
        "no readable|does not fit",
    ),
    "a pickle named safetensors": (
        lambda s: (s / WEIGHTS).write_bytes(pickle.dumps(Bomb())),
        "no readable|does not fit",
    ),
    "a header of 10 GB": (
        lambda s: (s / WEIGHTS).write_bytes(struct.pack("<Q", 10**10) + b"{}"),
        "no readable|does not fit",
    ),
}


class Bomb:
    """Raises as soon as it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the file ran code')",))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_does_not_fit_is_refused(saved, fault):
    damage, message = FAULTS[fault]
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer.from_pretrained(saved)
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)


def test_only_pickled_weights_are_refused(saved):
    torch.save(load_file(saved / WEIGHTS), saved / "diffusion_pytorch_model.bin")
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        Tokenizer.from_pretrained(saved)


def test_the_fingerprint_tells_models_apart(saved):
    model = Tokenizer.from_pretrained(saved)
    assert Tokenizer.from_pretrained(saved).fingerprint() == model.fingerprint()
    wider = ConvTokenizer(**{**model.arguments, "quantizer": FSQ([3, 3]), "dropout": 0.1})
    wider.load_state_dict(model.state_dict())
    assert wider.fingerprint() != model.fingerprint()
    before = model.fingerprint()
    with torch.no_grad():
        model.quant_conv.bias[0] += 1e-7
    assert model.fingerprint() != before


def test_an_argument_can_be_overridden_at_loading(saved):
    assert Tokenizer.from_pretrained(saved, image_size=16).spec.shape == (8, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_small_weights_load_in_float32_unless_asked(saved, dtype):
    edit_tensors(saved, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    model = Tokenizer.from_pretrained(saved)
    assert model.dtype == torch.float32
    stored = load_file(saved / WEIGHTS)
    assert all(torch.equal(v, stored[k].float()) for k, v in model.state_dict().items())
    assert Tokenizer.from_pretrained(saved, torch_dtype=torch.float16).dtype == torch.float16


def test_a_new_argument_at_its_default_changes_no_fingerprint(saved, monkeypatch):
    before = Tokenizer.from_pretrained(saved).fingerprint()

    class LaterFSQ(FSQ):
        @register_to_config
        def __init__(self, levels, novelty: int = 3, **rest):
            super().__init__(levels, **rest)

    class LaterConvTokenizer(ConvTokenizer):
        @register_to_config
        def __init__(self, quantizer, novelty: int = 3, **rest):
            super().__init__(quantizer, **rest)

    for later in (LaterFSQ, LaterConvTokenizer):
        later.__name__ = later.__name__.removeprefix("Later")
        monkeypatch.setattr(vistok, later.__name__, later)
    same = Tokenizer.from_pretrained(saved)
    assert same.arguments["novelty"] == same.arguments["quantizer"]["novelty"] == 3
    assert same.fingerprint() == before
    assert Tokenizer.from_pretrained(saved, novelty=4).fingerprint() != before
