"""The page (Gradio: Abid et al., 2019, arXiv:1906.02569): a tab to generate, one to reconstruct,
one to edit by tokens. It asks nothing of the network: its fonts are the system's."""

import functools
import inspect
from collections.abc import Callable, Iterator
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import gradio as gr
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from vistok.data import Emoji
from vistok.data.sources import read_image
from vistok.demo.mixing import after, mixed, reconstruct, rectangle, redrawn, redraws
from vistok.demo.previews import stream
from vistok.demo.settings import plan_choices, read_settings, spelt, whole
from vistok.errors import UserError
from vistok.generators import Condition
from vistok.images import image_grid, to_pil
from vistok.pipelines import ImagePipeline
from vistok.tokenizers import Tokenizer

SHOWN = 512  # pixels of a side to which what is small is enlarged
MOST_IMAGES = 16
LAST_SEED = 2**53 - 1  # the last whole number of a browser
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}


def serve(
    model: ImagePipeline | Tokenizer, host: str, port: int, share: bool, block: bool = True
) -> gr.Blocks:
    """Serve the page of a model; raise `UserError` where the address is not to be had."""
    page = Page(model).blocks
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=gr.themes.Default(**FONTS),
            footer_links=[],
            ssr_mode=False,
            max_file_size="64mb",
            prevent_thread_lock=not block,
            quiet=not block,
        )
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot be served there ({error})") from error
    return page


def in_one_line(handler: Callable) -> Callable:
    """Return a handler of events whose mistakes in the input show as a line on the page."""

    def line(error: UserError) -> gr.Error:
        return gr.Error(str(error), title="This does not fit", print_exception=False)

    @functools.wraps(handler)
    def of_result(*fields: Any) -> Any:
        try:
            return handler(*fields)
        except UserError as error:
            raise line(error) from error

    @functools.wraps(handler)
    def of_stream(*fields: Any) -> Iterator[Any]:
        try:
            yield from handler(*fields)
        except UserError as error:
            raise line(error) from error

    return of_stream if inspect.isgeneratorfunction(handler) else of_result


class Page:
    """The page of a pipeline or, without the tab to generate, of a tokenizer.

    Attributes: `blocks`, what Gradio serves.
    """

    def __init__(self, model: ImagePipeline | Tokenizer):
        self.pipeline = model if isinstance(model, ImagePipeline) else None
        self.tokenizer = self.pipeline.tokenizer if self.pipeline else model.eval()
        if self.tokenizer.frames is not None:
            raise UserError(f"{type(self.tokenizer).__name__} makes videos: the page shows images")
        self.emoji = Emoji("held-out")
        with gr.Blocks(title="vistok", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            gr.Markdown(self.heading())
            if self.pipeline:
                with gr.Tab("Generate"):
                    self.tab_to_generate()
            # Decoders that read captions know none of a picture that is uploaded.
            if self.tokenizer.text_shape is None:
                with gr.Tab("Reconstruct"):
                    self.tab_to_reconstruct(blocks)
                with gr.Tab("Edit"):
                    self.tab_to_edit(blocks)
        self.blocks = blocks

    def heading(self) -> str:
        models = [self.tokenizer, *([self.pipeline.generator] if self.pipeline else [])]
        parts = (f"**{type(m).__name__}**, {m.num_parameters():,} parameters" for m in models)
        return f"# vistok\n{'; '.join(parts)}; {self.tokenizer.spec}"

    def tab_to_generate(self) -> None:
        generator, decoding = self.pipeline.generator, self.pipeline.decoding
        plans = plan_choices(generator, decoding.plan)
        with gr.Row():
            with gr.Column(scale=2):
                subject = self.subject(several=True)
                plan = gr.Dropdown(
                    plans,
                    label="plan",
                    info=f"or written: {', '.join(generator.orders)}",
                    allow_custom_value=True,
                )
                with gr.Row():
                    guidance = gr.Textbox(
                        spelt(decoding.guidance), label="guidance", elem_id="guidance"
                    )
                    temperature = gr.Textbox(spelt(decoding.temperature), label="temperature")
                with gr.Row():
                    top_k = gr.Textbox(spelt(decoding.top_k), label="top-k, 0: all")
                    steps = gr.Textbox(
                        spelt(decoding.steps or generator.head.steps),
                        label="steps of the head",
                        visible=bool(generator.head.samplers),
                    )
                    seed = gr.Number(0, label="seed", precision=0)
                count = gr.Slider(1, MOST_IMAGES, 4, step=1, label="images")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=3):
                picture = result("images", SHOWN, elem_id="generated")
                progress = gr.Markdown(elem_id="progress")

        @in_one_line
        def generate(chosen, plan, guidance, temperature, top_k, steps, seed, count):
            fields = {"plan": plan, "guidance": guidance, "temperature": temperature}
            fields |= {"top_k": top_k} | ({"steps": steps} if generator.head.samplers else {})
            settings = read_settings(decoding, fields)
            seed = whole(seed, "seed", 0, LAST_SEED)
            condition = self.condition(chosen, whole(count, "images", 1, MOST_IMAGES))
            for preview in stream(self.pipeline, condition, seed, settings):
                yield shown(preview.images), str(preview)

        fields = [subject, plan, guidance, temperature, top_k, steps, seed, count]
        button.click(generate, fields, [picture, progress], **ONE_AT_A_TIME)

    def tab_to_reconstruct(self, blocks: gr.Blocks) -> None:
        spec, lengths = self.tokenizer.spec, self.tokenizer.spec.lengths
        with gr.Row():
            with gr.Column():
                picture, changes = self.picture(blocks, "picture", 2)
                number = gr.Slider(
                    1,
                    max(2, len(lengths)),
                    len(lengths),
                    step=1,
                    label="first scales" if spec.is_scales else "first tokens",
                    visible=spec.has_prefixes,
                    elem_id="length",
                )
            original = result("as the tokenizer reads it", 400)
            reconstruction = result("reconstruction", 400, elem_id="reconstruction")
        facts = gr.Markdown(elem_id="facts")

        @in_one_line
        def update(path, number):
            if path is None:
                return None, None, ""
            made = reconstruct(self.tokenizer, read(path), lengths[number - 1])
            return shown(made.original), shown(made.image), str(made)

        for event in (*changes, number.release):
            event(update, [picture, number], [original, reconstruction, facts], **ONE_AT_A_TIME)

    def tab_to_edit(self, blocks: gr.Blocks) -> None:
        with gr.Row():
            (a, a_changes), (b, b_changes) = (
                self.picture(blocks, name, number) for number, name in enumerate("AB")
            )
        region, mask_of = self.region()
        swap = gr.Button("Exchange A and B")
        with gr.Row():
            names = {"a": "A in tokens", "b": "B in tokens", "mix": "the mix"}
            results = [result(label, 260, elem_id=name) for name, label in names.items()]

        @in_one_line
        def update(a, b, *region):
            if a is None or b is None:
                return None, None, None
            images = mixed(self.tokenizer, read(a), read(b), mask_of(*region))
            return [shown(image) for image in images.split(1)]

        swapped = swap.click(lambda a, b: (b, a), [a, b], [a, b])
        moved = [slider.release for slider in region]
        for event in (*a_changes, *b_changes, swapped.then, *moved):
            event(update, [a, b, *region], results, **ONE_AT_A_TIME)
        if self.pipeline is None or not redraws(self.pipeline):
            return

        with gr.Row():
            subject = self.subject(several=False)
            seed = gr.Number(0, label="seed", precision=0)
            button = gr.Button("Draw these tokens of A anew", elem_id="redraw")
        progress = gr.Markdown()

        @in_one_line
        def redraw(a, chosen, seed, *region):
            if a is None:
                raise UserError("A: choose a picture")
            condition = self.condition(chosen, 1)
            seed, mask = whole(seed, "seed", 0, LAST_SEED), mask_of(*region)
            for preview in redrawn(self.pipeline, read(a), mask, condition, seed):
                yield shown(preview.images), str(preview)

        fields = [a, subject, seed, *region]
        button.click(redraw, fields, [results[2], progress], **ONE_AT_A_TIME)

    def region(self) -> tuple[list[gr.Slider], Callable[..., Bool[Tensor, "n"]]]:
        """Return the sliders that say which tokens come from B, and what makes a mask of them."""
        spec = self.tokenizer.spec
        if spec.is_scales or len(spec.shape) == 1:
            most = len(spec.shape) if spec.is_scales else spec.num_tokens
            label = f"first {'scales' if spec.is_scales else 'tokens'} from A, the rest from B"
            slider = gr.Slider(0, most, most // 2, step=1, label=label)
            return [slider], functools.partial(after, spec)
        sliders = []
        with gr.Row():
            for name, side in zip(("row", "column"), spec.shape, strict=True):
                for edge, value in (("first", side // 4), ("last", side - side // 4 - 1)):
                    label = f"{edge} {name} from B"
                    sliders.append(gr.Slider(0, side - 1, value, step=1, label=label))

        def mask(top, bottom, left, right):
            return rectangle(spec, top, left, bottom + 1, right + 1)

        return sliders, mask

    def picture(self, blocks: gr.Blocks, label: str, first: int) -> tuple[gr.Image, list[Callable]]:
        """Return a place for a picture, uploaded or one of those built in, and the events after
        which it is another."""
        names = list(dict.fromkeys(self.emoji.captions))
        with gr.Column():
            image = gr.Image(
                label=label,
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                buttons=[],
                height=200,
            )
            chosen = gr.Dropdown(names, value=names[first], label="built-in pictures")

        def built_in(name: str) -> Image.Image:
            return self.emoji[self.emoji.captions.index(name)].image

        # The event `change` of an image also comes where its tab is opened.
        built = gr.on([blocks.load, chosen.input], built_in, chosen, image)
        return image, [built.then, image.upload, image.clear]

    def subject(self, several: bool) -> gr.Textbox | gr.Dropdown:
        """Return where one says what images are of."""
        if self.pipeline.conditioning == "text":
            return gr.Textbox(label="prompts, one a line" if several else "prompt", lines=2)
        names = list(self.pipeline.class_names)
        value, label = (names[:4], "classes, in turn") if several else (names[0], "class")
        return gr.Dropdown(names, value=value, type="index", multiselect=several, label=label)

    def condition(self, chosen: str | int | list[int] | None, count: int) -> Condition:
        """Return the condition of `count` images, of what was chosen in turn."""
        if isinstance(chosen, str):
            chosen = [line for line in chosen.splitlines() if line.strip()]
        subjects = chosen if isinstance(chosen, list) else [chosen]
        if subjects in ([], [None]):
            raise UserError("choose a class, or write a prompt")
        subjects = [subjects[i % len(subjects)] for i in range(count)]
        as_text = self.pipeline.conditioning == "text"
        return (self.pipeline.captions if as_text else self.pipeline.labels)(subjects)


def result(label: str, height: int, **options: str) -> gr.Image:
    """Return a place for a picture that is made."""
    return gr.Image(
        label=label,
        height=height,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        **options,
    )


def read(path: str) -> Image.Image:
    return read_image(Path(path), "picture")


def shown(images: Float[Tensor, "b 3 h w"]) -> Image.Image:
    """Return images in a square, those of few pixels enlarged."""
    columns = ceil(sqrt(len(images)))
    scale = max(1, SHOWN // (columns * images.shape[-1]))
    if len(images) > 1:
        return image_grid(images, columns, scale=scale)
    (picture,) = to_pil(images)
    size = (side * scale for side in picture.size)
    return picture.resize(tuple(size), Image.Resampling.NEAREST)
