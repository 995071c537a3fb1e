"""Captions to features, by the encoder of a T5 (Raffel et al., 2020, arXiv:1910.10683).

LlamaGen and its followers read captions through FLAN-T5-XL (Chung et al., 2022, arXiv:2210.11416):
the last hidden states of google/flan-t5-xl, 120 tokens of 2048 channels. The model is transformers'
and is never saved with a generator, which remembers its name alone.
"""

from collections.abc import Sequence
from functools import cached_property

import safetensors
import torch

from vistok.errors import UserError
from vistok.generators import Captions, Generator
from vistok.generators.conditions import CaptionCondition


class TextEncoder:
    """A frozen T5 encoder in float32 with its tokenizer; the weights are read at the first caption.

    Captions are put in lower case and freed of superfluous space. The published features come from
    captions that went through DeepFloyd's cleaner, too (addresses, markup, stray punctuation):
    captions off the web are to be cleaned before.

    Args:
        path: directory or Hub repository of a T5, as transformers saves it.
        length: tokens to which captions are padded or cut.
        device: of the model and its features.

    `dim` is the number of channels. Raises `UserError` where transformers is not installed or
    `path` holds no T5.
    """

    def __init__(self, path: str, length: int = 120, device: torch.device | str = "cpu"):
        try:
            import transformers
        except ImportError as error:
            raise UserError(
                f"text encoder {path}: needs transformers; pip install 'vistok[text]'"
            ) from error
        if length < 1:
            raise UserError(f"text encoder {path}: captions of {length} tokens, expected 1 or more")
        self.path, self.length, self.device = path, length, device
        try:
            config = transformers.AutoConfig.from_pretrained(path)
            if config.model_type == "t5":
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, ImportError) as error:
            raise self._unreadable(error) from error
        if config.model_type != "t5":
            raise UserError(
                f"text encoder {path}: holds a model of type {config.model_type}, expected t5, "
                "as google/flan-t5-xl is"
            )
        self.tokenizer.padding_side = "right"
        self.dim = config.d_model

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Captions:
        """Return the features of captions, `length` rows each, padded on the left. All are padded
        before they are encoded, so that those of one caption do not depend on the others."""
        texts = [" ".join(caption.lower().split()) for caption in captions]
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(self.device)
        mask = tokens.attention_mask
        features = self._model(input_ids=tokens.input_ids, attention_mask=mask).last_hidden_state
        return Captions.left_padded(features, mask.sum(1))

    @cached_property
    def _model(self):
        from transformers import T5EncoderModel

        try:
            model, info = T5EncoderModel.from_pretrained(
                self.path, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise self._unreadable(error) from error
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise UserError(
                f"text encoder {self.path}: {len(missing)} tensor(s) are missing, as {missing[0]}"
            )
        return model.to(self.device).eval()

    def _unreadable(self, error: Exception) -> UserError:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        return UserError(
            f"text encoder {self.path}: no readable T5 ({reason}); expected a directory or Hub "
            "repository such as google/flan-t5-xl"
        )


def caption_shape(generator: Generator) -> tuple[int, int] | None:
    """Return length and channels of the captions that a text-conditional generator takes, None for
    a class-conditional one."""
    if not isinstance(generator.condition, CaptionCondition):
        return None
    return tuple(generator.condition.null_features.shape)


def remember_encoder(generator: Generator, path: str) -> None:
    """Note in a generator's config which text encoder its captions come from."""
    generator.register_to_config(_text_encoder=path)


def remembered_encoder(generator: Generator) -> str | None:
    return generator.config.get("_text_encoder")
