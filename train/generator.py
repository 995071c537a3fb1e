"""Train a generator on the tokens of a frozen tokenizer.

    accelerate launch train/generator.py --config configs/quickstart/generator.yaml
    accelerate launch --num_processes 8 --mixed_precision bf16 train/generator.py --config ...

Stop it with Ctrl-C or SIGTERM, and go on where it was with `--resume true`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from vistok import TokenSpec, options
from vistok.data import (
    HeldOut,
    Images,
    ImageSource,
    Stream,
    TokenCache,
    Transform,
    make_loader,
)
from vistok.decoding import Decoding
from vistok.errors import UserError
from vistok.generators import Condition, Generator
from vistok.images import image_grid
from vistok.pipelines import DEFAULT, ImagePipeline, write_decoding
from vistok.text import caption_shape, remember_encoder
from vistok.tokenizers import Tokenizer
from vistok.training import (
    EMA,
    Checkpoints,
    OptimizerConfig,
    Progress,
    RunConfig,
    TrainingState,
    Validation,
    Window,
    accumulate,
    adamw,
    describe,
    guarded_step,
    held_out_means,
    opened,
    report_non_finite,
    set_learning_rate,
    shard_like_model,
    spread,
    start_processes,
)

ADAMW = OptimizerConfig()
RUN = RunConfig()
ROWS, COLUMNS = 8, 8  # classes or captions, and samples of each, in a validation picture
AT_ONCE = 16  # samples decoded together: their cache lies in memory beside all that trains


def main(
    generator: Callable[[TokenSpec, list[str]], Generator],
    tokenizer: str,
    output: str,
    images: int,
    data: ImageSource | None = None,
    tokens: str | None = None,
    initial: str | None = None,
    batch_size: int = 64,
    accumulation: int = 1,
    transform: str = "random-crop-flip",
    validation: ImageSource | str | None = None,
    optimizer: OptimizerConfig = ADAMW,
    ema_decay: float = 0.999,
    decoding: Decoding = DEFAULT,
    seed: int = 0,
    resume: bool = False,
    allow_changes: bool = False,
    run: RunConfig = RUN,
) -> None:
    """Train a generator. `output` receives the averaged model, for `Generator.from_pretrained`,
    `checkpoints/`, `log.jsonl`, and `validation/` with samples, one class per row.

    A text-conditional generator (`caption_dim`) trains on a token cache that holds captions. Its
    samples stand to the right of the picture whose caption they were given.

    Args:
        generator: the model; its token spec and class names come from tokenizer and data.
        tokenizer: directory or Hub repository of the tokenizer, which stays as it is.
        output: directory of the run.
        images: length of the run in images seen.
        data: pictures to train on, encoded as they come; or else
        tokens: directory of a token cache made with this tokenizer.
        initial: directory or Hub repository of a generator to start from; its grid may be another.
        batch_size: images per step, on all processes and in all micro-batches together.
        accumulation: micro-batches into which each process splits its share of a step.
        transform: named crop of pictures; held-out ones are centre crops.
        validation: held-out pictures to score, or a token cache of them, by resize-center-crop.
        optimizer: of the generator.
        ema_decay: decay of the moving average of the weights.
        decoding: how samples are drawn, here and by default ever after.
        seed: of data order, crops, dropout and initial weights.
        resume: go on from the newest checkpoint in `output`, if there is one.
        allow_changes: resume although options have changed.
        run: precision, cadence and other matters of carrying it out.
    """
    accelerator = start_processes(output, run, seed)
    frozen = Tokenizer.from_pretrained(tokenizer).to(accelerator.device).eval()
    frozen.requires_grad_(False)
    size = frozen.image_size[0]
    if (data is None) == (tokens is None):
        raise UserError("give either data (pictures) or tokens (a token cache) to train on")
    source = opened_data(tokens if data is None else data, Transform(transform, size), frozen)
    held_out = None
    if validation is not None:
        held_out = opened_data(validation, Transform("resize-center-crop", size), frozen)
        if tuple(held_out.class_names) != tuple(source.class_names):
            raise UserError(f"validation data {held_out.name} has other classes than {source.name}")
    num_steps = -(-images // batch_size)

    net = generator(frozen.spec, list(source.class_names))
    net.take_codes(frozen)
    if initial is not None:
        net.start_from(Generator.from_pretrained(initial))
    decoding.plan_of(net.to(accelerator.device).train())  # what does not fit is an error here

    captions = caption_shape(net)
    if captions is not None:
        for cache in (source, held_out):
            if isinstance(cache, Images):
                raise UserError(
                    f"{cache.name}: a text-conditional generator trains and validates on token "
                    "caches: make one with vistok cache --text_encoder PATH"
                )
            if cache is not None:
                cache.check_captions(*captions)
        remember_encoder(net, source.header.captions.encoder)
    ema = EMA(net, ema_decay)
    if run.compile:
        net.compile()
    model, adam = accelerator.prepare(net, adamw(net, optimizer))
    shard_like_model(accelerator, ema)
    window = Window(accelerator)
    state = TrainingState({"generator": model}, {"generator": adam}, ema, window)
    checkpoints = Checkpoints(accelerator, Path(output), options.resolved_config(), run.keep)

    @torch.no_grad()
    def tokens_of(batch: dict[str, Tensor]) -> Tensor:
        # In full precision, whatever the generator's: a token cache holds the same tokens.
        given = batch["tokens"] if "tokens" in batch else frozen.statistics(batch["image"])
        return frozen.draw(given)

    def condition_of(batch: dict[str, Tensor]) -> Condition:
        if captions is None:
            return batch["label"]
        return net.condition.of(batch["captions"], batch["caption_mask"])

    def scores(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = ema.module(tokens_of(batch), condition_of(batch)).loss
        return {"validation/loss": loss.expand(len(batch["label"]))}

    def draw() -> Image.Image:
        """Return samples of the averaged model: a class a row, or a picture and its caption."""
        if captions is None:
            classes = spread(len(net.class_names), ROWS)
            condition, originals = torch.tensor(classes), []
            names = [net.class_names[c] for c in classes]
        else:
            shown = HeldOut(source if held_out is None else held_out)
            batch = default_collate([shown[i] for i in spread(len(shown), ROWS)])
            condition, names = condition_of(batch), [f"picture {i}" for i in batch["index"]]
            originals = [frozen.decode(tokens_of(batch).to(frozen.device))[:, None]]
        pipeline = ImagePipeline(frozen, ema.module, decoding)
        row_of = torch.arange(len(names)).repeat_interleave(COLUMNS)
        samples = [
            pipeline.sample(condition[row_of[part]], 0, part)
            for part in torch.arange(len(row_of)).split(AT_ONCE)
        ]
        rows = torch.cat([*originals, torch.cat(samples).unflatten(0, (-1, COLUMNS))], dim=1)
        return image_grid(rows.flatten(0, 1), rows.shape[1], names)

    def validate() -> Validation:
        # Sampling calls parts of the model, which FSDP serves only as a whole.
        picture = None if accelerator.is_fsdp2 else draw
        if held_out is None:
            return Validation(draw=picture)
        means = held_out_means(accelerator, HeldOut(held_out), run.validation_images, scores)
        return Validation(means, -means["validation/loss"], picture)

    sizes = (num_steps, batch_size, accumulation, len(source))
    accelerator.print(describe(accelerator, {**state.models, "tokenizer": frozen}, *sizes))
    with (
        opened(checkpoints, state, resume, allow_changes),
        Progress(checkpoints, state, run, num_steps, batch_size, len(source), validate) as progress,
    ):
        if accelerator.is_main_process:
            write_decoding(checkpoints.output, decoding)
        loader = make_loader(
            Stream(source, seed),
            start_step=state.step,
            num_steps=num_steps - state.step,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            num_workers=run.num_workers,
        )
        for step, batches in progress.steps(loader, accumulation):
            set_learning_rate(adam, lr := optimizer.learning_rate(step, num_steps))
            net.set_progress(step / num_steps)
            seen = []
            for batch in accumulate(accelerator, model, batches):
                result = model(tokens_of(batch), condition_of(batch))
                accelerator.backward(result.loss / accumulation)
                seen.append({"loss": result.loss.detach(), **result.metrics})
            taken, norm = guarded_step(accelerator, model, adam, seen, optimizer.max_grad_norm)
            if taken:
                ema.update_parameters(model)
                window.add(seen, grad_norm=norm)
            else:
                state.skipped_steps += 1
                report_non_finite(
                    accelerator, checkpoints.output, step + 1, batches, seen, run.non_finite
                )
            if progress.end_step(lr=lr):
                break


def opened_data(
    data: ImageSource | str, transform: Transform, tokenizer: Tokenizer
) -> Images | TokenCache:
    """Return pictures under the transform, or the token cache in a directory, which must be of that
    transform and tokenizer."""
    if not isinstance(data, str):
        return Images(data, transform)
    cache = TokenCache(data)
    cache.check(tokenizer.fingerprint(), transform)
    return cache


if __name__ == "__main__":
    options.run(main)
