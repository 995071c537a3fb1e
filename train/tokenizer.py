"""Train a tokenizer on pictures.

    accelerate launch train/tokenizer.py --config configs/quickstart/tokenizer.yaml
    accelerate launch --num_processes 8 --mixed_precision bf16 train/tokenizer.py --config ...

Stop it with Ctrl-C or SIGTERM, and go on where it was with `--resume true`.
"""

from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from PIL import Image
from torch import Tensor

from vistok import TokenSpec, options
from vistok.data import EvaluationImages, Images, ImageSource, Stream, Transform, make_loader
from vistok.decoding import Noise
from vistok.errors import UserError
from vistok.images import image_grid
from vistok.losses import TokenizerLoss
from vistok.metrics import psnr
from vistok.text import decoder_text
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
    held_out_batches,
    held_out_means,
    opened,
    report_non_finite,
    set_learning_rate,
    spread,
    start_processes,
)

ADAMW = OptimizerConfig()
RUN = RunConfig()
PICTURED = 16  # held-out images in a validation picture


def main(
    tokenizer: Tokenizer,
    data: ImageSource,
    output: str,
    images: int,
    initial: str | None = None,
    text_encoder: str | None = None,
    batch_size: int = 32,
    accumulation: int = 1,
    transform: str = "random-crop-flip",
    validation: ImageSource | None = None,
    loss: TokenizerLoss | None = None,
    optimizer: OptimizerConfig = ADAMW,
    discriminator_optimizer: OptimizerConfig = ADAMW,
    ema_decay: float = 0.999,
    seed: int = 0,
    resume: bool = False,
    allow_changes: bool = False,
    run: RunConfig = RUN,
) -> None:
    """Train a tokenizer. `output` receives the averaged model, for `Tokenizer.from_pretrained`,
    `checkpoints/`, `log.jsonl`, and `validation/` with held-out pictures over reconstructions.

    Args:
        tokenizer: the model.
        data: pictures to train on.
        output: directory of the run.
        images: length of the run in images seen.
        initial: directory or Hub repository of a tokenizer to start from: of the same kind, or that
            of the stage before.
        text_encoder: directory or Hub repository of the CLIP that reads the captions, for
            tokenizers that decode with captions.
        batch_size: images per step, on all processes and in all micro-batches together.
        accumulation: micro-batches into which each process splits its share of a step.
        transform: named crop of training pictures; held-out ones are centre crops.
        validation: held-out pictures to score.
        loss: distance of reconstructions, and the adversary, if any; None for squared error.
        optimizer: of the tokenizer.
        discriminator_optimizer: of the adversary.
        ema_decay: decay of the moving average of the weights.
        seed: of data order, crops and dropout.
        resume: go on from the newest checkpoint in `output`, if there is one.
        allow_changes: resume although options have changed.
        run: precision, cadence and other matters of carrying it out.
    """
    accelerator = start_processes(output, run, seed)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "codebooks and adversaries cannot be sharded: train tokenizers without FSDP"
        )
    reader = decoder_text(tokenizer, text_encoder, accelerator.device)
    if initial is not None:
        tokenizer.start_from(Tokenizer.from_pretrained(initial))
    loss = (loss or TokenizerLoss()).to(accelerator.device)
    tokenizer.to(accelerator.device).train()
    ema = EMA(tokenizer, ema_decay)
    if run.compile:
        tokenizer.compile()
    model, adam = accelerator.prepare(tokenizer, adamw(tokenizer, optimizer))
    models, optimizers = {"tokenizer": model}, {"tokenizer": adam}
    if loss.discriminator is not None:
        adversary, adversary_adam = accelerator.prepare(
            loss.discriminator, adamw(loss.discriminator, discriminator_optimizer)
        )
        models["discriminator"], optimizers["discriminator"] = adversary, adversary_adam

    window = Window(accelerator, tokenizer.spec.vocab_size)
    state = TrainingState(models, optimizers, ema, window)
    checkpoints = Checkpoints(accelerator, Path(output), options.resolved_config(), run.keep)
    num_steps = -(-images // batch_size)
    size = tokenizer.image_size[0]
    stream = Stream(Images(data, Transform(transform, size)), seed)
    centred = Transform("resize-center-crop", size)
    held_out = EvaluationImages(validation, centred) if validation else None

    def text_of(batch: dict[str, Any]) -> Tensor | None:
        return reader and reader.encode(batch["caption"])

    def reconstruct(batch: dict[str, Any]) -> list[Tensor]:
        """Return what becomes of pictures, at shorter lengths first where these decode."""
        net, text, noise = ema.module, text_of(batch), Noise(0, batch["index"])
        tokens = net.encode(batch["image"])
        return [
            net.decode(tokens[:, :length] if length else tokens, text=text, noise=noise)
            for length in [*shorter_lengths(net.spec), None]
        ]

    def scores(batch: dict[str, Any]) -> dict[str, Tensor]:
        *shorter, whole = reconstruct(batch)
        found = {
            f"validation/psnr_{length}": psnr(pictures, batch["image"])
            for length, pictures in zip(shorter_lengths(tokenizer.spec), shorter, strict=True)
        }
        found["validation/mse"] = (whole - batch["image"]).square().mean((1, 2, 3))
        return found | {"validation/psnr": psnr(whole, batch["image"])}

    def draw() -> Image.Image:
        """Return held-out pictures over their reconstructions."""
        shown = spread(len(held_out), PICTURED)
        batches = held_out_batches(accelerator, held_out, shown, PICTURED // 2)
        rows = [row for batch in batches for row in (batch["image"], *reconstruct(batch))]
        return image_grid(torch.cat(rows), PICTURED // 2)

    def validate() -> Validation:
        if held_out is None:
            return Validation()
        means = held_out_means(accelerator, held_out, run.validation_images, scores)
        return Validation(means, means["validation/psnr"], draw)

    parts = models | loss.frozen
    accelerator.print(describe(accelerator, parts, num_steps, batch_size, accumulation, len(data)))
    with (
        opened(checkpoints, state, resume, allow_changes),
        Progress(checkpoints, state, run, num_steps, batch_size, len(data), validate) as progress,
    ):
        loader = make_loader(
            stream,
            start_step=state.step,
            num_steps=num_steps - state.step,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            num_workers=run.num_workers,
        )
        for step, batches in progress.steps(loader, accumulation):
            # The tokenizer: reconstruct, and descend the gradient of the loss.
            lr = optimizer.learning_rate(step, num_steps)
            set_learning_rate(adam, lr)
            results, seen = [], []
            for batch in accumulate(accelerator, model, batches):
                result = model(batch["image"], text_of(batch))
                objective, terms = loss.generator_loss(
                    batch["image"], result, step, tokenizer.last_layer
                )
                accelerator.backward(objective / accumulation)
                results.append(result)
                # How codes are used is counted over the window.
                usage = {} if tokenizer.spec.vocab_size else result.usage
                seen.append({"loss": objective.detach(), **terms, **usage})
            taken, norm = guarded_step(accelerator, model, adam, seen, optimizer.max_grad_norm)
            if taken:
                tokenizer.update_codebook(torch.cat([result.latents for result in results]))
                ema.update_parameters(tokenizer)
                window.add(seen, grad_norm=norm)
                window.add_codes([result.tokens for result in results])

            # Its adversary: tell the same reconstructions from the pictures.
            if taken and loss.is_adversarial(step):
                set_learning_rate(
                    adversary_adam, discriminator_optimizer.learning_rate(step, num_steps)
                )
                seen = []
                pairs = list(zip(batches, results, strict=True))
                for batch, result in accumulate(accelerator, adversary, pairs):
                    objective, terms = loss.discriminator_loss(
                        batch["image"], result.reconstruction, step, adversary
                    )
                    accelerator.backward(objective / accumulation)
                    seen.append(terms)
                taken, norm = guarded_step(
                    accelerator,
                    adversary,
                    adversary_adam,
                    seen,
                    discriminator_optimizer.max_grad_norm,
                )
                if taken:
                    window.add(seen, discriminator_grad_norm=norm)

            if not taken:
                state.skipped_steps += 1
                report_non_finite(
                    accelerator, checkpoints.output, step + 1, batches, seen, run.non_finite
                )
            if progress.end_step(lr=lr):
                break


def shorter_lengths(spec: TokenSpec) -> list[int]:
    """Return a sixteenth and a quarter of the tokens, or the next fewer that decode, if any do."""
    fewer = (bisect_right(spec.lengths, spec.num_tokens // part) - 1 for part in (16, 4))
    return [spec.lengths[place] for place in sorted(set(fewer)) if place >= 0]


if __name__ == "__main__":
    options.run(main)
