"""Captions to features, by the encoder of a T5 (Raffel et al., 2020, arXiv:1910.10683) or the text
tower of a CLIP (Radford et al., 2021, arXiv:2103.00020); or to ids, for generators that embed them.

LlamaGen and its followers read captions through FLAN-T5-XL (Chung et al., 2022, arXiv:2210.11416):
the last hidden states of google/flan-t5-xl, 120 tokens of 2048 channels. TA-TiTok's decoder reads
CLIP's. The models are transformers' and are never saved with a generator, which
remembers its encoder's name alone.
"""

from collections.abc import Sequence
from functools import cached_property

import safetensors
import torch
from jaxtyping import Float
from torch import Tensor

from vistok.errors import UserError
from vistok.generators import Captions, Generator, Prompts
from vistok.generators.conditions import ClassCondition
from vistok.models import Model
from vistok.tokenizers import Tokenizer


class ReadsText:
    """What reads texts, of a directory or Hub repository as transformers saves it: a model, or no
    more than its tokenizer. A subclass says which."""

    name: str
    example: str

    def __init__(self, path: str):
        self.path = path
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"text encoder {path}: needs transformers; pip install 'vistok[text]'"
            ) from error

    def _unreadable(self, error: Exception) -> UserError:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        return UserError(
            f"text encoder {self.path}: no readable {self.name} ({reason}); expected a directory "
            f"or Hub repository such as {self.example}"
        )


class PromptReader(ReadsText):
    """The tokenizer of a language model, for generators that embed its ids themselves.

    Args:
        path: directory or Hub repository of the tokenizer, as transformers saves it.
        length: ids to which prompts are padded or cut.
        vocab_size: of the generator's texts, the last id being that of padding; None for one more
            than the tokenizer has.
        device: of the ids.

    Raises `UserError` where transformers is not installed or `path` holds no tokenizer.
    """

    name, example = "tokenizer", "meta-llama/Llama-2-7b-hf"
    dim = None  # ids have no channels

    def __init__(
        self,
        path: str,
        length: int = 128,
        vocab_size: int | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__(path)
        from transformers import AutoTokenizer

        self.length, self.device = length, device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, ImportError) as error:
            raise self._unreadable(error) from error
        self.vocab_size = vocab_size or 1 + len(self.tokenizer)

    def encode(self, captions: Sequence[str]) -> Prompts:
        """Return the ids of captions, padded on the left."""
        ids = [self.ids(caption) for caption in captions]
        return Prompts.left_padded(ids, self.length, self.vocab_size - 1).to(self.device)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, with that of its beginning; raise `UserError` for one that the
        generator does not know."""
        ids = self.tokenizer(text).input_ids
        if ids and max(ids) >= self.vocab_size:
            raise UserError(
                f"text encoder {self.path}: reads {text!r} as id {max(ids)}, the generator knows "
                f"{self.vocab_size}"
            )
        return ids


class FrozenText(ReadsText):
    """A frozen text model of transformers, float32, with its tokenizer; the weights are read at the
    first caption. A subclass says which model it is.

    Args:
        path: directory or Hub repository of the model, as transformers saves it.
        device: of the model and its features.

    Raises `UserError` where transformers is not installed or `path` holds no such model.
    """

    model_types: tuple[str, ...]
    loader: str  # class of transformers

    def __init__(self, path: str, device: torch.device | str = "cpu"):
        super().__init__(path)
        import transformers

        self.device = device
        try:
            config = transformers.AutoConfig.from_pretrained(path)
            if config.model_type in self.model_types:
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, ImportError) as error:
            raise self._unreadable(error) from error
        if config.model_type not in self.model_types:
            raise UserError(
                f"text encoder {path}: holds a model of type {config.model_type}, expected "
                f"{self.model_types[0]}, as {self.example} is"
            )
        self.config = config.get_text_config()

    @cached_property
    def _model(self):
        import transformers

        try:
            model, info = getattr(transformers, self.loader).from_pretrained(
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


class TextEncoder(FrozenText):
    """The encoder of a T5, for generators.

    Captions are put in lower case and freed of superfluous space. The published features come from
    captions that went through DeepFloyd's cleaner, too (addresses, markup, stray punctuation):
    captions off the web are to be cleaned before.

    Args:
        path: directory or Hub repository of a T5, as transformers saves it.
        length: tokens to which captions are padded or cut.
        device: of the model and its features.

    `dim` is the number of channels.
    """

    name, model_types, loader = "T5", ("t5",), "T5EncoderModel"
    example = "google/flan-t5-xl"

    def __init__(self, path: str, length: int = 120, device: torch.device | str = "cpu"):
        if length < 1:
            raise UserError(f"text encoder {path}: captions of {length} tokens, expected 1 or more")
        super().__init__(path, device)
        self.tokenizer.padding_side = "right"
        self.length, self.dim = length, self.config.d_model

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


class ClipText(FrozenText):
    """The text tower of a CLIP (Radford et al., 2021, arXiv:2103.00020), for tokenizers with a
    `text_shape`: TA-TiTok reads openai/clip-vit-large-patch14-336.

    `shape` is (rows, channels) of the features of a caption, (77, 768) there.
    """

    name, model_types, loader = "CLIP", ("clip", "clip_text_model"), "CLIPTextModel"
    example = "openai/clip-vit-large-patch14-336"

    def __init__(self, path: str, device: torch.device | str = "cpu"):
        super().__init__(path, device)
        self.shape = (self.config.max_position_embeddings, self.config.hidden_size)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Float[Tensor, "b l c"]:
        """Return the last hidden states of captions after the final norm, all positions; longer
        captions are cut."""
        tokens = self.tokenizer(list(captions), truncation=True, max_length=self.shape[0])
        # OpenAI's tokenizer, by which the published features were made, pads with zeros and not, as
        # that of transformers, with the token of the end; nothing is masked.
        ids = torch.zeros(len(captions), self.shape[0], dtype=torch.int64)
        for row, found in zip(ids, tokens.input_ids, strict=True):
            row[: len(found)] = torch.tensor(found)
        return self._model(input_ids=ids.to(self.device)).last_hidden_state


def caption_reader(
    generator: Generator, path: str, device: torch.device | str = "cpu"
) -> TextEncoder | PromptReader:
    """Return what makes of captions what a text-conditional generator takes; raise `UserError`
    where there is no such thing at `path`."""
    length, dim = caption_shape(generator)
    if dim is None:
        return PromptReader(path, length, generator.condition.num_embeddings, device)
    encoder = TextEncoder(path, length, device)
    if encoder.dim != dim:
        raise UserError(
            f"text encoder {path}: makes {encoder.dim} channels, the generator takes {dim}"
        )
    return encoder


def caption_shape(generator: Generator) -> tuple[int, int | None] | None:
    """Return length and channels of the captions that a text-conditional generator takes, None for
    the channels of ids, and for a class-conditional one."""
    if isinstance(generator.condition, ClassCondition):
        return None
    return generator.condition.shape


def remember_encoder(model: Model, path: str) -> None:
    """Note in a model's config which text encoder its captions come from."""
    model.register_to_config(_text_encoder=path)


def remembered_encoder(model: Model) -> str | None:
    return model.config.get("_text_encoder")


def decoder_text(
    tokenizer: Tokenizer, path: str | None = None, device: torch.device | str = "cpu"
) -> ClipText | None:
    """Return what reads the captions that a tokenizer decodes with, by default the CLIP that it was
    trained with; None for a tokenizer that takes none. Raises `UserError` where no CLIP is known,
    or one of another shape."""
    if tokenizer.text_shape is None:
        return None
    path = path or remembered_encoder(tokenizer)
    if path is None:
        raise UserError(
            f"{type(tokenizer).__name__} decodes with captions and its checkpoint names no CLIP: "
            f"give the one it was trained with, as {ClipText.example}"
        )
    text = ClipText(path, device)
    if text.shape != tokenizer.text_shape:
        raise UserError(
            f"text encoder {path}: makes {text.shape} features, the tokenizer takes "
            f"{tokenizer.text_shape}"
        )
    remember_encoder(tokenizer, path)
    return text


def class_captions(names: Sequence[str]) -> list[str]:
    """Return the captions that stand for classes (Kim et al., 2025, arXiv:2501.07730)."""
    return [f"A photo of a {name}." for name in names]
