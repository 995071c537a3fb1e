"""vistok cache: encode a data set once, so that generators train on its tokens.

vistok cache --tokenizer runs/quickstart/tokenizer --data Emoji --output runs/quickstart/tokens
accelerate launch --num_processes 8 -m vistok.cli cache --tokenizer ... --data ImageFolder ...
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from vistok.data import (
    EvaluationImages,
    ImageSource,
    TokenCache,
    TokenCacheHeader,
    TokenCacheWriter,
    Transform,
    shard_range,
)
from vistok.data.token_cache import HEADER
from vistok.errors import UserError
from vistok.tokenizers import Tokenizer


@torch.inference_mode()
def main(
    tokenizer: str,
    data: ImageSource,
    output: str,
    transform: str = "resize-center-crop",
    crops: int = 1,
    batch_size: int = 64,
    num_workers: int = 2,
    seed: int = 0,
) -> None:
    """Encode a data set into a memory-mapped token cache, on one process or several.

    Args:
        tokenizer: directory or Hub repository of the tokenizer
        data: pictures to encode
        output: directory of the cache
        transform: how a picture becomes the tokenizer's size; training must name the same
        crops: draws of a random transform per picture; training takes one of them at each sight
        batch_size: pictures encoded at once on each process
        num_workers: processes that load pictures, for each process
        seed: of the random transform
    """
    process = Accelerator()
    model = Tokenizer.from_pretrained(tokenizer).to(process.device).eval()
    crop = Transform(transform, model.image_size[0])
    if crops < 1 or (crops > 1 and not crop.is_random):
        raise UserError(f"--crops {crops}: '{transform}' always gives the same crop; use 1")
    header = TokenCacheHeader(
        model.fingerprint(), model.spec, crop, data.name, data.class_names, len(data), crops
    )
    if Path(output, HEADER).exists() and TokenCache(output).header == header:
        process.print(f"{output} holds these tokens already")
        return
    writer = TokenCacheWriter(output, header)
    if process.is_main_process:
        writer.allocate()
    process.wait_for_everyone()

    mine = shard_range(len(data), process.process_index, process.num_processes)
    images = Subset(
        EvaluationImages(data, crop, crops, seed), range(mine.start * crops, mine.stop * crops)
    )
    loader = DataLoader(images, batch_size * crops, num_workers=num_workers)
    start = mine.start
    for batch in tqdm(loader, "encoding", disable=not process.is_main_process):
        tokens = model.encode(batch["image"].to(process.device)).cpu()
        labels = batch["label"][::crops]
        writer.write(start, tokens.unflatten(0, (len(labels), crops)), labels)
        start += len(labels)
    process.wait_for_everyone()
    if process.is_main_process:
        writer.finish()
        print(f"{len(data)} pictures of {data.name} as {crops} x {model.spec}: {output}")
