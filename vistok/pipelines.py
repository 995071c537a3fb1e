"""ImagePipeline: a tokenizer and a generator behind one diffusers-style call."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from vistok.decoding import (
    Decoding,
    Given,
    MaskedPlan,
    Noise,
    Plan,
    RandomPlan,
    Schedule,
    decode,
    decode_adaptively,
    decode_masked,
    decode_random,
)
from vistok.errors import CheckpointError, UserError, suggestion
from vistok.files import replaced
from vistok.generators import Captions, Condition, Generator, Prompts
from vistok.images import to_pil
from vistok.text import (
    PromptReader,
    TextEncoder,
    caption_reader,
    caption_shape,
    class_captions,
    decoder_text,
    remember_encoder,
    remembered_encoder,
)
from vistok.tokenizers import Tokenizer
from vistok.tokens import require_same

DECODING = "decoding.json"
DEFAULT = Decoding(guidance=Schedule(2))


@dataclass(frozen=True)
class PipelineOutput:
    """`images`, one PIL image per class or prompt."""

    images: list[Image.Image]


class ImagePipeline:
    """Class labels, or captions, to images.

        pipeline = ImagePipeline.from_pretrained("assets/emoji")
        pipeline(class_labels=["Food & Drink", 3], seed=0).images[0].save("food.png")

        pipeline = ImagePipeline.from_pretrained(PATH, text_encoder="google/flan-t5-xl")
        pipeline(prompts=["a red circle"], seed=0).images[0].save("circle.png")

    `decoding` says how tokens are decoded where a call does not. `text_encoder` is the directory or
    Hub repository of what reads the prompts of a text-conditional generator, by default the one it
    was trained with; it is loaded for the first prompt. Raises `IncompatibleTokensError` where the
    generator was built for other tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Generator,
        decoding: Decoding | None = None,
        text_encoder: str | None = None,
    ):
        require_same(
            type(tokenizer).__name__, tokenizer.spec, type(generator).__name__, generator.spec
        )
        if tokenizer.text_shape and caption_shape(generator):
            raise UserError(
                f"{type(tokenizer).__name__} decodes with captions of classes: pair it with a "
                "class-conditional generator"
            )
        self.tokenizer, self.generator = tokenizer.eval(), generator.eval()
        self.decoding = decoding or DEFAULT
        self._states: dict[tuple[int, Plan], object] = {}
        self._encoder: TextEncoder | PromptReader | None = None
        self._class_text: Tensor | None = None
        if text_encoder is not None:
            self.require("text", f"text encoder {text_encoder}")
            remember_encoder(generator, text_encoder)

    @classmethod
    def from_pretrained(cls, path: str | Path, text_encoder: str | None = None, **kwargs) -> Self:
        """Load the sub-folders `tokenizer` and `generator` of a directory or Hub repository, and
        the `decoding.json` beside or in the latter, if there is one; `kwargs` (`torch_dtype`, ...)
        go to both models."""
        if not Path(path).exists() and str(path).count("/") == 1:
            path = snapshot_download(str(path))
        return cls(
            Tokenizer.from_pretrained(path, subfolder="tokenizer", **kwargs),
            Generator.from_pretrained(path, subfolder="generator", **kwargs),
            read_decoding(Path(path)) or read_decoding(Path(path, "generator")),
            text_encoder,
        )

    def untrained(self) -> Self:
        """Return a pipeline with the same tokenizer under a generator of fresh weights."""
        fresh = type(self.generator).from_config(self.generator.config)
        fresh.take_codes(self.tokenizer)
        return type(self)(self.tokenizer, fresh, self.decoding, self.text_encoder)

    def save_pretrained(self, path: str | Path, card: str = "") -> None:
        """Write both models side by side, with `card` as the text of the model card."""
        self.tokenizer.save_pretrained(Path(path, "tokenizer"))
        self.generator.save_pretrained(Path(path, "generator"))
        write_decoding(Path(path), self.decoding)
        Path(path, "README.md").write_text(self.model_card(card), encoding="utf-8")

    def model_card(self, text: str = "") -> str:
        """Return the card: what the parts are, how to use them, and `text`."""
        facts = {
            "tokenizer": f"{type(self.tokenizer).__name__}, {self.tokenizer.spec}, "
            f"{self.tokenizer.num_parameters():,} parameters",
            "generator": f"{type(self.generator).__name__}, "
            f"{self.generator.num_parameters():,} parameters",
            "bits per image": f"{self.tokenizer.spec.bits:g}",
            "decoding": ", ".join(f"{k} {v}" for k, v in self.decoding.to_dict().items()),
        }
        if self.conditioning == "text":
            facts["text encoder"] = self.text_encoder or "not known"
            tag, call = "text-to-image", 'prompts=["a red circle"]'
        else:
            facts["classes"] = ", ".join(self.class_names[:20])
            facts["classes"] += ", ..." if len(self.class_names) > 20 else ""
            tag, call = "unconditional-image-generation", "class_labels=[0]"
        rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
        return (
            f"---\nlibrary_name: vistok\npipeline_tag: {tag}\n---\n\n"
            f"| part | |\n|---|---|\n{rows}\n\n"
            "```python\nfrom vistok import ImagePipeline\n\n"
            'pipeline = ImagePipeline.from_pretrained("PATH")\n'
            f"images = pipeline({call}, seed=0).images\n```\n\n{text}\n"
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.generator.class_names

    @property
    def conditioning(self) -> Literal["class", "text"]:
        """What images are conditioned on."""
        return "class" if caption_shape(self.generator) is None else "text"

    @property
    def text_encoder(self) -> str | None:
        """Name of the text encoder, which the generator remembers."""
        return remembered_encoder(self.generator)

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def to(self, *args, **kwargs) -> Self:
        """Move both models to a device or dtype."""
        self.tokenizer.to(*args, **kwargs)
        self.generator.to(*args, **kwargs)
        self._states.clear()
        self._encoder = self._class_text = None
        return self

    def compile(self, **options) -> Self:
        """Compile the generator's step and the tokenizer's decoder with `torch.compile`."""
        self.generator.compile_decoding(**options)
        self.tokenizer.decode = torch.compile(self.tokenizer.decode, **options)
        return self

    def labels(self, classes: Sequence[int | str]) -> Int64[Tensor, "b"]:
        """Return the labels of classes given by number or by name."""
        self.require("class", "class labels")
        return torch.tensor([self._label(c) for c in classes])

    def _label(self, wanted: int | str) -> int:
        names = self.class_names
        if isinstance(wanted, str) and wanted in names:
            return names.index(wanted)
        if str(wanted).lstrip("-").isdigit() and 0 <= int(wanted) < len(names):
            return int(wanted)
        raise UserError(
            f"class {wanted!r} is not among the {len(names)} classes 0-{len(names) - 1}: "
            f"{', '.join(names[:12])}{suggestion(str(wanted), names)}"
        )

    def captions(self, prompts: str | Sequence[str]) -> Captions | Prompts:
        """Return the features, or the ids, of prompts, which the text encoder reads."""
        self.require("text", "prompts")
        if self.text_encoder is None:
            raise UserError(
                "the checkpoint names no text encoder: give the one it was trained with "
                "(text_encoder, as google/flan-t5-xl)"
            )
        if self._encoder is None:
            self._encoder = caption_reader(self.generator, self.text_encoder, self.device)
        return self._encoder.encode([prompts] if isinstance(prompts, str) else prompts)

    def require(self, conditioning: Literal["class", "text"], given: str) -> None:
        """Raise `UserError` unless that is what the generator is conditioned on."""
        if self.conditioning != conditioning:
            takes = {"class": "class labels", "text": "prompts"}[self.conditioning]
            raise UserError(
                f"this model is {self.conditioning}-conditional: it takes {takes}, not {given}"
            )

    def sample_tokens(
        self,
        condition: Condition,
        seed: int,
        indices: Sequence[int] | Tensor,
        decoding: Decoding | None = None,
    ) -> Tensor:
        """Decode the tokens of images `indices` of the run `seed`, conditioned on labels or on
        captions. Each depends on the weights, its label or caption, `decoding`, `seed` and its own
        index alone."""
        return self._sample_tokens(condition, Noise(seed, indices), decoding)

    def _sample_tokens(
        self,
        condition: Condition,
        noise: Noise,
        decoding: Decoding | None,
        on_pass: Callable[[int, Tensor], None] | None = None,
        given: Given | None = None,
    ) -> Tensor:
        self.generator.condition.check(condition)
        if self.conditioning == "class":
            self.labels(condition.tolist())
        condition = condition.to(self.device)
        decoding = decoding or self.decoding
        plan = decoding.plan_of(self.generator)
        window = decoding.plan and decoding.plan.adaptive_window
        if given is not None and (window or isinstance(plan, MaskedPlan)):
            raise UserError(f"order {decoding.plan or plan.name} keeps no tokens: only a fixed one")
        if isinstance(plan, RandomPlan):
            return decode_random(self.generator, condition, noise, decoding, on_pass)
        if isinstance(plan, MaskedPlan):
            return decode_masked(self.generator, condition, noise, decoding, on_pass)
        if window:
            return decode_adaptively(self.generator, condition, noise, window, decoding, on_pass)[0]
        rows = len(condition) * (2 if any(s != 1 for s in decoding.scales(plan)) else 1)
        if (rows, plan) not in self._states:
            self._states = {(rows, plan): self.generator.new_state(rows, plan)}
        state = self._states[rows, plan]
        return decode(self.generator, condition, noise, decoding, state, on_pass, given)

    @torch.inference_mode()
    def sample(
        self,
        condition: Condition,
        seed: int,
        indices: Sequence[int] | Tensor,
        decoding: Decoding | None = None,
        on_pass: Callable[[int, Tensor], None] | None = None,
        given: Given | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """As `sample_tokens`, decoded to images in [0, 1]; `on_pass(t, tokens)` sees what is
        decoded after each pass, as the loop of the plan has it, and tokens that are `given` stay,
        where the positions of each pass are fixed. Raises `UserError` for images that are not
        finite, rather than returning them black."""
        noise = Noise(seed, indices)  # the tokenizer's decoder draws on where the generator ended
        tokens = self._sample_tokens(condition, noise, decoding, on_pass, given)
        images = self.tokenizer.decode(tokens, text=self.text_of(condition), noise=noise)
        if not torch.isfinite(images).all():
            raise UserError(f"images {list(map(int, indices))} of seed {seed} are not finite")
        return images

    def text_of(self, condition: Condition) -> Float[Tensor, "b l c"] | None:
        """Return what the tokenizer reads of classes, if it decodes with captions."""
        if self.tokenizer.text_shape is None:
            return None
        if self._class_text is None:
            reader = decoder_text(self.tokenizer, device=self.device)
            self._class_text = reader.encode(class_captions(self.class_names))
        return self._class_text[condition.to(self.device)]

    def __call__(
        self,
        class_labels: Sequence[int | str] | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: Decoding | None = None,
        *,
        prompts: str | Sequence[str] | Captions | Prompts | None = None,
    ) -> PipelineOutput:
        """Return one PIL image per class, given by name or number, or per prompt, given as text or
        as the features or ids of its caption; image i is number `indices[i]` (by default i) of the
        run `seed`."""
        if (class_labels is None) == (prompts is None):
            raise UserError("give either class_labels or prompts")
        if prompts is None:
            condition = self.labels(class_labels)
        else:
            known = isinstance(prompts, Captions | Prompts)
            condition = prompts if known else self.captions(prompts)
        indices = range(len(condition)) if indices is None else indices
        return PipelineOutput(to_pil(self.sample(condition, seed, indices, decoding)))


def write_decoding(folder: Path, decoding: Decoding) -> None:
    """Keep how a checkpoint decodes where it is not told otherwise."""
    with replaced(folder / DECODING) as aside:
        aside.write_text(json.dumps(decoding.to_dict(), indent=2) + "\n")


def read_decoding(folder: Path) -> Decoding | None:
    """Return what `write_decoding` kept in a folder, None where it did not."""
    file = folder / DECODING
    if not file.exists():
        return None
    try:
        return Decoding.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: no settings of decoding ({error})") from error
