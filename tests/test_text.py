import shutil
import sys
from pathlib import Path

import pytest
import torch

from vistok.errors import UserError
from vistok.text import ClipText, PromptReader, TextEncoder


@pytest.fixture(scope="module")
def encoder(text_encoder) -> TextEncoder:
    return TextEncoder(text_encoder, length=8)


def test_captions_are_padded_on_the_left(encoder):
    captions = encoder.encode(["a cat", "", "a very long caption"])
    assert encoder.dim == 16
    assert captions.features.shape == (3, 8, 16)
    # A token a letter, and one that ends the caption.
    assert captions.mask.sum(1).tolist() == [6, 1, 8]
    assert captions.mask[:, -1].all() and (captions.mask.diff(dim=1) >= 0).all()
    assert (captions.features[~captions.mask] == 0).all()
    assert (captions.features[captions.mask].abs().sum(1) > 0).all()


def test_features_are_those_of_the_encoder(encoder):
    tokens = encoder.tokenizer("a cat", return_tensors="pt")
    states = encoder._model(input_ids=tokens.input_ids).last_hidden_state
    assert torch.allclose(encoder.encode(["a cat"]).features[:, 2:], states, atol=1e-5)


def test_features_do_not_depend_on_the_batch(encoder):
    together = encoder.encode(["cat", "a very long caption", "dog"])
    for i, caption in enumerate(["cat", "a very long caption", "dog"]):
        alone = encoder.encode([caption])
        assert torch.allclose(alone.features[0], together.features[i], atol=1e-6)
        assert torch.equal(alone.mask[0], together.mask[i])


def test_case_and_space_are_ignored(encoder):
    assert torch.equal(encoder.encode(["  A\n Cat "]).features, encoder.encode(["a cat"]).features)


def test_what_is_no_t5_is_refused(text_encoder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no readable T5"):
        TextEncoder(str(tmp_path))
    with pytest.raises(UserError, match="captions of 0 tokens"):
        TextEncoder(text_encoder, length=0)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="a model of type bert, expected t5"):
        TextEncoder(str(tmp_path))
    for damage in (Path.unlink, lambda file: file.write_bytes(b"x" * 99)):
        broken = shutil.copytree(text_encoder, tmp_path / "broken", dirs_exist_ok=True)
        damage(broken / "model.safetensors")
        with pytest.raises(UserError, match="broken: no readable T5"):
            TextEncoder(str(broken)).encode(["a cat"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'vistok\[text\]'"):
        TextEncoder(text_encoder)


def test_prompts_are_ids(text_encoder, tmp_path):
    reader = PromptReader(text_encoder, length=4)
    assert reader.vocab_size == 31 and reader.ids("ab") == [4, 5, 1]
    prompts = reader.encode(["ab", "", "abcde"])
    assert prompts.ids.tolist() == [[30, 4, 5, 1], [30, 30, 30, 1], [4, 5, 6, 7]]
    assert prompts.mask.sum(1).tolist() == [3, 1, 4]
    with pytest.raises(UserError, match="reads 'ab' as id 5, the generator knows 5"):
        PromptReader(text_encoder, 4, vocab_size=5).encode(["ab"])
    with pytest.raises(UserError, match="no readable tokenizer"):
        PromptReader(str(tmp_path), 4)


def test_clip_states_of_all_positions(clip):
    encoder = ClipText(clip)
    assert encoder.shape == (8, 16)
    texts = ["cat", "", "ABCDEFGHIJ"]
    states = encoder.encode(texts)
    assert states.shape == (3, 8, 16)
    torch.testing.assert_close(states.mean(-1), torch.zeros(3, 8), atol=1e-5, rtol=0)  # normed
    first, last = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    c, a, t = (encoder.tokenizer.get_vocab()[w] for w in ("c", "a", "t</w>"))
    ids = torch.tensor([[first, c, a, t, last, 0, 0, 0]])
    torch.testing.assert_close(states[:1], encoder._model(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(encoder.encode(["  Cat "]), states[:1])
    assert encoder.tokenizer(texts[2], truncation=True, max_length=8).input_ids[-1] == last


def test_what_is_no_clip_is_refused(clip, text_encoder, tmp_path):
    with pytest.raises(UserError, match="of type t5, expected clip, as openai/clip-vit-large"):
        ClipText(text_encoder)
    with pytest.raises(UserError, match="no readable CLIP"):
        ClipText(str(tmp_path))
    broken = shutil.copytree(clip, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="broken: no readable CLIP"):
        ClipText(str(broken)).encode(["a cat"])
